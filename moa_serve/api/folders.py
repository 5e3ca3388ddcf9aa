"""What lies in the adapters directory: a look at every folder, judged by its config and tensor header.

Runs in worker threads and changes nothing; what a look means for the names that are served is the registry's affair (adapters.py).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from moa_serve.adapter.adapter import AdapterSource
from moa_serve.adapter.importers import Signature, signature_of
from moa_serve.adapter.store import AdapterStore
from moa_serve.errors import AdapterChanging, AdapterError, AdapterUnreadable

RETRIED = (AdapterChanging, AdapterUnreadable)  # true now, perhaps not later, although the files look the same


@dataclass(frozen=True, slots=True)
class Found:
    """One folder at one look.

    Args:
        is_checked: its header was judged; else there was no time left, and it counts as fit until its first load.
        variant: where the header tells.
        error: why it cannot be served.
    """

    name: str
    signature: Signature
    is_checked: bool = False
    variant: str | None = None
    error: AdapterError | None = None

    @property
    def is_settled(self) -> bool:
        """Another look at the same files would say the same."""
        return self.is_checked and not isinstance(self.error, RETRIED)


def look(store: AdapterStore, seen: Mapping[str, Found], *, check_seconds: float) -> list[Found]:
    """Every adapter folder as it is now. Those that did not change since `seen` are not opened.

    Args:
        check_seconds: for reading headers; what is left then waits for the next look, or for its first request.
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
        if known is not None and known.signature == signature and known.is_settled:
            found.append(known)
        else:
            found.append(_check(store, name, signature) if time.monotonic() < until else Found(name, signature))
    return found


def _check(store: AdapterStore, name: str, signature: Signature) -> Found:
    try:
        return Found(name, signature, True, store.check_header(name, AdapterSource(name)))
    except AdapterError as error:
        return Found(name, signature, True, error=error)
