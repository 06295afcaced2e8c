"""Commands: one documented function each, the same from Python and from the command line."""
