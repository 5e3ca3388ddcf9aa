"""What is known of one adapter's name, and what requests and operators get of it. Data; who changes it is the registry (adapters.py)."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.importers import Signature
from moa_serve.api.folders import Found
from moa_serve.errors import AdapterChanging, AdapterError


@dataclass(frozen=True, slots=True)
class OldRevision:
    """A revision that a reload has replaced, and that is still there: requests run on it, or an alias names it."""

    revision: str
    variant: str
    leases: int


@dataclass(frozen=True, slots=True)
class AdapterItem:
    """What is known of one name.

    Args:
        state: available (found, never read), changing (its files are being written), loading, loaded, broken, unloading.
        is_listed: requests are served by this name: it belongs into the list of models.
        revision, variant: of what is loaded; of an available one the variant, where its header tells.
        tiers: where the loaded revision is: disk, host, slot.
        bytes: host memory that it takes now; 0 where it is not loaded, or left memory until the next request.
        leases: requests that hold it.
        hits: requests that it was leased to.
        last_used: Unix time in seconds of the last of them.
        path: relative to the adapters directory.
        error: why it is broken, or cannot be read again.
        is_explicit: an operator loaded it; the others were loaded by their first request.
        is_pinned: it stays in host memory.
        is_changed: its folder holds other content than what is served.
    """

    name: str
    state: str
    is_listed: bool
    revision: str | None
    variant: str | None
    tiers: tuple[str, ...]
    bytes: int
    leases: int
    hits: int
    last_used: float | None
    path: str
    error: str | None = None
    is_explicit: bool = False
    is_pinned: bool = False
    is_changed: bool = False
    warnings: tuple[str, ...] = ()
    old_revisions: tuple[OldRevision, ...] = ()


@dataclass(slots=True)
class AdapterLease:
    """An adapter that stays in memory and unchanged until `release`, which must be called and may be called twice.

    Args:
        name: of the adapter, where an alias was asked for.
    """

    name: str
    adapter: Adapter
    _on_release: Callable[[], None]
    _is_released: bool = False

    def release(self) -> None:
        if not self._is_released:
            self._is_released = True
            self._on_release()


@dataclass(eq=False, slots=True)
class Known:
    """One name: the folder that bears it, what an operator did to it, and what runs on it now. At most one load or unload at a time."""

    name: str
    found: Found | None = None
    num_missed: int = 0  # looks in a row that did not see its folder
    load_error: AdapterError | None = None  # of the folder as it is in `found`
    tried: Signature | None = None  # files that a look saw changed, and that were read again, whatever came of it
    hidden_at: Signature | None = None  # of its files when an operator unloaded it; None is not hidden
    revision: str | None = None  # of the published adapter, with its variant and warnings; it may have left memory
    variant: str | None = None
    warnings: tuple[str, ...] = ()
    signature: Signature | None = None  # of the files that the published adapter was read from, where they lie in `found`'s folder
    is_explicit: bool = False
    is_pinned: bool = False
    failed_at: float = -1e9  # time.monotonic() of the last failure to read it again
    loading: "asyncio.Task[Adapter | None] | None" = None
    unloading: "asyncio.Task[int] | None" = None
    is_operators: bool = False  # `loading` was asked for by an operator, not by a request
    num_leases: int = 0
    num_hits: int = 0
    last_used: float | None = None
    is_idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.is_idle.set()

    @property
    def error(self) -> AdapterError | None:
        return self.load_error or (self.found.error if self.found else None)

    @property
    def state(self) -> str:
        if self.unloading is not None:
            return "unloading"
        if self.revision is not None:
            return "loaded"
        if self.loading is not None:
            return "loading"
        if isinstance(self.error, AdapterChanging):
            return "changing"
        return "broken" if self.error else "available"

    @property
    def is_served(self) -> bool:
        """Requests may name it: it is published, or its folder has nothing against it."""
        if self.hidden_at is not None or self.unloading is not None:
            return False
        return self.revision is not None or (self.found is not None and self.error is None)

    @property
    def is_shown(self) -> bool:
        """There is something to say of it, and no operator has unloaded it."""
        return not self.is_forgotten and (self.hidden_at is None or self.loading is not None)

    @property
    def is_changed(self) -> bool:
        return self.found is not None and self.signature is not None and self.found.signature != self.signature

    @property
    def is_forgotten(self) -> bool:
        return self.found is None and self.revision is None and self.loading is None and self.unloading is None
