"""Figures in one style, line charts, and HTML reports."""
