"""What a trained model is worth: measured on any backbone with timm's contract."""
