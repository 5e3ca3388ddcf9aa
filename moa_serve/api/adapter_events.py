"""AdapterEvents: what happens to adapters, for whoever listens: a bounded history, and a bounded queue for each listener.

Belongs to the event loop. A listener that falls behind is ended, not waited for; it comes back with the last id that it has seen.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

KEPT = 1000  # events
MAX_BEHIND = 256  # events that a listener may have to read
MAX_LISTENERS = 32


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """
    Args:
        id: one more than the event before it; from 1 on in every process.
        kind: available, changing, broken, loading, loaded, reloaded, load_failed, unloaded, evicted, removed, pinned, unpinned,
            alias_set, alias_removed.
        name: of the adapter or alias.
        time: Unix time in seconds.
        more: revision, error, targets: what belongs to the kind.
    """

    id: int
    kind: str
    name: str
    time: float
    more: dict[str, Any]


class AdapterEvents:
    def __init__(self) -> None:
        self._history: deque[AdapterEvent] = deque(maxlen=KEPT)
        self._listeners: set[asyncio.Queue[AdapterEvent | None]] = set()
        self._next_id = 1
        self._is_closed = False

    @property
    def is_full(self) -> bool:
        return len(self._listeners) >= MAX_LISTENERS

    def tell(self, kind: str, name: str, **more: Any) -> None:
        event = AdapterEvent(self._next_id, kind, name, time.time(), {key: value for key, value in more.items() if value is not None})
        self._next_id += 1
        self._history.append(event)
        for listener in list(self._listeners):
            if listener.qsize() >= MAX_BEHIND:
                self._end(listener)
            else:
                listener.put_nowait(event)

    async def listen(self, after: int | None, *, every: float) -> AsyncIterator[AdapterEvent | None]:
        """Events from now on, with those before that are newer than `after`. None where nothing came for `every` seconds."""
        queue: asyncio.Queue[AdapterEvent | None] = asyncio.Queue()
        for event in self._history:
            if after is not None and event.id > after:
                queue.put_nowait(event)
        if self._is_closed:
            return
        self._listeners.add(queue)
        try:
            while True:
                try:
                    async with asyncio.timeout(every):
                        event_or_end = await queue.get()
                except TimeoutError:
                    yield None
                    continue
                if event_or_end is None:
                    return
                yield event_or_end
        finally:
            self._listeners.discard(queue)

    def close(self) -> None:
        """End every listener: the server stops."""
        self._is_closed = True
        for listener in list(self._listeners):
            self._end(listener)

    def _end(self, listener: "asyncio.Queue[AdapterEvent | None]") -> None:
        self._listeners.discard(listener)
        listener.put_nowait(None)
