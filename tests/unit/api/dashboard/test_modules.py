"""The page's modules that know no page, tested in the language they are written in: *.test.js beside this file, run by node."""

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _node() -> str | None:
    """The machine's, or the one that comes with playwright."""
    if (found := shutil.which("node")) is not None:
        return found
    spec = find_spec("playwright")
    own = Path(spec.origin or "").parent / "driver/node" if spec is not None else None
    return str(own) if own is not None and own.is_file() else None


@pytest.mark.parametrize("path", sorted(HERE.glob("*.test.js")), ids=lambda path: path.name)
def test_modules(path: Path, tmp_path: Path) -> None:
    node = _node()
    if node is None:
        pytest.skip("there is no node to run the page's modules: install nodejs, or the playwright package, which brings one")
    # node takes .js for ES modules only where a package.json beside them says so, which a browser has no use for.
    for folder in ("moa_serve/api/dashboard/page", "tests/unit/api/dashboard"):
        shutil.copytree(HERE.parents[3] / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (tmp_path / "package.json").write_text('{"type": "module"}')
    copy = tmp_path / path.relative_to(HERE.parents[3])
    done = subprocess.run([node, "--test", str(copy)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pass 0" not in done.stdout
