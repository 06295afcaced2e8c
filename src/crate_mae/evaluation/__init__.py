"""How good a trained model is: its features, as those of any backbone with timm's interface, and its completions."""
