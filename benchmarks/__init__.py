"""How fast, how large, and how both grow: see `README.md` beside this file."""
