"""Kinds of damaged and odd inputs: each module has a list `KINDS`, and imports at its top all that its calls need.

Processes are forked from one that has imported it, so they start fast.
"""
