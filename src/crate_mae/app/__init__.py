"""The app: hide patches of a picture, see it completed, look inside the model."""
