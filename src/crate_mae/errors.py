"""The exceptions of ours: what the user can mend, and how a run may end early."""


class UserError(ValueError):
    """A mistake in what the user gave: what is wrong, where, and how to mend it, in one to four lines.

    The command line prints the message without a traceback and exits with code 2; Python callers get a `ValueError`.
    """


class DivergedError(UserError):
    """A run whose loss or gradients did not stay finite."""


class RunStopped(Exception):  # noqa: N818  # it is no error: the run did what it was told
    """A run was told to stop, and has saved.

    Attributes:
        signal: the number of the signal that told it so.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal
