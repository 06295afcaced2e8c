"""Exceptions of the library, and the phrases that error messages share."""

import difflib
import json
import shlex
from collections.abc import Iterable, Sequence
from importlib import metadata
from urllib.parse import urlparse

_LIBRARY = "crate-mae"


class UserError(ValueError):
    """A mistake in the user's input: what is wrong, where, and how to fix it, in one to four lines.

    The command line prints the message without a traceback and exits with code 2; Python callers get a `ValueError`.
    """


class DivergedError(UserError):
    """A run whose loss or gradients did not stay finite."""


class RunStopped(Exception):  # noqa: N818  # not an error: the run did what it was asked to do
    """A run that was asked to stop, and has saved.

    Attributes:
        signal: number of the signal that asked for it.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def install_command(extra: str = "", *, public: bool = False) -> str:
    """The command that installs this library from where it is: its repository, or the folder it was installed from.

    Only a library that came from a package index is installed from there.

    Args:
        extra: name of an extra to install with it.
        public: whether the command is for others, who have no such folder.
    """
    from urllib.request import url2pathname  # which imports HTTP and SSL

    own = metadata.distribution(_LIBRARY)
    addresses = dict(each.split(", ", 1) for each in own.metadata.get_all("Project-URL") or [])
    origin = json.loads(own.read_text("direct_url.json") or "{}").get("url", "")
    with_extra = f"[{extra}]" if extra else ""
    if "Repository" in addresses:
        return f"pip install '{_LIBRARY}{with_extra} @ git+{addresses['Repository']}'"
    if not origin:
        return f"pip install {shlex.quote(_LIBRARY + with_extra)}"
    if public:
        return "pip install ."
    folder = url2pathname(urlparse(origin).path) if origin.startswith("file:") else origin
    return f"pip install {shlex.quote(folder + with_extra)}"


def installed_version(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def not_a_repository(name: str, prefix: str = "") -> UserError:
    """The error that a name cannot be that of a repository on the Hugging Face Hub, written with `prefix`."""
    return UserError(f"{prefix}{name} is not the name of a Hub repository: it must look like {prefix}user/name.")


def and_more(items: Sequence[str], most: int = 10, separator: str = ", ") -> str:
    """The first `most` items in one line, and how many more there are: "a, b and 3 more"."""
    return separator.join(items[:most]) + (f" and {len(items) - most:,} more" if len(items) > most else "")


def nearest(name: str, known: Iterable[str], similarity: float) -> str | None:
    """The known name that is most similar to `name` without regard to case; None if all are too different."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=similarity)
    return by_lower[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str], template: str = "{}", similarity: float = 0.6) -> str:
    """The words " Did you mean NAME?" to append to a sentence; empty if no known name is similar.

    `template` is how the user has to write a name, such as "timm:{}"; `similarity`, from 0 to 1, is that required.
    """
    near = nearest(name, known, similarity)
    return suggestion(near and template.format(near))


def suggestion(name: str | None) -> str:
    """The words " Did you mean NAME?"; empty for None."""
    return f" Did you mean {name}?" if name else ""
