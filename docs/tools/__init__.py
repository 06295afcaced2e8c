"""The tools that build the site and its notebooks from `docs/`."""
