"""Adapters that were packed before, by revision: files of the cache folder, mapped into memory, so that a swap is a pointer.

An adapter is packed once for a base, a dtype and a layout (the stamp of the library's sources, and whether there are tiles). Its pages
belong to the system's file cache: hundreds can be known while few take memory. Without a folder to write to, the last few stay in memory
instead. Safe in any thread.
"""

import ctypes
import hashlib
import json
import logging
import mmap
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from moa_serve import faults
from moa_serve.adapter.manifest import Manifest
from moa_serve.model.batch import TracedRouter
from moa_serve.model.cache import cache_dir, warn_read_only
from moa_serve.native.compile import stamp
from moa_serve.native.program import NativeAdapter

logger = logging.getLogger(__name__)

_libc = ctypes.CDLL(None)
_MAGIC = b"moa_serve packed adapter 1\n"
_PAGE = 4096
_MEMORY_BYTES = 2**29  # of adapters that are kept where nothing can be written
_DISK_BYTES = 4 * 2**30  # of all files; those that were not used for longest leave first
_UNFINISHED_SECONDS = 24 * 3600  # after which a file that is still being written was left behind


@cache
def _layout() -> str:
    """Digest of the code that decides what a packed adapter looks like, in C++ and in Python: a mended layout is packed anew."""
    digest = hashlib.sha256(stamp().encode())
    here = Path(__file__).resolve().parent
    for file in sorted((*here.glob("*.py"), *(here.parent / "model").glob("*.py"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


class PackedAdapters:
    """
    Args:
        base_digest: of the base's weights, on which a prompt's keys and values depend; None where there is none: then nothing is written.
        dtype, has_tiles: of the packed matrices, as `compile_adapter` has them.
    """

    def __init__(self, base_digest: str | None, dtype: torch.dtype, *, has_tiles: bool = False) -> None:
        self._mapped: dict[str, NativeAdapter] = {}
        self._in_memory: OrderedDict[str, NativeAdapter] = OrderedDict()  # that could not be written
        self._lock = threading.Lock()
        self._is_kept = base_digest is not None
        key = f"{base_digest} {dtype} {_layout()}{' tiles' if has_tiles else ''}"
        self._folder = cache_dir() / "packed" / hashlib.sha256(key.encode()).hexdigest()[:32]

    def get(self, revision: str, manifest: Manifest, pack: Callable[[], NativeAdapter]) -> NativeAdapter:
        """The packed adapter of a revision; `pack` makes it where it was never packed."""
        with self._lock:
            if revision in self._in_memory:
                self._in_memory.move_to_end(revision)
            known = self._mapped.get(revision) or self._in_memory.get(revision)
        if known is not None:
            return known
        file = self._folder / f"{revision}.packed"
        mapped = _read(file, revision, manifest) if self._is_kept else None
        found = mapped or pack()
        if mapped is None and self._is_kept and self._write(file, revision, found):
            mapped = _read(file, revision, manifest)
        with self._lock:
            if mapped is not None:
                self._mapped[revision] = mapped
                return mapped
            self._in_memory[revision] = found
            while len(self._in_memory) > 1 and sum(len(kept.blob) for kept in self._in_memory.values()) > _MEMORY_BYTES:
                self._in_memory.popitem(last=False)
        return found

    def forget(self, revision: str) -> None:
        """The revision is gone for good: unmap it. Its file stays until others need the room."""
        with self._lock:
            self._mapped.pop(revision, None)
            self._in_memory.pop(revision, None)

    def cool(self, revision: str) -> None:
        """The revision left host memory: so do its mapped pages, which come back from the file when they are read. Any thread, any time."""
        with self._lock:
            mapped = self._mapped.get(revision)
            self._in_memory.pop(revision, None)
        if mapped is not None:
            _libc.madvise(ctypes.c_void_p(mapped.blob.data_ptr()), ctypes.c_size_t(len(mapped.blob)), mmap.MADV_DONTNEED)

    def _write(self, file: Path, revision: str, adapter: NativeAdapter) -> bool:
        blob = adapter.blob.numpy().tobytes()
        head = {
            "revision": revision,
            "bytes": len(blob),
            "sha256": hashlib.sha256(blob).hexdigest(),
            "trace_width": adapter.trace_width,
            "traced": [asdict(router) for router in adapter.traced],
        }
        text = _MAGIC + json.dumps(head).encode() + b"\n"
        unfinished = file.with_name(f".{file.name}-{secrets.token_hex(6)}")
        try:
            if faults.active:
                faults.active.strike("write", name=file.name)
            file.parent.mkdir(parents=True, exist_ok=True)
            _make_room(self._folder.parent, _DISK_BYTES - len(blob))
            with unfinished.open("wb") as out:
                out.write(text.ljust(-(-len(text) // _PAGE) * _PAGE, b"\0"))
                out.write(blob)
            unfinished.replace(file)
        except OSError as error:
            warn_read_only(cache_dir(), error.strerror or "error")
            return False
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        return True


def _read(file: Path, revision: str, manifest: Manifest) -> NativeAdapter | None:
    """The adapter that `file` holds, mapped; None where there is none, or not the whole of it."""
    try:
        whole = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)  # holds no file open
        raw = whole.numpy().data
        if bytes(raw[: len(_MAGIC)]) != _MAGIC:
            raise ValueError("no head")
        end = bytes(raw[: 2**20]).index(b"\n", len(_MAGIC))
        head = json.loads(bytes(raw[len(_MAGIC) : end]))
        begin = -(-(end + 1) // _PAGE) * _PAGE
        if head["revision"] != revision or len(raw) - begin != head["bytes"] or hashlib.sha256(raw[begin:]).hexdigest() != head["sha256"]:
            raise ValueError("not what its head says")
        traced = tuple(TracedRouter(**router) for router in head["traced"])
        with suppress(OSError):
            os.utime(file)  # used now: it leaves last
        return NativeAdapter(manifest, whole[begin:], traced, int(head["trace_width"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError) as error:  # torch's, where the file cannot be opened or mapped
        logger.warning("%s cannot be read (%s); the adapter is packed again", file, error)
        return None
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is broken (%s) and made again", file, error)
        return None


def _make_room(folder: Path, most_bytes: int) -> None:
    """Delete what was not used for longest until the files below `folder` take at most `most_bytes`. Who has mapped one keeps it.

    Other processes may do the same, so a file can be gone at any time.
    """
    files = []
    for path in folder.glob("*/*"):
        with suppress(OSError):
            found = path.stat()
            if path.suffix == ".packed":
                files.append((found.st_mtime, found.st_size, path))
            elif found.st_mtime < time.time() - _UNFINISHED_SECONDS:
                path.unlink()
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most_bytes:
            return
        with suppress(OSError):
            path.unlink(missing_ok=True)
            total -= size
