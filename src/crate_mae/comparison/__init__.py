"""Models pretrained and measured on equal terms: what costs what, and what comes of it."""
