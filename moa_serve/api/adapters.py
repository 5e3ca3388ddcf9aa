"""AdapterRegistry: which adapters can be served now, and leases on them, while they are loaded, replaced and unloaded under traffic.

A folder in the adapters directory is *available*, and read on its first request; an operator can load and unload by name. Reading
happens in worker threads, the self-test is one short request on the engine, and publishing is one step between two turns of the
event loop: a name means a whole adapter or none. A request holds a lease on the Adapter object that it began with, so a reload never
changes it, and unloading waits for it. Everything here belongs to the event loop; worker threads get arguments and give results.
Not for HTTP (admin.py) and not for files (adapter/store.py).
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.importers import Signature, signature_of
from moa_serve.adapter.store import AdapterStore, resolve_below
from moa_serve.api.folders import RETRIED, Found, look
from moa_serve.api.trial import AdapterTrial
from moa_serve.engine.async_engine import AsyncEngine
from moa_serve.errors import (
    AdapterBusy,
    AdapterError,
    AdapterExists,
    AdapterLimit,
    AdapterMemory,
    AdapterNotFound,
    AdapterPathDenied,
    AdapterQuarantined,
    AdapterUnavailable,
    AdapterUnreadable,
    MoaError,
    ModelNotListed,
)
from moa_serve.metrics import Metrics

logger = logging.getLogger(__name__)

UNLOAD_SECONDS = 30.0  # that an unload waits for the requests that use the adapter
ROOM_SECONDS = 30.0  # that an operator's load waits for a place in a full engine, for its self-test
SCAN_EVERY_SECONDS = 1.0  # unknown names cause at most one look at the directory in this time
FIRST_CHECK_SECONDS, CHECK_SECONDS = 2.0, 0.5  # for reading headers at the start, where nobody waits yet, and at a later look (5 ms each)
MAX_LOADS = 2  # folders read at once: what is being read is not yet within the budget of bytes

_PASSING = (AdapterLimit, AdapterMemory, AdapterQuarantined)  # errors that say nothing about the files


@dataclass(frozen=True, slots=True)
class AdapterItem:
    """What is known of one name.

    Args:
        state: available (found, never read), loading, loaded, broken, unloading.
        is_listed: requests are served by this name: it belongs into the list of models.
        revision, variant: of what is loaded; of an available one the variant, where its header tells.
        bytes: host memory that it takes now; 0 where it is not loaded, or left memory until the next request.
        leases: requests that hold it.
        path: relative to the adapters directory.
        error: why it is broken, or cannot be read again.
        is_explicit: an operator loaded it; the others were loaded by their first request.
    """

    name: str
    state: str
    is_listed: bool
    revision: str | None
    variant: str | None
    bytes: int
    leases: int
    path: str
    error: str | None = None
    is_explicit: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class AdapterLease:
    """An adapter that stays in memory and unchanged until `release`, which must be called and may be called twice."""

    name: str
    adapter: Adapter
    _on_release: Callable[[], None]
    _is_released: bool = False

    def release(self) -> None:
        if not self._is_released:
            self._is_released = True
            self._on_release()


@dataclass(eq=False, slots=True)
class _Known:
    """One name: the folder that bears it, what an operator did to it, and what runs on it now. At most one load or unload at a time."""

    name: str
    found: Found | None = None
    load_error: AdapterError | None = None  # of the folder as it is in `found`
    hidden_at: Signature | None = None  # of its files when an operator unloaded it; None is not hidden
    revision: str | None = None  # of the published adapter, with its variant and warnings; it may have left memory
    variant: str | None = None
    warnings: tuple[str, ...] = ()
    is_explicit: bool = False
    failed_at: float = -1e9  # time.monotonic() of the last failure to read it again
    loading: "asyncio.Task[Adapter | None] | None" = None
    unloading: "asyncio.Task[int] | None" = None
    is_operators: bool = False  # `loading` was asked for by an operator, not by a request
    num_leases: int = 0
    is_idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.is_idle.set()

    @property
    def error(self) -> AdapterError | None:
        return self.load_error or (self.found.error if self.found else None)

    @property
    def is_served(self) -> bool:
        """Requests may name it: it is published, or its folder has nothing against it."""
        if self.hidden_at is not None or self.unloading is not None:
            return False
        return self.revision is not None or (self.found is not None and self.error is None)

    @property
    def is_forgotten(self) -> bool:
        return self.found is None and self.revision is None and self.loading is None and self.unloading is None


class AdapterRegistry:
    """
    Args:
        store: with its adapters directory set; without one, nothing can be loaded. From now on the registry's alone.
        metrics: told of every load and unload.
        unload_seconds: that an unload waits for the requests that use the adapter.
    """

    def __init__(
        self, store: AdapterStore, engine: AsyncEngine, *, metrics: Metrics | None = None, unload_seconds: float = UNLOAD_SECONDS
    ) -> None:
        self.store, self.engine, self.metrics, self.unload_seconds = store, engine, metrics, unload_seconds
        self._root = store.adapters_dir.resolve() if store.adapters_dir else None
        self._known: dict[str, _Known] = {}
        self._retired: set[str] = set()  # revisions that no name has any more, but requests still hold
        self._loads = asyncio.Semaphore(MAX_LOADS)
        self._scanning: asyncio.Task[None] | None = None
        self._scanned_at = -1e9
        self._trial = AdapterTrial(engine)

    # -- what there is

    def scan(self) -> None:
        """Look at the adapters directory, in the caller's thread: for the start, before anything is served.

        Raises:
            AdapterLimit, AdapterUnreadable: there are too many folders, or it cannot be listed.
        """
        self._take(look(self.store, {}, check_seconds=FIRST_CHECK_SECONDS), set())
        self._scanned_at = time.monotonic()

    def items(self) -> list[AdapterItem]:
        """Every name that is served, being loaded or unloaded, or broken; not what an operator unloaded."""
        return [self._item(known) for name, known in sorted(self._known.items()) if known.hidden_at is None or known.loading]

    def item(self, name: str) -> AdapterItem:
        """Raises AdapterNotFound."""
        known = self._known.get(name)
        if known is None or (known.hidden_at is not None and not known.loading):
            raise AdapterNotFound(f"adapter {name[:64]!a} is not known; GET /v1/adapters lists all", param="id")
        return self._item(known)

    def _item(self, known: _Known) -> AdapterItem:
        path = os.fspath(self.store.get(known.name).source.path) if known.revision else known.name
        if self._root is not None and os.path.isabs(path):
            path = os.path.relpath(path, self._root)
        variant = known.variant or (known.found.variant if known.found else None)
        return AdapterItem(
            known.name,
            self._state(known),
            known.is_served,
            known.revision,
            variant,
            self.store.cache.bytes_of(known.revision) if known.revision else 0,
            known.num_leases,
            path,
            str(known.error) if known.error else None,
            known.is_explicit,
            known.warnings,
        )

    def _state(self, known: _Known) -> str:
        if known.unloading is not None:
            return "unloading"
        if known.revision is not None:
            return "loaded"
        if known.loading is not None:
            return "loading"
        return "broken" if known.error else "available"

    # -- looking at the directory

    def _take(self, found: Sequence[Found], hidden: Set[str]) -> None:
        """Make the result of a look the truth.

        Args:
            hidden: names that were hidden when the look began; only of these it can say that their files have changed since.
        """
        folders = {folder.name: folder for folder in found}
        for known in list(self._known.values()):
            if known.name not in folders:
                known.found, known.load_error = None, None
                self._forget(known)
        for name, folder in folders.items():
            known = self._known.setdefault(name, _Known(name))
            is_changed = known.found is None or known.found.signature != folder.signature
            if is_changed or isinstance(known.load_error, RETRIED):
                known.load_error = None
            if name in hidden and known.hidden_at != folder.signature:
                known.hidden_at = None
            known.found = folder

    def _forget(self, known: _Known) -> None:
        if known.is_forgotten:
            self._known.pop(known.name, None)

    async def _look_again(self, name: str) -> _Known:
        """The name after a fresh look, of which there is at most one a second.

        Raises:
            ModelNotListed: it is not served, and why.
        """
        if self._scanning is None and time.monotonic() - self._scanned_at >= SCAN_EVERY_SECONDS:
            self._scanning = asyncio.create_task(self._rescan())
        if self._scanning is not None:
            await asyncio.shield(self._scanning)
        known = self._known.get(name)
        if known is not None and known.is_served:
            return known
        shown = name[:64]
        if known is not None and known.error is not None and known.hidden_at is None:
            raise ModelNotListed(f"The model `{shown}` was found but could not be loaded: {known.error}", param="model")
        raise ModelNotListed(f"The model `{shown}` does not exist; GET /v1/models lists what is served", param="model")

    def rescan(self) -> None:
        """Look at the adapters directory again, in a worker thread; what comes of it is taken over in the loop."""
        if self._scanning is None:
            self._scanning = asyncio.get_running_loop().create_task(self._rescan())

    async def _look_now(self) -> None:
        """A look that begins after this call."""
        if self._scanning is not None:
            await asyncio.shield(self._scanning)
        self.rescan()
        assert self._scanning is not None
        await asyncio.shield(self._scanning)

    async def _rescan(self) -> None:
        seen = {name: known.found for name, known in self._known.items() if known.found is not None}
        hidden = {name for name, known in self._known.items() if known.hidden_at is not None}
        try:
            self._take(await asyncio.to_thread(look, self.store, seen, check_seconds=CHECK_SECONDS), hidden)
        except AdapterError as error:  # what is known stays known
            logger.warning("the adapters directory cannot be scanned: %s", error)
        finally:
            self._scanned_at = time.monotonic()
            self._scanning = None

    # -- requests

    async def lease(self, name: str) -> AdapterLease:
        """The adapter of a name, read and tried first where nobody has asked for it before. Release it when the request has ended.

        Raises:
            ModelNotListed: no such name, unloaded by an operator, or found but broken.
            AdapterMemory, Overloaded: no room now. AdapterUnavailable: its files are gone since it left memory.
        """
        while True:  # a turn ends with a load: the adapter may have been evicted again, or unloaded, before this task goes on
            known = self._known.get(name)
            if known is None or not known.is_served:
                known = await self._look_again(name)
            adapter = self.store.cache.acquire(known.revision) if known.revision else None
            if adapter is not None:
                return self._given(known, adapter)
            if known.loading is not None and known.is_operators:
                await asyncio.wait([known.loading])
                continue
            if known.loading is None:
                if known.load_error is not None and time.monotonic() - known.failed_at < SCAN_EVERY_SECONDS:
                    raise self._unavailable(known, known.load_error)
                known.is_operators = False
                known.loading = asyncio.create_task(self._load_for_request(known))
            await asyncio.shield(known.loading)  # the load goes on for others if this request is cancelled

    def _given(self, known: _Known, adapter: Adapter) -> AdapterLease:
        known.num_leases += 1
        known.is_idle.clear()

        def give_back() -> None:
            known.num_leases -= 1
            if known.num_leases == 0:
                known.is_idle.set()
            self.store.cache.release(adapter.revision)
            if adapter.revision in self._retired and not self.store.cache.num_leases(adapter.revision):
                self._retired.discard(adapter.revision)
                self.engine.drop(adapter.revision)

        return AdapterLease(known.name, adapter, give_back)

    async def _load_for_request(self, known: _Known) -> None:
        """The first load of an available adapter, or the reading again of one that left memory. A broken one is remembered, not raised."""
        name, published = known.name, known.revision
        source = self.store.get(name).source if published else AdapterSource(name)

        def settle(adapter: Adapter) -> None:
            if adapter.revision == published:
                self.store.cache.add(adapter)
            elif not known.is_explicit:
                self._publish(known, source, adapter)
            else:  # an operator chose what was there; other content needs an operator again
                raise AdapterUnreadable(f"adapter {name!r}: its files were replaced since it was loaded; load it again with load_inplace")

        try:
            await self._bring(known, source, "evicted" if published else "lazy", settle, room_seconds=0)
            known.load_error = None
        except _PASSING:
            raise
        except AdapterError as error:
            known.failed_at = time.monotonic()
            if published and known.is_explicit:
                known.load_error = error
                raise self._unavailable(known, error) from None
            if published:
                self._withdraw(known)
            known.load_error = error
            logger.warning("adapter %s cannot be loaded: %s", name, error)
        finally:
            known.loading = None
            self._forget(known)

    def _unavailable(self, known: _Known, error: AdapterError) -> AdapterUnavailable:
        return AdapterUnavailable(
            f"adapter {known.name!r} left memory to make room and cannot be read again: {error}; mend its folder, or load it again",
            param="model",
        )

    # -- operators

    async def load(self, name: str, path: str, *, variant: str | None = None, load_inplace: bool = False) -> Adapter:
        """Read, try and publish an adapter, also one that was unloaded before. It goes on if the caller is cancelled.

        Args:
            path: absolute below the adapters directory, or relative to it.
            variant: which one it is, where the files alone cannot tell.
            load_inplace: replace what an operator loaded under this name before; requests in flight keep the old one.
        Raises:
            AdapterExists: an operator loaded the name before. AdapterBusy: it is being loaded or unloaded.
            AdapterError: what is wrong with the adapter; what was served by this name is served on.
        """
        self.store.check_name(name)
        source = AdapterSource(await asyncio.to_thread(self._place, path), variant)
        while (known := self._known.get(name)) is not None and known.loading is not None and not known.is_operators:
            await asyncio.wait([known.loading])  # a request has it read: an explicit load after that is none too many
        if known is not None and (known.loading is not None or known.unloading is not None):
            raise AdapterBusy(f"adapter {name!r} is being {'loaded' if known.loading else 'unloaded'}; try again when that is done")
        if known is not None and known.revision is not None and known.is_explicit and not load_inplace:
            raise AdapterExists(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True.",
                param="name",
            )
        known = known or self._known.setdefault(name, _Known(name))
        known.is_operators = True
        known.loading = asyncio.create_task(self._load(known, source))
        adapter = await asyncio.shield(known.loading)
        assert adapter is not None, "an operator's load gives the adapter or raises"
        return adapter

    def _place(self, path: str) -> Path:
        if self.store.adapters_dir is None:
            raise AdapterPathDenied("the server has no adapters directory; start it with --adapters-dir", param="path")
        return resolve_below(self.store.adapters_dir, path)

    async def _load(self, known: _Known, source: AdapterSource) -> Adapter:
        try:

            def settle(adapter: Adapter) -> None:
                self._publish(known, source, adapter)
                known.is_explicit, known.hidden_at, known.load_error = True, None, None

            return await self._bring(known, source, "explicit", settle, room_seconds=ROOM_SECONDS)
        finally:
            known.loading = None
            self._forget(known)

    async def unload(self, name: str) -> int:
        """Hide a name at once, wait for the requests that use it, and free its memory. It goes on if the caller is cancelled.

        Returns:
            Bytes of host memory that are free now; 0 where another name has the same content.
        Raises:
            AdapterNotFound: it is not served. AdapterBusy: an operator is loading it, or requests still use it; then it is served on.
        """
        known = self._known.get(name)
        if known is not None and known.loading is not None and known.is_operators:
            raise AdapterBusy(f"adapter {name!r} is being loaded; try again when that is done")
        if known is None or not known.is_served:
            raise AdapterNotFound(f"The lora adapter '{name[:64]}' cannot be found.", param="name")
        known.unloading = asyncio.create_task(self._unload(known))
        return await asyncio.shield(known.unloading)

    async def _unload(self, known: _Known) -> int:
        name = known.name
        try:
            if known.loading is not None:
                await asyncio.wait([known.loading])
            try:
                async with asyncio.timeout(self.unload_seconds):
                    await known.is_idle.wait()
            except TimeoutError:
                raise AdapterBusy(
                    f"adapter {name!r}: {known.num_leases} requests still use it after {self.unload_seconds:g} s; it is served on"
                ) from None
            if known.found is None:  # loaded before a look saw its folder; one that saw it later would serve it again
                await self._look_now()
            if known.found is not None and self.store.adapters_dir is not None:
                known.hidden_at = await asyncio.to_thread(signature_of, self.store.adapters_dir / name)
            return self._withdraw(known)
        finally:
            known.unloading = None
            self._forget(known)

    # -- one step between two turns of the loop

    def _publish(self, known: _Known, source: AdapterSource, adapter: Adapter) -> None:
        """Raises AdapterMemory, AdapterTooLarge, AdapterLimit: nothing has changed then."""
        old = known.revision
        if old is None:
            self.store.publish(known.name, source, adapter)
        else:
            self.store.replace(known.name, source, adapter)
        self._retired.discard(adapter.revision)
        self.engine.pardon(adapter.revision)  # loading again is how an operator ends a quarantine
        known.revision, known.variant, known.warnings = adapter.revision, adapter.manifest.variant, adapter.warnings
        if old is not None:
            self._retire(old)
        for warning in adapter.warnings:
            logger.warning("adapter %s: %s", known.name, warning)

    def _withdraw(self, known: _Known) -> int:
        """Take a name's adapter away; the bytes that became free."""
        if known.revision is None:
            return 0
        before, revision = self.store.cache.num_bytes, known.revision
        self.store.remove(known.name)
        known.revision, known.variant, known.warnings, known.is_explicit, known.load_error = None, None, (), False, None
        self._retire(revision)
        if self.metrics is not None:
            self.metrics.adapter_unloaded(known.name)
        return before - self.store.cache.num_bytes

    def _retire(self, revision: str) -> None:
        """A name has this revision no more: unless another has, the engine forgets it with its last request."""
        if self.store.is_named(revision):
            return
        if self.store.cache.num_leases(revision):
            self._retired.add(revision)
        else:
            self.engine.drop(revision)

    # -- reading and trying

    async def _bring(
        self, known: _Known, source: AdapterSource, why: str, settle: Callable[[Adapter], None], *, room_seconds: float
    ) -> Adapter:
        """Read an adapter, try it and `settle` it: all of it or nothing. The metrics hear how long it took and how it ended."""
        started, result, revision = time.monotonic(), "error", None
        try:
            async with self._loads:
                adapter = await asyncio.to_thread(self._read, known.name, source)
                try:
                    adapter = await self._tried(known.name, adapter, room_seconds)
                    settle(adapter)
                except BaseException:
                    self._retire(adapter.revision)
                    raise
            result, revision = "ok", adapter.revision
            return adapter
        except MoaError as error:
            result = error.code
            raise
        finally:
            if self.metrics is not None:
                self.metrics.adapter_loaded(known.name, revision, time.monotonic() - started, why, result)

    def _read(self, name: str, source: AdapterSource) -> Adapter:
        """In a worker thread: read, validate, and lay out for the backend, so that the step that first needs it stays short."""
        adapter = self.store.read(name, source)
        self.engine.warm(adapter)
        return adapter

    async def _tried(self, name: str, adapter: Adapter, room_seconds: float) -> Adapter:
        """The adapter after its self-test; content that is published under any name has passed it before."""
        twin = next((known for known in self._known.values() if known.revision == adapter.revision), None)
        if twin is not None:
            return replace(adapter, warnings=twin.warnings)
        return await self._trial.run(name, adapter, room_seconds=room_seconds)
