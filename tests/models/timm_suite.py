"""Run timm's own tests of its models on ours.

    pip download --no-binary :all: --no-deps timm==$(python -c "import timm; print(timm.__version__)")
    tar xzf timm-*.tar.gz
    python tests/models/timm_suite.py timm-*/tests "crate_mae_*"

timm's tests come with its source distribution alone. This fetches nothing, and copies `test_models.py` to a temporary
folder with our names in place of timm's. Those of its tests run that concern every Vision Transformer.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

_HEAD = """
import crate_mae as _crate_mae
from timm import list_models as _timm_list_models
def list_models(*args, **kwargs):
    ours = set(_timm_list_models(PATTERNS))
    return [name for name in _timm_list_models(*args, **kwargs) if name.partition(".")[0] in ours]
def list_pretrained(filter=""):
    return list_models(filter, pretrained=True)
"""


def with_our_names(source: str, patterns: list[str]) -> str:
    """timm's `test_models.py`, about our models instead of timm's."""
    head = _HEAD.replace("PATTERNS", repr(patterns))
    source, found = re.subn(
        r"^from timm import list_models.*$", lambda line: line[0] + head, source, flags=re.MULTILINE
    )
    assert found == 1
    for title, ours in (("FEAT_INTER_FILTERS", "timm_models"), ("NON_STD_FILTERS", "*_mae_*")):
        source, found = re.subn(rf"^{title} = \[", f"{title} = [{ours!r},", source, flags=re.MULTILINE)
        assert found == 1, title
    return source


def run(tests: Path, patterns: list[str]) -> subprocess.CompletedProcess:
    """Run the tests in a process of their own."""
    source = (tests / "test_models.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "test_models.py"
        file.write_text(with_our_names(source, patterns), encoding="utf-8")
        options = ["-q", "-k", "_mae_", "-p", "no:cacheprovider", "-p", "no:warnings", "-c", "/dev/null", "-rs"]
        command = [sys.executable, "-m", "pytest", *options, "--rootdir", folder, str(file)]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder)


if __name__ == "__main__":
    result = run(Path(sys.argv[1]), sys.argv[2:] or ["crate_mae_*"])
    print(result.stdout, result.stderr)  # noqa: T201
    sys.exit(result.returncode)
