"""Kinds of damaged and odd inputs: each module has a list `KINDS`."""
