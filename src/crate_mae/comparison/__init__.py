"""Models pretrained under the same budget, and measured in the same way."""
