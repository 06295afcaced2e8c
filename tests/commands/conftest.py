import pytest

from crate_mae.cli import main


@pytest.fixture
def crate_mae_command(capsys):
    """Run the command line in this process: exit code, standard output, standard error."""

    def run(*tokens):
        code = 0
        try:
            main([str(token) for token in tokens])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
