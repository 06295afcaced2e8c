"""How what was measured is shown: one style of figures, one kind of page."""
