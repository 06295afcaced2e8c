"""`crate-mae app`: a web app to hide parts of a picture, see it completed, and look inside the model."""

from importlib.util import find_spec
from typing import Annotated

from cyclopts import Parameter

from crate_mae.errors import UserError, install_command
from crate_mae.terminal import open_console

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def app(
    models: Annotated[tuple[str, ...], Parameter(negative=())] = ("crate_mae_micro_monotone_cifar10",),
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Start a web app: choose a picture, hide most of it, see it completed, and look at what each layer did.

    Everything is computed on the CPU. Pictures stay in the visitor's browser: the server holds them in memory while it
    responds, and writes none to a disk. Nothing is loaded from, or sent to, another machine. Ctrl-C stops it.

    Args:
        models: Models to choose from, each in any form that `crate-mae reconstruct` takes; the second, if given, is
            displayed next to the first.
        host: Name or address to listen on. By default, only this machine can open the app. With 0.0.0.0, all
            machines that can reach this one can open it at its IP address. To open it by host name, give that name.
        port: Port to listen on; 0 for any free one.

    Raises:
        UserError: if a model does not exist, the port is taken, or Gradio is not installed.
    """
    if not models:
        raise UserError("Give at least one model, or leave the argument out for the model in the package.")
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}, but must be from 0 to 65535.")
    if find_spec("gradio") is None:
        raise UserError(f"The app needs Gradio, which is not installed: {install_command('app')}")
    from crate_mae.app.compute import open_models
    from crate_mae.app.server import build_server, listen

    console = open_console()
    with listen(host, port) as listening:
        with console.status("Starting the app"):
            server = build_server(open_models(models), host)
        url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        console.print_text(f"The app is at {url}  (Ctrl-C stops it)")
        if host not in _LOOPBACK:
            console.print_text("Everyone who can reach this machine can use it.")
        server.run(sockets=[listening])
