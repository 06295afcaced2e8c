"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what the user gave: what is wrong, where, and how to mend it, in one to four lines.

    The command line prints the message without a traceback and exits with code 2; Python callers get a `ValueError`.
    """
