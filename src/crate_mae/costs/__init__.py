"""What a training step costs: operations, memory, time; counted, measured on this machine, or foretold for others."""
