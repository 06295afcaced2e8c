"""Looking inside: from traces of forward passes, and from weights, to measures of every layer."""
