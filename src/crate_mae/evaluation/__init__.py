"""What a trained model is worth: its features, on any backbone with timm's contract, and its completions."""
