"""The user's cache folder: folders that are built once, and SHA-256 of files that are not read twice while they stay the same.

`MOA_CACHE_DIR`, else the user's own cache folder. Everything in it can be deleted at any time. On a read-only disk there is no cache
and one warning. Writers are processes, not only threads: files are replaced whole, so a race loses an entry and never breaks one.
"""

import atexit
import functools
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moa_serve import faults
from moa_serve.errors import ModelNotFound

logger = logging.getLogger(__name__)
_DIGESTS = "file-digests.json"
_MARKER = "complete.json"  # written last: a folder without it was not finished
CONVERSION = 1  # of a GGUF file, part of its folder's name: raise it where gguf.py converts the same file differently
_STALE_SECONDS = 24 * 3600  # an unfinished folder older than this belongs to a process that was killed


@contextmanager
def caching_in(folder: Path) -> Iterator[None]:
    """What is cached in here is cached there: what is made up and thrown away at once is nothing for the user's own cache."""
    before = os.environ.get("MOA_CACHE_DIR")
    os.environ["MOA_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MOA_CACHE_DIR"]
        else:
            os.environ["MOA_CACHE_DIR"] = before


def cache_dir() -> Path:
    """Where caches live; it may not exist yet, and it may not be writable."""
    if own := os.environ.get("MOA_CACHE_DIR"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moa_serve"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex. Remembered by (path, size, mtime): hashing takes longer than loading."""
    path = path.resolve()  # the hub's snapshots are links to blobs
    stat = path.stat()
    known = _read_digests().get(str(path))
    if isinstance(known, list) and known[:2] == [stat.st_size, stat.st_mtime_ns]:
        return str(known[2])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _remember(path, [stat.st_size, stat.st_mtime_ns, digest])
    return digest


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `bases/name` of the cache, made by `build(folder)` where it is not there whole.

    It is built under another name and renamed, so nobody meets half of it, and of two processes that build at once both succeed.
    Where the cache cannot be written, the folder lives as long as this process.

    Raises:
        ModelNotFound: the disk is full, or fails.
    """
    if (there := built(name)) is not None:
        return there
    folder = _bases() / name
    scratch = _unfinished(folder)
    try:
        build(scratch)
        _write_marker(scratch)
        return _publish(scratch, folder) if scratch.parent == folder.parent else scratch
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise ModelNotFound(f"{folder}: cannot be made ({error}); free some space, or set MOA_CACHE_DIR to another disk") from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def built(name: str) -> Path | None:
    """The folder that `build_once` made under this name; None where it is not there whole."""
    folder = _bases() / name
    return folder if _is_whole(folder) else None


def _bases() -> Path:
    return cache_dir() / "bases"


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` in one step: a reader sees the old content or the new, never a part. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(6)}")  # not mkstemp's: its files cannot be read by other users
    try:
        if faults.active:
            faults.active.strike("write", name=path.name)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@functools.cache
def warn_read_only(folder: Path, reason: str) -> None:
    """Once for each folder and reason: what is not cached is computed again, which only takes longer."""
    logger.warning("nothing is cached: %s cannot be written (%s); set MOA_CACHE_DIR to a folder that can", folder, reason)


def _is_whole(folder: Path) -> bool:
    """Whether every file has the size that the marker says: cheap enough for each start; SHA-256 is there for a doubt by hand."""
    try:
        files = json.loads((folder / _MARKER).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write_marker(folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            files[path.name] = {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    write_atomically(folder / _MARKER, json.dumps({"files": files}, indent=1))


def _unfinished(folder: Path) -> Path:
    """An empty folder beside `folder`, so that a rename is enough; in the system's temporary folder on a read-only disk."""
    scratch = folder.with_name(f".{folder.name}-{secrets.token_hex(6)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for old in folder.parent.glob(f".{folder.name}-*"):
            if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        scratch.mkdir()
    except OSError as error:
        warn_read_only(cache_dir(), error.strerror or "error")
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch


def _publish(scratch: Path, folder: Path) -> Path:
    """Rename `scratch` to `folder`; what another process put there first is kept if it is whole, else moved out of the way."""
    for _ in range(3):  # more often only if others keep breaking it
        try:
            scratch.rename(folder)
            return folder
        except OSError:
            if not folder.exists():
                raise
        if _is_whole(folder):
            break
        broken = folder.with_name(f".{folder.name}-{secrets.token_hex(6)}")
        folder.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _read_digests() -> dict[str, Any]:
    try:
        entries = json.loads((cache_dir() / _DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or not ours: it is only a cache
        return {}
    return entries if isinstance(entries, dict) else {}


def _remember(path: Path, entry: list[Any]) -> None:
    entries = {name: value for name, value in _read_digests().items() if os.path.exists(name)}
    entries[str(path)] = entry
    try:
        write_atomically(cache_dir() / _DIGESTS, json.dumps(entries))
    except OSError as error:
        warn_read_only(cache_dir(), error.strerror or "error")
