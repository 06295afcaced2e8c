"""The claims that the network is derived from: each file measures one, draws it, and explains the result."""
