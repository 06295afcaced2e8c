"""From models to a server that listens."""

import socket
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from crate_mae.app.gate import Gate
from crate_mae.app.page import build_page
from crate_mae.app.shown_models import ShownModel
from crate_mae.app.widgets import static_text
from crate_mae.errors import UserError

_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # of the visitor's own machine


def build_server(models: dict[str, ShownModel]) -> uvicorn.Server:
    """A server of the page, to be run on a socket.

    Args:
        models: those that can be chosen, by name.
    """
    theme = gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=("monospace",))
    page = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        build_page(models),
        "/",
        theme=theme,
        css=static_text("page.css"),
        js=static_text("light.js"),
        footer_links=[],
        run_history=False,  # of which pictures would be a part
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    application: Any = Gate(page)
    # Whoever has the page open has a connection open, for which the end does not wait.
    return uvicorn.Server(uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: name or address of this machine.
        port: 0 takes any that is free.

    Raises:
        UserError: if it cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} is no address of this machine: leave it out, or say 0.0.0.0 for all."
        ) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"Cannot listen on port {port} of {host}: {reason}. Choose another with --port.") from error
    return listening
