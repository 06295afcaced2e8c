"""The command `app`: its mistakes. The app itself is tested in tests/app."""

import importlib
import socket

import pytest

from crate_mae.errors import install_command

command = importlib.import_module("crate_mae.commands.app")


def test_without_gradio_the_install_line_is_named(crate_mae_command, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, _, error = crate_mae_command("app")
    assert code == 2
    assert install_command("app") in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere"], "does not exist"),
        (["--port", "70000"], "from 0 to 65535"),
        (["--host", "no.such.host.invalid"], "not an address of this machine"),
        (["--host", "192.0.2.1"], "Cannot listen"),
    ],
)
def test_a_mistake_is_explained(options, words, crate_mae_command):
    pytest.importorskip("gradio", reason="the app needs Gradio: pip install '.[app]'")
    code, _, error = crate_mae_command("app", *options)
    assert code == 2
    assert words in error
    assert "Traceback" not in error


def test_a_port_that_is_taken_is_named(crate_mae_command):
    pytest.importorskip("gradio", reason="the app needs Gradio: pip install '.[app]'")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, error = crate_mae_command("app", "--port", port)
    assert code == 2
    assert f"port {port} of 127.0.0.1" in error
    assert "--port" in error
