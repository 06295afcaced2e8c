"""The command line, with a log of every file that is opened for writing and of every connection to another machine."""

import os
import sys

NOTES = os.open(os.environ["NOTED"], os.O_WRONLY | os.O_APPEND)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
HERE = ("127.", "::1", "localhost")


def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = set("wax+") & set(mode) if mode else flags & WRITING
        is_bytecode = "__pycache__" in str(path)  # Python's own, of modules that are imported late
        if writes and not isinstance(path, int) and not str(path).startswith("/dev/") and not is_bytecode:
            os.write(NOTES, f"wrote {path}\n".encode())
    elif event == "socket.connect":
        address = arguments[1]
        if not str(address[0] if isinstance(address, tuple) else address).startswith(HERE):
            os.write(NOTES, f"called {address}\n".encode())
    elif event == "socket.getaddrinfo" and not str(arguments[0]).startswith(HERE):
        os.write(NOTES, f"asked for {arguments[0]}\n".encode())


if __name__ == "__main__":
    sys.addaudithook(watch)
    from crate_mae.cli import main

    main(sys.argv[1:])
