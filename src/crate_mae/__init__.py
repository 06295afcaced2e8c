"""Masked completion by a white-box transformer: CRATE-MAE, to train, use and look inside."""
