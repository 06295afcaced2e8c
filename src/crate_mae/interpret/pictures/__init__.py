"""Single pictures of what a model sees: attention, tokens as colours, curves over layers."""
