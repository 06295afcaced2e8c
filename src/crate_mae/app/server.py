"""The web server of the app."""

import socket
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from crate_mae.app.handlers import FORGED, Handlers
from crate_mae.app.limits import MOST_CONNECTIONS, LargeRequests, RequestLimits
from crate_mae.app.models import AppModel
from crate_mae.app.page import build_page, static_text
from crate_mae.errors import UserError

_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # fonts of the visitor's machine


def build_server(models: dict[str, AppModel], host: str = "127.0.0.1") -> uvicorn.Server:
    """Build the server of the app; call `run(sockets=[...])` of it.

    Args:
        models: the models to choose from, by name.
        host: the name or address that it will listen on.
    """
    theme = gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=("monospace",))
    large = LargeRequests()
    handlers = Handlers(models, answered=large.answered)
    blocks = build_page(handlers)

    def mistake(call: Any) -> str | None:
        if found := handlers.mistake(call):
            return found
        is_known = call["fn_index"] in blocks.fns and call.get("trigger_id") in (None, *blocks.blocks)
        return None if is_known else FORGED

    page = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        "/",
        theme=theme,
        css=static_text("page.css"),
        js=static_text("light.js"),
        footer_links=[],
        run_history=False,  # which would store pictures
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    application: Any = RequestLimits(page, mistake, large, host)
    # Every open browser tab keeps a connection open; shutting down does not wait for them.
    return uvicorn.Server(
        uvicorn.Config(
            application, log_level="warning", timeout_graceful_shutdown=1, limit_concurrency=MOST_CONNECTIONS
        )
    )


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens.

    Args:
        host: name or address of this machine.
        port: number of the port; 0 for any free one.

    Raises:
        UserError: if the address does not belong to this machine, or the port cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} is not an address of this machine: leave it out, or use 0.0.0.0 for all."
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
