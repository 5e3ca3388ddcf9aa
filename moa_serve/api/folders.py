"""What lies in the adapters directory: a look at every folder, judged by its config and tensor header.

A folder whose files changed a moment ago may be half a copy: it waits until it was left alone for a second. Runs in worker threads and
changes nothing; what a look means for the names that are served is the registry's affair (adapters.py).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moa_serve.adapter.adapter import AdapterSource
from moa_serve.adapter.importers import Signature, signature_of
from moa_serve.adapter.store import AdapterStore
from moa_serve.errors import AdapterChanging, AdapterError, AdapterUnreadable

RETRIED = (AdapterChanging, AdapterUnreadable)  # true now, perhaps not later, although the files look the same
STEADY_SECONDS = 1.0  # that files are left alone before they are taken for whole


@dataclass(frozen=True, slots=True)
class Found:
    """One folder at one look.

    Args:
        is_checked: its header was judged; else there was no time left, and it counts as fit until its first load.
        variant: where the header tells.
        error: why it cannot be served.
        seen_at: `time.monotonic()` of the first look at these very files.
    """

    name: str
    signature: Signature
    is_checked: bool = False
    variant: str | None = None
    error: AdapterError | None = None
    seen_at: float = field(default_factory=time.monotonic)

    @property
    def is_settled(self) -> bool:
        """Another look at the same files would say the same."""
        return self.is_checked and not isinstance(self.error, RETRIED)


def look(store: AdapterStore, seen: Mapping[str, Found], *, check_seconds: float, waits_for_copies: bool = True) -> list[Found]:
    """Every adapter folder as it is now. Those that did not change since `seen` are not opened.

    Args:
        check_seconds: for reading headers; what is left then waits for the next look, or for its first request.
        waits_for_copies: folders that changed a moment ago are `AdapterChanging`.
    Raises:
        AdapterLimit, AdapterUnreadable: there are too many, or the directory cannot be listed.
    """
    if store.adapters_dir is None:
        return []
    until = time.monotonic() + check_seconds
    found = []
    for name in store.scan():
        signature = signature_of(store.adapters_dir / name)
        known = seen.get(name)
        is_same = known is not None and known.signature == signature
        if known is not None and is_same and known.is_settled:
            found.append(known)
            continue
        seen_at = known.seen_at if known is not None and is_same else time.monotonic()
        if waits_for_copies and not is_steady(signature, seen_at):
            error = AdapterChanging(f"adapter {name!r}: its files are being written; it is served when they are left alone for a second")
            found.append(Found(name, signature, error=error, seen_at=seen_at))
        else:
            found.append(_check(store, name, signature, seen_at) if time.monotonic() < until else Found(name, signature, seen_at=seen_at))
    return found


def is_steady(signature: Signature, seen_at: float) -> bool:
    """Its files were last changed, or first seen like this, a second ago or more. The system's clock alone may be set back."""
    age = time.time() - max((changed for *_, changed in signature), default=0) / 1e9
    return age >= STEADY_SECONDS or time.monotonic() - seen_at >= STEADY_SECONDS


def wait_until_steady(folder: Path) -> None:
    """Blocks for a second where the files changed a moment ago.

    Raises:
        AdapterChanging: they changed again meanwhile.
    """
    signature = signature_of(folder)
    if is_steady(signature, time.monotonic()):
        return
    time.sleep(STEADY_SECONDS)
    if signature_of(folder) != signature:
        raise AdapterChanging(f"{folder.name}: its files are being written; load it when the copy is done")


def _check(store: AdapterStore, name: str, signature: Signature, seen_at: float) -> Found:
    try:
        return Found(name, signature, True, store.check_header(name, AdapterSource(name)), seen_at=seen_at)
    except AdapterError as error:
        return Found(name, signature, True, error=error, seen_at=seen_at)
