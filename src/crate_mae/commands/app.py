"""`crate-mae app`: a page on which anybody can hide parts of a picture, and look inside."""

from importlib.util import find_spec
from typing import Annotated

from cyclopts import Parameter

from crate_mae.errors import UserError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def app(
    models: Annotated[tuple[str, ...], Parameter(negative=())] = ("crate_mae_micro_cifar10",),
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Open a page to play with: choose a picture, hide most of it, see it completed, and look at what each layer did.

    Everything is computed on the CPU. Pictures are kept in the visitor's browser: the server has them in memory while
    it answers, and writes none to a disk. Nothing is loaded from, or sent to, another machine. Ctrl-C ends it.

    Args:
        models: Models to choose from, each in any form that `crate-mae reconstruct` takes; the second, if there is one,
            is shown next to the first.
        host: Address to listen on. By default only this machine can open the page; 0.0.0.0 is for every machine that
            can reach this one.
        port: Port to listen on; 0 takes any that is free.

    Raises:
        UserError: if there is no such model, the port is taken, or Gradio is not installed.
    """
    if not models:
        raise UserError("Name a model, or none for the one in the package.")
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}, but must be from 0 to 65535.")
    if find_spec("gradio") is None:
        raise UserError("The page needs Gradio, which is not installed: pip install 'crate-mae[app]'")
    from rich.console import Console

    from crate_mae.app.server import build_server, listen
    from crate_mae.app.shown_models import open_models

    console = Console(highlight=False)
    with listen(host, port) as listening:
        with console.status("Preparing the page"):
            server = build_server(open_models(models))
        url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        console.print(f"The page is at {url}  (Ctrl-C ends it)", soft_wrap=True, markup=False)
        if host not in _LOOPBACK:
            console.print("Everybody who can reach this machine can use it.")
        server.run(sockets=[listening])
