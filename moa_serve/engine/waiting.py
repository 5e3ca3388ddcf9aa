"""Who waits, and in which order they are to start: round robin over tenants (API keys), of each over its adapters, of each by arrival.

So a flood by one tenant, or by the requests of one adapter, delays another tenant's next request by one of the flood's, not by all of them.
Ids only; owned by the engine thread.
"""

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Iterator

from moa_serve.engine.request import Sequence, SequenceStatus

_Queue = deque[Sequence]


class WaitingLine:
    """Sequences that wait. Those that had started and lost their blocks go on first, in the order in which they had started.

    Who comes when nobody of its tenant (or of its tenant's adapter) waits goes to the end of the round; who starts goes there too, with
    its tenant. Nobody is remembered who does not wait.
    """

    def __init__(self) -> None:
        self._resuming: list[Sequence] = []  # by turn
        self._tenants: OrderedDict[str | None, OrderedDict[str | None, _Queue]] = OrderedDict()  # next ones first, at both levels
        self._num_new = 0

    def __len__(self) -> int:
        return len(self._resuming) + self._num_new

    def __iter__(self) -> Iterator[Sequence]:
        """In no order that means anything."""
        yield from self._resuming
        for queues in self._tenants.values():
            for queue in queues.values():
                yield from queue

    def add(self, sequence: Sequence) -> None:
        if sequence.turn >= 0:
            insort(self._resuming, sequence, key=lambda other: other.turn)
            return
        request = sequence.request
        self._tenants.setdefault(request.tenant, OrderedDict()).setdefault(request.adapter, deque()).append(sequence)
        self._num_new += 1

    def remove(self, sequence: Sequence) -> None:
        """It does not wait any more, for its reader is gone."""
        if sequence.turn >= 0:
            self._resuming.remove(sequence)
        else:
            self._queue_of(sequence).remove(sequence)
            self._num_new -= 1
            self._drop_empty(sequence)

    def take(self, sequence: Sequence) -> None:
        """It starts: the turn of its adapter and its tenant is over."""
        self.remove(sequence)
        tenant, adapter = sequence.request.tenant, sequence.request.adapter
        if sequence.turn < 0 and tenant in self._tenants:
            self._tenants.move_to_end(tenant)
            if adapter in self._tenants[tenant]:
                self._tenants[tenant].move_to_end(adapter)

    def candidates(self) -> Iterator[Sequence]:
        """In the order in which they are to start. Who is not started (`take`) before the next one is asked for is passed over, and with
        it those behind it: of the same tenant and adapter, they wait for the same."""
        yield from tuple(self._resuming)
        round_ = deque(deque(queues.values()) for queues in self._tenants.values())
        while round_:
            queues = round_.popleft()
            while queues:
                queue = queues.popleft()
                head = queue[0]
                yield head
                if head.status is SequenceStatus.WAITING:
                    continue  # passed over; its tenant has other adapters
                if queue:
                    queues.append(queue)
                if queues:
                    round_.append(queues)
                break

    def heads(self) -> Iterator[Sequence]:
        """Who is the next of its tenant and adapter."""
        yield from self._resuming
        for queues in self._tenants.values():
            for queue in queues.values():
                yield queue[0]

    def _queue_of(self, sequence: Sequence) -> _Queue:
        return self._tenants[sequence.request.tenant][sequence.request.adapter]

    def _drop_empty(self, sequence: Sequence) -> None:
        tenant, adapter = sequence.request.tenant, sequence.request.adapter
        if not self._tenants[tenant][adapter]:
            del self._tenants[tenant][adapter]
        if not self._tenants[tenant]:
            del self._tenants[tenant]
