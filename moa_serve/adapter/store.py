"""AdapterStore: which adapter a name means, and leases on it.

A name is published only after its adapter was read, validated and (by the caller) tried on the engine, so a broken one is never
served. Files are read by importers/, memory is cache.py's. State is owned by the caller's thread (the event loop, or LLM): no
locks; only `read` may run in a loader thread, for it changes nothing.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.cache import AdapterCache
from moa_serve.adapter.counts import EvictionReason
from moa_serve.adapter.importers import MAX_FILE_BYTES, Signature, has_config, read_adapter, read_manifest, signature_of
from moa_serve.config import ModelConfig
from moa_serve.errors import (
    AdapterChanging,
    AdapterError,
    AdapterExists,
    AdapterLimit,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterPathDenied,
    AdapterUnreadable,
)

__all__ = ["Adapter", "AdapterEntry", "AdapterSource", "AdapterStore", "resolve_below"]

RESERVED_NAMES = {"other": "what metrics call the rest", "events": "a route of the API"}
JUST_WRITTEN_SECONDS, LOOK_AGAIN_SECONDS = 2.0, 0.2  # by the clock of the file system, and what a copy's next piece takes at most
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One published name."""

    name: str
    source: AdapterSource
    revision: str


def resolve_below(root: Path, path: str | os.PathLike[str]) -> Path:
    """An absolute path, or one relative to `root`, that stays below `root` and passes through no link.

    Raises:
        AdapterPathDenied: it does not; the message does not say what is there.
    """
    text = os.fspath(path)
    denied = AdapterPathDenied(
        f"{text[:200]!a}: adapters are loaded from folders below the adapters directory only, without links", param="path"
    )
    if not text or "\0" in text or "://" in text or "$" in text or text.startswith("~") or ".." in Path(text).parts:
        raise denied
    top = root.resolve()
    for base in (root.absolute(), top):
        if (base / text).is_relative_to(base):
            relative = (base / text).relative_to(base)
            break
    else:
        raise denied
    place = top / relative
    try:
        has_link = any(part.is_symlink() for part in (place, *place.parents) if part.is_relative_to(top))
        stays = place != top and place.resolve().is_relative_to(top)
    except OSError:  # a name that the file system does not take
        raise denied from None
    if has_link or not stays:
        raise denied
    return place


def _is_being_written(folder: str | os.PathLike[str], before: Signature) -> bool:
    """Whether a folder, of which something was written just now, differs from `before`, also after a moment for the next piece to come."""
    newest = max((modified for _, _, modified, _ in before), default=0) / 1e9
    if signature_of(folder) == before and abs(time.time() - newest) < JUST_WRITTEN_SECONDS:
        time.sleep(LOOK_AGAIN_SECONDS)
    return signature_of(folder) != before


def _changing() -> AdapterChanging:
    return AdapterChanging("its files are being written; load it again when the copy is whole")


class AdapterStore:
    """Names and their adapters for one base.

    Args:
        base_name: the served name of the base, which no adapter may have.
        base_digest: of the base's weights; adapters made for other weights get a warning.
        adapters_dir: where set, every source lies below it; relative sources start there.
        max_bytes: of host memory for adapters; the least recently used idle ones leave first and are read again when asked for.
        isolate: files come from others: unpickle in a child process, and tell a broken folder from one that is still being copied.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        base_name: str,
        base_digest: str | None = None,
        adapters_dir: str | os.PathLike[str] | None = None,
        max_bytes: int = 8 * 2**30,
        max_adapters: int = 10_000,
        max_file_bytes: int = MAX_FILE_BYTES,
        isolate: bool = False,
    ) -> None:
        self.config = config
        self.base_name = base_name
        self.base_digest = base_digest
        self.adapters_dir = None if adapters_dir is None else Path(adapters_dir)
        self.max_adapters = max_adapters
        self.max_file_bytes = max_file_bytes
        self.isolate = isolate
        self.cache = AdapterCache(max_bytes)
        self._entries: dict[str, AdapterEntry] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return sorted(self._entries)

    def get(self, name: str) -> AdapterEntry:
        """Raises AdapterNotFound."""
        if name not in self._entries:
            raise AdapterNotFound(f"adapter {name[:64]!a} is not loaded")
        return self._entries[name]

    def scan(self) -> list[str]:
        """Names of the adapters that lie in `adapters_dir`, read or not; folders without a config file and links are none.

        Raises:
            AdapterLimit: there are more than `max_adapters`.
            AdapterUnreadable: the directory cannot be listed.
        """
        if self.adapters_dir is None:
            return []
        try:
            with os.scandir(self.adapters_dir) as entries:
                names = [entry.name for entry in entries if self._is_adapter(entry)]
        except OSError as error:
            raise AdapterUnreadable(f"{self.adapters_dir}: cannot be listed ({error.strerror})") from None
        if len(names) > self.max_adapters:
            raise AdapterLimit(
                f"{self.adapters_dir}: holds {len(names):,} adapters, but at most {self.max_adapters:,} are served; raise the limit"
            )
        return sorted(names)

    def _is_adapter(self, entry: os.DirEntry[str]) -> bool:
        if entry.name == self.base_name or entry.name in RESERVED_NAMES or not _NAME.fullmatch(entry.name):
            return False
        return entry.is_dir(follow_symlinks=False) and has_config(entry.path)

    def check_name(self, name: object) -> None:
        """Raises AdapterNameInvalid for what cannot be an adapter's name here."""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            shown = f"{name[:80]!a}" if isinstance(name, str) else f"of type {type(name).__name__}"
            raise AdapterNameInvalid(
                f"adapter name {shown} is not valid; use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit",
                param="name",
            )
        if name in RESERVED_NAMES:
            raise AdapterNameInvalid(f"adapter name {name!r} is {RESERVED_NAMES[name]}; choose another", param="name")
        if name == self.base_name:
            raise AdapterNameInvalid(f"adapter name {name!r} is the base's; choose another", param="name")

    def read(self, name: str, source: AdapterSource) -> Adapter:
        """Read and validate; publishes nothing, so that the caller can try the adapter first. Safe in a loader thread."""
        self.check_name(name)
        source = self._resolved(source)
        before = signature_of(source.path)
        try:
            adapter = read_adapter(
                source, self.config, base_digest=self.base_digest, isolate=self.isolate, max_file_bytes=self.max_file_bytes
            )
            if signature_of(source.path) != before:  # its config may be of one version, and its weights of another
                raise _changing()
            return adapter
        except AdapterError as error:
            is_copied = self.isolate and not isinstance(error, AdapterChanging) and _is_being_written(source.path, before)
            raise self._told(name, _changing() if is_copied else error) from None

    def check_header(self, name: str, source: AdapterSource) -> str | None:
        """Whether config and tensor header fit the base: milliseconds, where `read` reads every value. Safe in a loader thread.

        Returns:
            The variant; None where the weights are a pickle, which only `read` can judge.
        Raises:
            AdapterError: as `read`.
        """
        source = self._resolved(source)
        try:
            manifest = read_manifest(source, self.config, max_file_bytes=self.max_file_bytes)
            return None if manifest is None else manifest.variant
        except AdapterError as error:
            raise self._told(name, error) from None

    def _resolved(self, source: AdapterSource) -> AdapterSource:
        return source if self.adapters_dir is None else AdapterSource(resolve_below(self.adapters_dir, source.path), source.variant)

    def _told(self, name: str, error: AdapterError) -> AdapterError:
        """The error with the adapter's name, and without where the adapters directory is: clients read it."""
        message = str(error)
        if self.adapters_dir is not None:
            message = message.replace(f"{self.adapters_dir.resolve()}{os.sep}", "")
        return type(error)(f"adapter {name!r}: {message}", param=error.param, problems=error.problems)

    def publish(self, name: str, source: AdapterSource, adapter: Adapter) -> None:
        """Give a name to an adapter that `read` returned.

        Raises:
            AdapterNameInvalid, AdapterExists, AdapterLimit, AdapterMemory, AdapterTooLarge: nothing has changed then.
        """
        self._check_free(name)
        self.cache.add(adapter)
        self._entries[name] = AdapterEntry(name, source, adapter.revision)

    def restore(self, name: str, source: AdapterSource, revision: str) -> None:
        """Publish a name whose adapter is read when it is asked for: what was published before the process ended.

        Raises:
            AdapterNameInvalid, AdapterExists, AdapterLimit.
        """
        self._check_free(name)
        self._entries[name] = AdapterEntry(name, source, revision)

    def replace(self, name: str, source: AdapterSource, adapter: Adapter) -> None:
        """Give a published name to another adapter that `read` returned, in one step. Leases on the old one go on.

        Raises:
            AdapterNotFound, AdapterMemory, AdapterTooLarge: nothing has changed then.
        """
        old = self.get(name)
        self.cache.add(adapter)
        self._entries[name] = AdapterEntry(name, source, adapter.revision)
        self._discard(old.revision, "replaced")

    def remove(self, name: str) -> None:
        """Forget a name. Leases go on; the memory is freed with the last of them, unless another name has the same revision."""
        entry = self.get(name)
        del self._entries[name]
        self._discard(entry.revision, "unloaded")

    def _check_free(self, name: str) -> None:
        self.check_name(name)
        if name in self._entries:
            raise AdapterExists(f"adapter {name!r} is loaded already; unload it first", param="name")
        if len(self._entries) >= self.max_adapters:
            raise AdapterLimit(f"{self.max_adapters:,} adapters are loaded, which is the limit; unload one or raise it")

    def is_named(self, revision: str) -> bool:
        """Whether any name has this revision."""
        return any(entry.revision == revision for entry in self._entries.values())

    def _discard(self, revision: str, reason: EvictionReason) -> None:
        if not self.is_named(revision):
            self.cache.discard(revision, reason)

    @contextmanager
    def lease(self, name: str) -> Iterator[Adapter]:
        """The adapter of a name, which stays in memory and unchanged inside the block; an evicted one is read again.

        Raises:
            AdapterNotFound: the name is not published.
            AdapterUnreadable: the files now hold another adapter than the published one.
            AdapterMemory: it was evicted, and all others are in use.
        """
        entry = self.get(name)
        adapter = self.cache.acquire(entry.revision)
        if adapter is None:
            adapter = self._read_again(entry)
            self.cache.add(adapter)
            self.cache.acquire(entry.revision, is_counted=False)
        try:
            yield adapter
        finally:
            self.cache.release(entry.revision)

    def _read_again(self, entry: AdapterEntry) -> Adapter:
        adapter = self.read(entry.name, entry.source)
        if adapter.revision != entry.revision:
            raise AdapterUnreadable(
                f"adapter {entry.name!r}: its files were replaced since it was loaded (revision {adapter.revision[:8]} instead of "
                f"{entry.revision[:8]}); unload it and load it again"
            )
        return adapter
