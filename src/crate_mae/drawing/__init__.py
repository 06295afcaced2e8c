"""Figures in one style, line charts, HTML reports, and what measures are called."""
