"""AsyncEngine: the engine in a thread of its own, with a stream of tokens for each request.

The engine thread owns the engine; the event loop owns the streams. They exchange commands through a queue one way, and one bundle of events
a step the other way. A stream is opened before its request is queued, ends exactly once (finished, error or cancelled), and what it
holds is given back in one place, `Stream.close`, whatever the exit. A reader that is behind pauses its own row only.

Steps that fail one after the other mean that the engine is broken: it is built anew over the same base, once; soon again, and the thread
gives up.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

from moa_serve import faults
from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.counts import EvictionReason, TierCounts
from moa_serve.engine.engine import Collected, Engine, TokenEvent
from moa_serve.engine.request import Request, Sequence, SequenceStatus
from moa_serve.engine.steps import StepTimes
from moa_serve.errors import Draining, EngineError, MoaError, Overloaded

logger = logging.getLogger(__name__)

PAUSE_AT = 256  # events that a stream holds for its reader before its row pauses; it goes on when they are read
_LOOK_SECONDS = 0.1  # while something is waited for that the engine thread does
_IDLE_SECONDS = 0.05  # between two looks at rows that are all paused
_BROKEN_AFTER = 3  # failed steps in a row
_GIVE_UP_SECONDS = 600.0  # an engine that is broken again so soon after it was rebuilt stays broken
_STOPPED = "the engine has stopped; restart the server"

EngineFactory = Callable[[Callable[[str], AbstractContextManager[Adapter]]], Engine]


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is; numbers after its last step or command. Rows are those that somebody waits for."""

    running: int
    waiting: int
    kv_usage: float  # share of pages that are held, 0 to 1
    steps: int
    preemptions: int
    resident: frozenset[str | None] = frozenset()  # adapter revisions that stand in a slot


class Stream:
    """The events of one request: `async for events in stream` gives what has come since, at least one event each time.

    Belongs to the event loop. `close` cancels a request that has not ended; use `async with`.
    """

    def __init__(self, engine: "AsyncEngine", request: Request, adapter: Adapter | None, on_close: Callable[[], None]) -> None:
        self.request, self.adapter = request, adapter
        self.sequence: Sequence | None = None  # the engine thread's; only its timestamps are read here
        self.collected: Collected | None = None
        self._engine, self._on_close = engine, on_close
        self._events: deque[TokenEvent] = deque()
        self._ready = asyncio.Event()
        self._is_paused = False
        self.is_ended = False  # the last event has come
        self.is_closed = False

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        if not self._events:
            if self.is_ended:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        events = list(self._events)
        self._events.clear()
        if self._is_paused and not self.is_ended:
            self._is_paused = False
            self._engine.set_paused(self, False)
        return events

    def deliver(self, event: TokenEvent) -> None:
        if self.is_closed or self.is_ended:
            return
        self._events.append(event)
        self.is_ended = event.finish_reason is not None
        self._ready.set()
        if len(self._events) >= PAUSE_AT and not self._is_paused and not self.is_ended:
            self._is_paused = True
            self._engine.set_paused(self, True)

    def close(self) -> None:
        """Cancel what has not ended, and give back what the request held; twice is as good as once."""
        if not self.is_closed:
            self.is_closed = True
            self._engine.discard(self)
            self._on_close()


class AsyncEngine:
    """
    Args:
        make_engine: builds the engine; it is given the function that leases an adapter by revision. Runs in the caller's thread.
        max_waiting: streams that may be open beyond the engine's rows; more are refused at once.
    """

    def __init__(self, make_engine: EngineFactory, *, max_waiting: int = 64) -> None:
        self._adapters: dict[str, Adapter] = {}  # of requests in the engine; the engine thread's
        self._engine = make_engine(self._lease)
        self._max_open = self._engine.options.max_num_seqs + max_waiting
        self._streams: dict[str, Stream] = {}  # the loop's
        self._background: dict[str, Stream] = {}  # of these, those that nobody waits for
        self._left_at = time.monotonic()  # when the last stream that somebody waited for was opened or closed
        self._sequences: dict[str, Sequence] = {}  # the engine thread's
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="moa-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopping = False
        self._failed_steps = 0
        self._rebuilt_at: float | None = None  # time.monotonic()
        self._num_turns = 0
        self.is_rebuilding = False  # nothing is accepted meanwhile
        self.is_working = False  # the engine thread has something to do: it must make progress
        self.failure: str | None = None  # why the engine thread gave up, or was given up
        self.load = Load(0, 0, 0.0, 0, 0)
        self.on_step: Callable[[Engine, list[TokenEvent]], None] | None = None  # metrics; called in the engine thread

    @property
    def engine(self) -> Engine:
        """For its constants (limits, config). Everything else in it is the engine thread's."""
        return self._engine

    @property
    def num_open(self) -> int:
        """Streams that somebody waits for."""
        return len(self._streams) - len(self._background)

    @property
    def idle_seconds(self) -> float:
        """For how long nobody has waited for anything."""
        return 0.0 if self.num_open else time.monotonic() - self._left_at

    @property
    def progress(self) -> int:
        """A number that changes while the engine thread gets on with its work: with every step, command and layer. For any thread."""
        return self._num_turns + self._engine.model.layers_done

    @property
    def incidents(self) -> Mapping[str, int]:
        """What went wrong so far, by kind."""
        return self._engine.incidents

    @property
    def slot_counts(self) -> TierCounts:
        """Of the adapters' slots so far. To be read only."""
        return self._engine.slot_table.counts

    def time_steps(self) -> StepTimes:
        """What every step from now on is counted in; before the engine starts."""
        times = self._engine.times = StepTimes()
        return times

    def give_up(self, failure: str) -> None:
        """The engine thread is stuck: tell everybody who waits for it. For any thread; the process must end then."""
        self.failure = failure
        self._call_loop(lambda: self._end_all(EngineError(_STOPPED)))

    def start(self) -> None:
        """Start the engine thread; events go to the loop that calls this."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End every stream with an error, then the thread; twice is as good as once."""
        if self._is_stopping:
            return
        self._is_stopping = True
        self._end_all(Draining("the server is shutting down; send the request to another one"))
        self._commands.put(lambda: None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._engine.close()

    # -- the event loop's side

    def open(self, request: Request, adapter: Adapter | None = None, on_close: Callable[[], None] = lambda: None) -> Stream:
        """Queue a request and give its stream, which must be closed.

        Args:
            on_close: called once when the stream closes, in the loop: gives the adapter's lease back.
        Background work ends at once with the reason "abort", and is out of the engine before this request's first step.

        Raises:
            InvalidRequest, AdapterError: the request can never run. Overloaded: too many are open, or, for background work, any that
            somebody waits for. Nothing is queued then.
        """
        if self.failure is not None:
            raise EngineError(_STOPPED)
        if self.is_rebuilding:
            raise Overloaded("the engine is being built anew; try again in a moment")
        if self._is_stopping:
            raise Draining("the server is shutting down; send the request to another one")
        limit = 1 if request.is_background else self._max_open
        if self.num_open >= limit:
            raise Overloaded(f"{self.num_open} requests are running or waiting, which is the limit; try again later")
        self._engine.check(request)
        stream = Stream(self, request, adapter, on_close)
        if request.is_background:
            self._background[request.request_id] = stream
        else:
            self.end_background()
            self._left_at = time.monotonic()
        self._streams[request.request_id] = stream
        self._commands.put(lambda: self._add(stream))
        return stream

    def discard(self, stream: Stream) -> None:
        """A stream closes: forget it, and cancel its request if it still runs."""
        if self._streams.pop(stream.request.request_id, None) is not None:
            if self._background.pop(stream.request.request_id, None) is None:
                self._left_at = time.monotonic()
            self._commands.put(lambda: self._cancel(stream.request.request_id))

    def end_background(self) -> None:
        """Somebody comes, or what background work holds is needed: it ends now, and no later than the step that runs."""
        for stream in list(self._background.values()):
            sequence = stream.sequence or Sequence(stream.request, list(stream.request.prompt_ids), b"")
            stream.deliver(TokenEvent(sequence, None, finish_reason="abort"))
            stream.close()

    def set_paused(self, stream: Stream, is_paused: bool) -> None:
        def command() -> None:
            sequence = self._sequences.get(stream.request.request_id)
            if sequence is not None:
                sequence.is_paused = is_paused

        self._commands.put(command)

    def drop(self, revision: str, reason: EvictionReason = "unloaded") -> None:
        """A revision is gone for good: free its slot once nothing uses it."""
        self._commands.put(lambda: self._engine.drop(revision, reason))

    def warm(self, adapter: Adapter) -> None:
        """Lay an adapter out for the backend ahead of the step that first needs it, unless it stands in a slot. For worker threads; what
        they see of the slots may be a step old, which costs at most a layout too many, or one in a step."""
        if self._engine.slot_table.find(adapter.revision) is None:
            self._engine.model.warm(adapter)

    def cool(self, revision: str) -> None:
        """An adapter left host memory; its slot, if it stands in one, stays usable."""
        self._engine.model.cool(revision)

    async def pardon(self, revision: str) -> None:
        """A revision was loaded again: end its quarantine. It is over then: who is told of the load may use it at once."""
        is_done = asyncio.Event()

        def command() -> None:
            self._engine.pardon(revision)
            self._call_loop(is_done.set)

        self._commands.put(command)
        while not (is_done.is_set() or self._is_stopping or self.failure is not None):  # those two leave commands where they are
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await is_done.wait()

    def trim(self) -> None:
        """Memory is short: give back what the engine only keeps for later."""
        self._commands.put(lambda: self._engine.trim())

    def forget_routing(self, revision: str) -> None:
        """A self-test has ended: what its adapter's routers said is not counted. For requests that are queued from now on."""
        self._commands.put(lambda: self._engine.forget_routing(revision))

    def _end_all(self, error: MoaError) -> None:
        for stream in list(self._streams.values()):
            self._end(stream, error)

    def _end(self, stream: Stream, error: MoaError) -> None:
        sequence = stream.sequence or Sequence(stream.request, list(stream.request.prompt_ids), b"")
        stream.deliver(TokenEvent(sequence, None, finish_reason="error", error=error))

    def _deliver(self, events: list[tuple[str, TokenEvent, Collected | None]]) -> None:
        for request_id, event, collected in events:
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.collected = collected or stream.collected
                stream.deliver(event)

    # -- the engine thread's side

    def _lease(self, revision: str) -> AbstractContextManager[Adapter]:
        return nullcontext(self._adapters[revision])

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._take_commands(block=not self._engine.has_work)
                if self._engine.has_work and not self._is_stopping:
                    self._step()
        except Exception as error:
            logger.exception("the engine thread ends")
            self.failure = f"{type(error).__name__}: {error}"
            self._fail_all()
            # Those that were still on their way here.
            self._call_loop(lambda: self._end_all(EngineError(_STOPPED)))

    def _take_commands(self, *, block: bool, timeout: float | None = None) -> None:
        self._num_turns += 1
        try:
            self.is_working = False
            command = self._commands.get(block=block, timeout=timeout)
            self.is_working = True
            while True:
                command()
                self._num_turns += 1
                command = self._commands.get_nowait()
        except queue.Empty:
            self.load = self._measure(self.load.steps)  # a cancelled row is gone now, though no step may follow
        self.is_working = self._engine.has_work

    def _step(self) -> None:
        try:
            if faults.active:
                faults.active.strike("step")
            events = self._engine.step()
        except Exception:
            # What one request or adapter caused has ended with it, so this is ours; nobody waits for ever because of it.
            logger.exception("a step failed; its requests end with an error")
            self._engine.incidents["failed_step"] += 1
            self._failed_steps += 1
            self._fail_all()
            if self._failed_steps >= _BROKEN_AFTER:
                if self._rebuilt_at is not None and time.monotonic() - self._rebuilt_at < _GIVE_UP_SECONDS:
                    raise
                self._rebuild()
            return
        self._failed_steps = 0
        self.load = self._measure(self.load.steps + 1)
        self._observe(events)
        if events:
            self._hand_over(events)
        elif not self._engine.did_work:
            self._take_commands(block=True, timeout=_IDLE_SECONDS)  # everything is paused, or waits for what paused rows hold

    def _rebuild(self) -> None:
        """A new cache, new slots, new buffers and threads over the base that is there. Commands wait for it."""
        started = time.monotonic()
        self.is_rebuilding = True
        try:
            self._engine = self._engine.rebuilt()
        finally:
            self.is_rebuilding = False
        self._failed_steps, self._rebuilt_at = 0, time.monotonic()
        self._engine.incidents["rebuilt"] += 1
        logger.error("%d steps failed one after the other; the engine was built anew in %.2f s", _BROKEN_AFTER, self._rebuilt_at - started)

    def _measure(self, steps: int) -> Load:
        scheduler, pool = self._engine.scheduler, self._engine.block_pool
        usage = pool.num_held / max(1, pool.num_held + pool.num_free)
        resident = frozenset(self._engine.slot_table.revisions)
        unseen = Counter(sequence.status for sequence in self._sequences.values() if sequence.request.is_background)
        running = scheduler.num_running - unseen[SequenceStatus.RUNNING]
        waiting = scheduler.num_waiting - unseen[SequenceStatus.WAITING]
        return Load(running, waiting, usage, steps, self._engine.num_preemptions, resident)

    def _observe(self, events: list[TokenEvent]) -> None:
        if self.on_step is None:
            return
        try:
            self.on_step(self._engine, events)
        except Exception:  # who watches the engine must not be able to stop it
            logger.exception("observing a step failed")

    def _hand_over(self, events: list[TokenEvent]) -> None:
        """One call into the loop for the whole step."""
        bundle = []
        for event in events:
            request_id = event.sequence.request.request_id
            collected = None
            if event.finish_reason is not None:
                collected = self._engine.collected.pop(request_id, None)
                self._forget(request_id)
            bundle.append((request_id, event, collected))
        self._call_loop(lambda: self._deliver(bundle))

    def _call_loop(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed: nobody is left to hear it
            logger.debug("the event loop is gone")

    def _add(self, stream: Stream) -> None:
        if stream.is_closed:
            return
        try:
            sequence = self._engine.add(stream.request)
        except Exception as error:  # its adapter was quarantined since `open`, say
            told = error if isinstance(error, MoaError) else EngineError("the request could not be queued; the log has the details")
            if told is not error:
                logger.exception("a request could not be queued")
            self._call_loop(lambda: self._end(stream, told))
            return
        stream.sequence = self._sequences[stream.request.request_id] = sequence
        if stream.adapter is not None:
            self._adapters[stream.adapter.revision] = stream.adapter

    def _cancel(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._engine.end(sequence, "abort")
            self._engine.collected.pop(request_id, None)
            self._forget(request_id)
            self._observe([TokenEvent(sequence, None, finish_reason="abort")])  # its last tokens are in no step's events

    def _forget(self, request_id: str) -> None:
        sequence = self._sequences.pop(request_id)
        revision = sequence.request.adapter
        if revision is not None and all(other.request.adapter != revision for other in self._sequences.values()):
            self._adapters.pop(revision, None)

    def _fail_all(self) -> None:
        events = []
        for sequence in list(self._sequences.values()):
            self._engine.end(sequence, "error")
            error = EngineError("the engine failed while this request ran; the log has the details")
            events.append(TokenEvent(sequence, None, finish_reason="error", error=error))
        if events:
            self._hand_over(events)
