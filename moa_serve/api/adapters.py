"""AdapterRegistry: which adapters can be served now, and leases on them, while they are loaded, replaced and unloaded under traffic.

A folder in the adapters directory is *available*, and read on its first request; an operator can load, unload and pin by name, and give
aliases. Reading happens in worker threads, the self-test is one short request on the engine, and publishing is one step between two turns
of the event loop: a name means a whole adapter or none. A request holds a lease on the Adapter object that it began with, so a reload
never changes it, and unloading waits for it. What an operator did is in the state directory before he is told that it is done. Everything
here belongs to the event loop; worker threads get arguments and give results. Not for HTTP (admin.py) and not for files (adapter/).
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.importers import Signature, signature_of
from moa_serve.adapter.state import Registered, RegistryState, StateDirectory
from moa_serve.adapter.store import AdapterStore, resolve_below
from moa_serve.api.adapter_events import AdapterEvents
from moa_serve.api.aliases import AliasItem, check_targets, choose, split_target
from moa_serve.api.entries import AdapterItem, AdapterLease, Known, OldRevision
from moa_serve.api.folders import RETRIED, Found, look, wait_until_steady
from moa_serve.api.looks import Looks
from moa_serve.api.revisions import Revisions
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
    AliasInvalid,
    AliasNotFound,
    MoaError,
    ModelNotListed,
    RegistryWriteFailed,
    RevisionConflict,
    RevisionNotFound,
)
from moa_serve.metrics import Metrics

__all__ = ["AdapterItem", "AdapterLease", "AdapterRegistry", "AliasItem", "OldRevision"]

logger = logging.getLogger(__name__)

UNLOAD_SECONDS = 30.0  # that an unload waits for the requests that use the adapter
ROOM_SECONDS = 30.0  # that an operator's load waits for a place in a full engine, for its self-test
SCAN_EVERY_SECONDS = 1.0  # unknown names cause at most one look at the directory in this time
FIRST_CHECK_SECONDS, CHECK_SECONDS = 2.0, 0.5  # for reading headers at the start, where nobody waits yet, and at a later look (5 ms each)
MAX_LOADS = 2  # folders read at once: what is being read is not yet within the budget of bytes

MAX_ALIASES = 1000
MISSED_LOOKS = 2  # that do not see the folder of an adapter before it is no longer served

_PASSING = (AdapterLimit, AdapterMemory, AdapterQuarantined, RegistryWriteFailed)  # errors that say nothing about the files


class AdapterRegistry:
    """
    Args:
        store: with its adapters directory set; without one, nothing can be loaded. From now on the registry's alone.
        metrics: told of every load and unload.
        unload_seconds: that an unload waits for the requests that use the adapter.
        directory: where what operators do outlives the process; without one it does not.
    """

    def __init__(
        self,
        store: AdapterStore,
        engine: AsyncEngine,
        *,
        metrics: Metrics | None = None,
        unload_seconds: float = UNLOAD_SECONDS,
        directory: StateDirectory | None = None,
    ) -> None:
        self.store, self.engine, self.metrics, self.unload_seconds = store, engine, metrics, unload_seconds
        self.events = AdapterEvents()
        store.cache.on_evict = self._evicted
        self._root = store.adapters_dir.resolve() if store.adapters_dir else None
        self._known: dict[str, Known] = {}
        self._revisions = Revisions(store, engine)
        self._directory, self._state, self._writing = directory, RegistryState(), asyncio.Lock()
        self._loads = asyncio.Semaphore(MAX_LOADS)
        self.looks = Looks(self._look)
        self._background: set[asyncio.Task[None]] = set()
        self._trial = AdapterTrial(engine)

    # -- the start and the end

    def scan(self) -> str | None:
        """Look at the adapters directory and at what the last process left, in the caller's thread, before anything is served.

        Returns:
            Why the state of the last process cannot be understood; it begins anew then.
        Raises:
            AdapterLimit, AdapterUnreadable: there are too many folders, or the directory cannot be listed.
            InvalidRequest: the state directory cannot be read.
        """
        problem = None
        if self._directory is not None:
            self._state, problem = self._directory.read()
            if problem is not None and self.metrics is not None:
                self.metrics.registry_trouble("state_not_understood")
        found = look(self.store, {}, check_seconds=FIRST_CHECK_SECONDS, waits_for_copies=False)
        self.looks.has_looked()
        self._take(found, set())
        for name, registered in self._state.adapters.items():
            self._restore(name, registered)
        for name in self._state.pins:
            self._known.setdefault(name, Known(name)).is_pinned = True
        return problem

    def _restore(self, name: str, registered: Registered) -> None:
        """What was loaded is loaded, though read only when it is asked for."""
        source = AdapterSource(registered.path, registered.variant)
        try:
            self.store.restore(name, source, registered.revision)
        except AdapterError as error:
            logger.warning("adapter %s was loaded before, but cannot be served now: %s", name[:64], error)
            return
        known = self._known.setdefault(name, Known(name))
        known.revision, known.variant, known.is_explicit = registered.revision, registered.variant, True
        if known.variant is None and known.found is not None:
            known.variant = known.found.variant

    def start(self, *, look_seconds: float) -> None:
        """Follow the adapters directory, with so many seconds between two looks (0: only where something asks), and load what is pinned."""
        if look_seconds:
            self._run(self.looks.watch(look_seconds, self._reconcile))
        for name in self._state.pins:
            self._run(self._load_pinned(name))

    def stop(self) -> None:
        """End what runs in the background, and every listener."""
        self.events.close()
        for task in self._background:
            task.cancel()

    def _run(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _load_pinned(self, name: str) -> None:
        try:
            (await self.lease(name)).release()
        except MoaError as error:
            logger.warning("adapter %s is pinned, but cannot be loaded: %s", name, error)

    # -- what there is

    def items(self) -> list[AdapterItem]:
        """Every name that is served, being loaded or unloaded, or broken; not what an operator unloaded."""
        return [self._item(known) for _, known in sorted(self._known.items()) if known.is_shown]

    def item(self, name: str) -> AdapterItem:
        """Raises AdapterNotFound."""
        known = self._known.get(name)
        if known is None or not known.is_shown:
            raise AdapterNotFound(f"adapter {name[:64]!a} is not known; GET /v1/adapters lists all", param="id")
        return self._item(known)

    def aliases(self) -> list[AliasItem]:
        return [AliasItem(alias, targets) for alias, targets in sorted(self._state.aliases.items())]

    def alias(self, name: str) -> AliasItem | None:
        """None where no alias has the name."""
        targets = self._state.aliases.get(name)
        return None if targets is None else AliasItem(name, targets)

    def is_served(self, name: str) -> bool:
        """Whether requests may name it, an adapter or an alias, as far as the last look at the directory tells."""
        known = self._known.get(name)
        return name in self._state.aliases or (known is not None and known.is_served)

    def _item(self, known: Known) -> AdapterItem:
        path = os.fspath(self.store.get(known.name).source.path) if known.revision else known.name
        if self._root is not None and os.path.isabs(path):
            path = os.path.relpath(path, self._root)
        num_bytes = self.store.cache.bytes_of(known.revision) if known.revision else 0
        tiers = {
            "disk": known.found is not None or path != known.name,
            "host": num_bytes > 0,
            "slot": known.revision is not None and known.revision in self.engine.load.resident,
        }
        return AdapterItem(
            name=known.name,
            state=known.state,
            is_listed=known.is_served and known.name not in self._state.aliases,  # which goes first
            revision=known.revision,
            variant=known.variant or (known.found.variant if known.found else None),
            tiers=tuple(tier for tier, is_there in tiers.items() if is_there),
            bytes=num_bytes,
            leases=known.num_leases,
            hits=known.num_hits,
            last_used=known.last_used,
            path=path,
            error=str(known.error) if known.error else None,
            is_explicit=known.is_explicit,
            is_pinned=known.is_pinned,
            is_changed=known.is_changed,
            warnings=known.warnings,
            old_revisions=tuple(OldRevision(*old) for old in self._revisions.old_of(known.name)),
        )

    # -- looking at the directory

    def _take(self, found: Sequence[Found], hidden: Set[str]) -> None:
        """Make the result of a look the truth.

        Args:
            hidden: names that were hidden when the look began; only of these it can say that their files have changed since.
        """
        folders = {folder.name: folder for folder in found}
        for known in list(self._known.values()):
            if known.name not in folders:
                known.num_missed += 1
                known.found, known.load_error = None, None
                self._forget(known)
        for name, folder in folders.items():
            known = self._known.get(name) or self._known.setdefault(name, Known(name, hidden_at=self._state.hidden.get(name)))
            before = None if known.found is None else known.state
            is_changed = known.found is None or known.found.signature != folder.signature
            if is_changed or isinstance(known.load_error, RETRIED):
                known.load_error = None
            if (name in hidden or before is None) and known.hidden_at != folder.signature:
                known.hidden_at = None
            known.found, known.num_missed = folder, 0
            if known.state != before and known.state in ("available", "changing", "broken") and known.is_shown:
                self.events.tell(known.state, name, error=str(known.error) if known.error else None)

    def _forget(self, known: Known) -> None:
        if known.is_forgotten and not known.is_pinned:
            self._known.pop(known.name, None)

    async def _look_again(self, name: str) -> Known:
        """The name after a fresh look, of which there is at most one a second; a folder that is being written gets a second one.

        Raises:
            ModelNotListed: it is not served, and why.
        """
        await self.looks.again(SCAN_EVERY_SECONDS)
        known = self._known.get(name)
        if known is not None and known.state == "changing":
            await asyncio.sleep(SCAN_EVERY_SECONDS)
            await self.looks.now()
            known = self._known.get(name)
        if known is not None and known.is_served:
            return known
        shown = name[:64]
        if known is not None and known.error is not None and known.hidden_at is None:
            raise ModelNotListed(f"The model `{shown}` was found but could not be loaded: {known.error}", param="model")
        raise ModelNotListed(f"The model `{shown}` does not exist; GET /v1/models lists what is served", param="model")

    async def _look(self) -> None:
        seen = {name: known.found for name, known in self._known.items() if known.found is not None}
        hidden = {name for name, known in self._known.items() if known.hidden_at is not None}
        try:
            self._take(await asyncio.to_thread(look, self.store, seen, check_seconds=CHECK_SECONDS), hidden)
        except AdapterError as error:  # what is known stays known
            logger.warning("the adapters directory cannot be scanned: %s", error)

    def _reconcile(self) -> None:
        """What only requests loaded follows its folder: other content is read, and what is gone is served no more. What an operator
        loaded or pinned stays as it is."""
        for known in list(self._known.values()):
            if known.revision is None or known.is_explicit or known.loading is not None or known.unloading is not None:
                continue
            if known.found is None:
                if known.num_missed >= MISSED_LOOKS and not known.is_pinned:
                    logger.info("adapter %s: its folder is gone, so it is served no more", known.name)
                    self._withdraw(known)
                    self.events.tell("removed", known.name)
                    self._forget(known)
            elif known.is_changed and known.tried != known.found.signature and not isinstance(known.found.error, RETRIED):
                known.tried = known.found.signature
                if known.found.error is not None:
                    logger.warning("adapter %s: its folder changed and is broken now, what was loaded is served on", known.name)
                    continue
                known.is_operators = False
                known.loading = asyncio.create_task(self._follow(known))

    async def _follow(self, known: Known) -> None:
        try:

            async def settle(adapter: Adapter, signature: Signature | None) -> None:
                self._publish(known, AdapterSource(known.name), adapter, signature)
                await self.engine.pardon(adapter.revision)

            await self._bring(known, AdapterSource(known.name), "changed", settle, room_seconds=ROOM_SECONDS)
            known.load_error = None
        except MoaError as error:
            if isinstance(error, _PASSING) or not isinstance(error, AdapterError):
                known.tried = None  # says nothing about the files: the next look tries again
            else:
                known.load_error = error
            logger.warning("adapter %s: its folder changed, but cannot be loaded, what was loaded is served on: %s", known.name, error)
        finally:
            known.loading = None
            self._forget(known)

    # -- requests

    async def lease(self, name: str, *, revision: str | None = None, key: str | None = None) -> AdapterLease:
        """The adapter of a name or alias, read and tried first where nobody has asked for it before. Release it when the request has ended.

        Args:
            revision: first digits of the one that must answer; the current one if omitted.
            key: who asks: he gets the same target of an alias each time.
        Raises:
            ModelNotListed: no such name, unloaded by an operator, or found but broken. RevisionNotFound: neither current nor kept.
            AdapterMemory, Overloaded: no room now. AdapterUnavailable: its files are gone since it left memory.
        """
        name, wanted = self._resolved(name, revision, key)
        is_first = True
        while True:  # a turn ends with a load: the adapter may have been evicted again, or unloaded, before this task goes on
            known = self._known.get(name)
            if known is None or not known.is_served:
                known = await self._look_again(name)
            current = known.revision
            if current is not None and not all(current.startswith(digits) for digits in wanted):
                return self._old_lease(known, wanted, is_counted=is_first)
            if (adapter := self._revisions.acquire(current, is_counted=is_first)) is not None:
                return self._given(known, adapter)
            is_first = False
            if known.loading is not None and known.is_operators:
                await asyncio.wait([known.loading])
                continue
            if known.loading is None:
                if known.load_error is not None and time.monotonic() - known.failed_at < SCAN_EVERY_SECONDS:
                    raise self._unavailable(known, known.load_error)
                known.is_operators = False
                known.loading = asyncio.create_task(self._load_for_request(known))
            await asyncio.shield(known.loading)  # the load goes on for others if this request is cancelled

    def _resolved(self, name: str, revision: str | None, key: str | None) -> tuple[str, list[str]]:
        """The adapter's name, and the first digits that its revision must have."""
        targets = self._state.aliases.get(name)
        target, digits = split_target(choose(name, targets, key)) if targets else (name, None)
        return target, [part for part in (digits, revision) if part is not None]

    def _old_lease(self, known: Known, wanted: Sequence[str], *, is_counted: bool) -> AdapterLease:
        if (adapter := self._revisions.acquire_old(known.name, wanted, is_counted=is_counted)) is not None:
            return self._given(known, adapter)
        raise RevisionNotFound(
            f"revision {wanted[-1][:12]} of {known.name!r} is neither the current one, {(known.revision or '')[:12]}, nor kept",
            param="moa.revision",
        )

    def serves(self, name: str, revision: str) -> bool:
        """Whether this is what a name stands for now."""
        known = self._known.get(name)
        return known is not None and known.is_served and known.revision == revision

    def lease_resident(self, name: str, revision: str) -> AdapterLease | None:
        """A revision for background work: only where it is served by this name and stands in a slot, so that nothing has to be read or to
        make room for it. It is no use of the adapter that is counted, or that an unload waits for."""
        if not self.serves(name, revision) or revision not in self.engine.load.resident:
            return None
        adapter = self._revisions.acquire(revision)
        return None if adapter is None else AdapterLease(name, adapter, lambda: self._revisions.release(revision))

    def _given(self, known: Known, adapter: Adapter) -> AdapterLease:
        known.num_leases += 1
        known.num_hits += 1
        known.last_used = time.time()
        known.is_idle.clear()

        def give_back() -> None:
            known.num_leases -= 1
            if known.num_leases == 0:
                known.is_idle.set()
            self._revisions.release(adapter.revision)

        return AdapterLease(known.name, adapter, give_back)

    async def _load_for_request(self, known: Known) -> None:
        """The first load of an available adapter, or the reading again of one that left memory. A broken one is remembered, not raised."""
        name, published = known.name, known.revision
        source = self.store.get(name).source if published else AdapterSource(name)

        async def settle(adapter: Adapter, signature: Signature | None) -> None:
            if adapter.revision == published:
                self.store.cache.add(adapter)
                known.signature, known.variant = signature, adapter.manifest.variant
                self._follow_pin(known)
            elif not known.is_explicit:
                self._publish(known, source, adapter, signature)
                await self.engine.pardon(adapter.revision)
            else:  # an operator chose what was there; other content needs an operator again
                raise AdapterUnreadable(f"adapter {name!r}: its files were replaced since it was loaded; reload it")

        try:
            await self._bring(known, source, "evicted" if published else "lazy", settle, room_seconds=0)
            known.load_error = None
        except _PASSING:
            raise
        except AdapterError as error:
            known.failed_at = time.monotonic()
            if published and (known.is_explicit or isinstance(error, RETRIED)):  # a disk that fails now may not fail later
                known.load_error = error
                raise self._unavailable(known, error) from None
            if published:
                self._withdraw(known)
            known.load_error = error
            self.events.tell("broken", name, error=str(error))
            logger.warning("adapter %s cannot be loaded: %s", name, error)
        finally:
            known.loading = None
            self._forget(known)

    def _unavailable(self, known: Known, error: AdapterError) -> AdapterUnavailable:
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
            AdapterExists: an operator loaded the name before, or it is an alias. AdapterBusy: it is being loaded or unloaded.
            RegistryWriteFailed: it cannot be made to last. AdapterError: what is wrong with the adapter.
            What was served by this name is served on then.
        """
        self.store.check_name(name)
        if name in self._state.aliases:
            raise AdapterExists(f"{name!r} is an alias; remove it, or choose another name", param="name")
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
        known = known or self._known.setdefault(name, Known(name))
        known.is_operators = True
        known.loading = asyncio.create_task(self._load(known, source))
        adapter = await asyncio.shield(known.loading)
        assert adapter is not None, "an operator's load gives the adapter or raises"
        return adapter

    async def reload(self, name: str, *, revision: str | None = None, path: str | None = None, variant: str | None = None) -> Adapter:
        """Read an adapter again, in place.

        Args:
            revision: all digits of the one that is to be replaced; another one by now is a conflict.
            path, variant: where it lies now; as before if omitted.
        Raises:
            AdapterNotFound: it is not served. RevisionConflict. And as `load`: what was served is served on then.
        """
        known = self._known.get(name)
        if known is None or not known.is_served:
            raise AdapterNotFound(f"adapter {name[:64]!a} is not served; load it", param="id")
        if revision is not None and revision != known.revision:
            raise RevisionConflict(
                f"adapter {name!r}: its revision is {known.revision or 'not known yet'}, not {revision[:64]}; look at it again",
                param="revision",
            )
        source = self.store.get(name).source if known.revision else AdapterSource(name)
        return await self.load(name, path or os.fspath(source.path), variant=variant or source.variant, load_inplace=True)

    def _place(self, path: str) -> Path:
        if self.store.adapters_dir is None:
            raise AdapterPathDenied("the server has no adapters directory; start it with --adapters-dir", param="path")
        place = resolve_below(self.store.adapters_dir, path)
        wait_until_steady(place)
        return place

    async def _load(self, known: Known, source: AdapterSource) -> Adapter:
        old = known.revision
        self.events.tell("loading", known.name)
        try:

            async def settle(adapter: Adapter, signature: Signature | None) -> None:
                state, record = self._state, Registered(self._relative(source), source.variant, adapter.revision)
                await self._commit(lambda state: state.loaded(known.name, record))
                try:
                    self._publish(known, source, adapter, signature)
                except AdapterError:
                    with suppress(RegistryWriteFailed):  # the next write says it
                        await self._commit(lambda now: _put_back(now, state, known.name))
                    raise
                known.is_explicit, known.hidden_at, known.load_error = True, None, None
                await self.engine.pardon(adapter.revision)  # loading again is how an operator ends a quarantine

            return await self._bring(known, source, "explicit", settle, room_seconds=ROOM_SECONDS)
        except AdapterError as error:
            self.events.tell("load_failed", known.name, error=str(error), revision=old)
            raise
        finally:
            known.loading = None
            self._forget(known)

    def _relative(self, source: AdapterSource) -> str:
        assert self._root is not None, "an operator's load is below the adapters directory"
        return os.path.relpath(source.path, self._root)

    async def unload(self, name: str) -> int:
        """Hide a name at once, wait for the requests that use it, and free its memory. It goes on if the caller is cancelled.

        Returns:
            Bytes of host memory that are free now; 0 where another name has the same content.
        Raises:
            AdapterNotFound: it is not served. AdapterBusy: an operator is loading it, or requests still use it; then it is served on, as it
            is with RegistryWriteFailed.
        """
        known = self._known.get(name)
        if known is not None and known.loading is not None and known.is_operators:
            raise AdapterBusy(f"adapter {name!r} is being loaded; try again when that is done")
        if known is None or not known.is_served:
            raise AdapterNotFound(f"The lora adapter '{name[:64]}' cannot be found.", param="name")
        known.unloading = asyncio.create_task(self._unload(known))
        self.engine.end_background()  # it may hold what is to be freed
        return await asyncio.shield(known.unloading)

    async def _unload(self, known: Known) -> int:
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
                await self.looks.now()
            signature = None
            if known.found is not None and self.store.adapters_dir is not None:
                signature = await asyncio.to_thread(signature_of, self.store.adapters_dir / name)
            await self._commit(lambda state: state.unloaded(name, signature))
            known.hidden_at, known.is_pinned = signature, False
            freed = self._withdraw(known)
            self.events.tell("unloaded", name)
            return freed
        finally:
            known.unloading = None
            self._forget(known)

    async def pin(self, name: str, is_pinned: bool) -> AdapterItem:
        """Keep a name's adapter in host memory, whatever its revision, or no longer; twice is as good as once.

        Raises:
            AdapterNotFound: it is not served. And as `lease` and `load`.
        """
        known = self._known.get(name)
        if known is None or not (known.is_served or (known.is_pinned and not is_pinned)):
            raise AdapterNotFound(f"adapter {name[:64]!a} is not served; load it", param="id")
        if known.is_pinned == is_pinned:
            return self._item(known)
        lease = await self.lease(name) if is_pinned else None
        try:
            await self._commit(lambda state: state.pinned(name, is_pinned))
            known.is_pinned = is_pinned
            self._follow_pin(known)
        finally:
            if lease is not None:
                lease.release()
        self.events.tell("pinned" if is_pinned else "unpinned", name, revision=known.revision)
        item = self._item(known)
        self._forget(known)
        return item

    async def set_alias(self, alias: str, targets: Mapping[str, int]) -> AliasItem:
        """Let a name stand for adapters, for each by its share of the requests. Replaces what it stood for.

        Raises:
            AliasInvalid: the name or the targets cannot be. AdapterExists: an adapter has the name.
            AdapterNotFound, RevisionNotFound: a target is not served.
            RegistryWriteFailed: nothing has changed then.
        """
        try:
            self.store.check_name(alias)
        except AdapterError as error:
            raise AliasInvalid(str(error).replace("adapter name", "alias", 1), param="alias") from None
        check_targets(targets)
        if (known := self._known.get(alias)) is not None and (known.is_served or known.loading is not None):
            raise AdapterExists(f"{alias!r} is an adapter's name; unload it, or choose another alias", param="alias")
        if len(self._state.aliases) >= MAX_ALIASES and alias not in self._state.aliases:
            raise AdapterLimit(f"there are {MAX_ALIASES:,} aliases, which is the limit; remove one")
        for target in targets:
            await self._check_target(target)
        await self._commit(lambda state: state.aliased(alias, targets))
        self._review_old()
        self.events.tell("alias_set", alias, targets=dict(targets))
        return AliasItem(alias, dict(targets))

    async def _check_target(self, target: str) -> None:
        name, digits = split_target(target)
        if name in self._state.aliases:
            raise AliasInvalid(f"target {name[:64]!a} is an alias itself; name the adapters", param="targets")
        known = self._known.get(name)
        try:
            known = known if known is not None and known.is_served else await self._look_again(name)
        except ModelNotListed:
            raise AdapterNotFound(f"target {target[:140]!a} is not served; load it first", param="targets") from None
        if digits is not None:
            try:
                (await self.lease(name, revision=digits)).release()
            except RevisionNotFound as error:
                raise RevisionNotFound(str(error), param="targets") from None

    async def remove_alias(self, alias: str) -> None:
        """Raises AliasNotFound, RegistryWriteFailed."""
        if alias not in self._state.aliases:
            raise AliasNotFound(f"alias {alias[:64]!a} is not known; GET /v1/aliases lists all", param="alias")
        await self._commit(lambda state: state.aliased(alias, None))
        self._review_old()
        self.events.tell("alias_removed", alias)

    async def _commit(self, change: Callable[[RegistryState], RegistryState]) -> None:
        """Make a change last before anyone is told of it.

        Raises:
            RegistryWriteFailed: nothing has changed then.
        """
        async with self._writing:
            state = change(self._state)
            if self._directory is not None and state != self._state:
                try:
                    await asyncio.to_thread(self._directory.write, state)
                except RegistryWriteFailed:
                    if self.metrics is not None:
                        self.metrics.registry_trouble("write_failed")
                    raise
            self._state = state

    # -- one step between two turns of the loop

    def _publish(self, known: Known, source: AdapterSource, adapter: Adapter, signature: Signature | None) -> None:
        """Raises AdapterMemory, AdapterTooLarge, AdapterLimit: nothing has changed then."""
        old, old_variant = known.revision, known.variant
        if old is None:
            self.store.publish(known.name, source, adapter)
        else:
            if self._is_target(known.name, old):
                self._revisions.hold_for_alias(known.name, old)
            try:
                self.store.replace(known.name, source, adapter)
            except AdapterError:
                self._revisions.drop_for_alias(old)
                raise
        self._revisions.revive(known.name, adapter.revision)
        known.revision, known.variant, known.warnings = adapter.revision, adapter.manifest.variant, adapter.warnings
        known.signature = signature
        self._follow_pin(known)
        if old is not None and old != adapter.revision:
            self._revisions.replaced(known.name, old, old_variant)
        self.events.tell("loaded" if old is None else "reloaded", known.name, revision=adapter.revision, old_revision=old)
        for warning in adapter.warnings:
            logger.warning("adapter %s: %s", known.name, warning)

    def _is_target(self, name: str, revision: str) -> bool:
        named = (split_target(target) for targets in self._state.aliases.values() for target in targets)
        return any(target == name and digits is not None and revision.startswith(digits) for target, digits in named)

    def _review_old(self) -> None:
        """After a change of aliases: hold the old revisions that they name now, let the others go."""
        for name in list(self._known):
            for revision, *_ in list(self._revisions.old_of(name)):
                if self._is_target(name, revision):
                    self._revisions.hold_for_alias(name, revision)
                else:
                    self._revisions.drop_for_alias(revision)

    def _follow_pin(self, known: Known) -> None:
        self._revisions.pin(known.name, known.revision if known.is_pinned else None)

    def _withdraw(self, known: Known) -> int:
        """Take a name's adapter away; the bytes that became free."""
        if known.revision is None:
            return 0
        before, revision = self.store.cache.num_bytes, known.revision
        self.store.remove(known.name)
        known.revision, known.variant, known.warnings, known.is_explicit, known.load_error = None, None, (), False, None
        known.signature = None
        self._revisions.retire(revision, "unloaded")
        self._revisions.pin(known.name, None)
        for old, *_ in list(self._revisions.old_of(known.name)):
            self._revisions.drop_for_alias(old)
        if self.metrics is not None:
            self.metrics.adapter_unloaded(known.name)
        return before - self.store.cache.num_bytes

    def _evicted(self, revision: str) -> None:
        self.engine.cool(revision)
        for known in self._known.values():
            if known.revision == revision:
                self.events.tell("evicted", known.name, revision=revision)

    # -- reading and trying

    async def _bring(
        self,
        known: Known,
        source: AdapterSource,
        why: str,
        settle: Callable[[Adapter, Signature | None], Awaitable[None]],
        *,
        room_seconds: float,
    ) -> Adapter:
        """Read an adapter, try it and `settle` it: all of it or nothing. The metrics hear how long it took and how it ended."""
        started, result, revision, manifest = time.monotonic(), "error", None, None
        try:
            async with self._loads:
                adapter, signature = await asyncio.to_thread(self._read, known.name, source)
                try:
                    adapter = await self._tried(known.name, adapter, room_seconds)
                    await settle(adapter, signature)
                except BaseException:
                    self._revisions.retire(adapter.revision, "failed")
                    raise
            result, revision, manifest = "ok", adapter.revision, adapter.manifest
            return adapter
        except MoaError as error:
            result = error.code
            raise
        finally:
            if self.metrics is not None:
                self.metrics.adapter_loaded(known.name, revision, time.monotonic() - started, why, result, manifest=manifest)

    def _read(self, name: str, source: AdapterSource) -> tuple[Adapter, Signature | None]:
        """In a worker thread: read, validate, and lay out for the backend, so that the step that first needs it stays short. With what its
        files looked like before, where it lies in the folder that bears its name."""
        signature = None
        if self._root is not None and (self._root / source.path) == self._root / name:
            signature = signature_of(self._root / name)
        adapter = self.store.read(name, source)
        self.engine.warm(adapter)
        return adapter, signature

    async def _tried(self, name: str, adapter: Adapter, room_seconds: float) -> Adapter:
        """The adapter after its self-test; content that is published under any name has passed it before."""
        twin = next((known for known in self._known.values() if known.revision == adapter.revision), None)
        if twin is not None:
            return replace(adapter, warnings=twin.warnings)
        return await self._trial.run(name, adapter, room_seconds=room_seconds)


def _put_back(now: RegistryState, before: RegistryState, name: str) -> RegistryState:
    """What was known of a name before a load that could not be finished."""
    registered, signature = before.adapters.get(name), before.hidden.get(name)
    if registered is not None:
        return now.loaded(name, registered)
    undone = now.unloaded(name, signature)
    return undone.pinned(name, True) if name in before.pins else undone
