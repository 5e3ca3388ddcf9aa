"""Watchdog: a thread that sees what the others cannot say of themselves, that they are stuck.

The engine thread must get on while it has work: with a step, a command, or a layer of a step, so that a long prefill is no reason. Where
nothing moves for too long, the stacks of all threads go to the log, whoever waits is told, and the process ends with 70, for whoever
supervises it to start another. The event loop must turn: a turn that takes more than a second leaves its stack in the log.

A process that was stopped (SIGSTOP, a suspended machine) is not stuck: time counts only as far as this thread was awake itself. Code that
holds the interpreter's lock for ever stops this thread as well; then health does not answer, and the supervisor must act by itself.
"""

import asyncio
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from moa_serve.engine.async_engine import AsyncEngine
from moa_serve.engine.buckets import Buckets

logger = logging.getLogger(__name__)

STUCK = 70  # exit code
STALLS = (0.25, 1.0)  # seconds of a turn of the event loop that are counted
LAG_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
TICK_SECONDS = 0.25
BEAT_SECONDS = 0.05
_GRACE_SECONDS = 2.0  # for the errors to reach their readers, and for a probe to see that health says no
_MOST_FRAMES = 30  # of one thread, innermost; a line of the log is cut at 8 KiB


class Watchdog:
    """
    Args:
        stuck_seconds: without any progress of the engine while it has work.
        exit: ends the process; called in the thread.
    """

    def __init__(self, engine: AsyncEngine, *, stuck_seconds: float = 30.0, exit: Callable[[int], object] = os._exit) -> None:
        self._engine, self._stuck_seconds, self._exit = engine, stuck_seconds, exit
        self.num_stalls = dict.fromkeys(STALLS, 0)
        self.longest_stall_seconds = 0.0
        self.lag = Buckets(LAG_SECONDS)  # by how much each beat came late; the loop's
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moa-watchdog", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread: int | None = None
        self._num_ticks = 0
        self._beat_at = self._beat_cpu = 0.0
        self._beat_tick = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Watch the engine, and the loop that calls this."""
        self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
        self._remember_beat()
        self._timer = self._loop.call_later(BEAT_SECONDS, self._beat)
        self._thread.start()

    def stop(self) -> None:
        self._is_stopped.set()
        if self._timer is not None:
            self._timer.cancel()

    # -- in the loop

    def _remember_beat(self) -> None:
        self._beat_at, self._beat_cpu, self._beat_tick = time.monotonic(), time.process_time(), self._num_ticks

    def _beat(self) -> None:
        assert self._loop is not None
        late = time.monotonic() - self._beat_at - BEAT_SECONDS
        # Where neither this process computed nor the other thread woke in time, nobody ran: it was stopped, or had no core.
        has_run = time.process_time() - self._beat_cpu > late / 2 or self._num_ticks - self._beat_tick >= 2
        if late <= STALLS[0] or has_run:
            self.lag.add(max(0.0, late))
        if late > STALLS[0] and has_run:
            self.longest_stall_seconds = max(self.longest_stall_seconds, late)
            for limit in STALLS:
                self.num_stalls[limit] += late > limit
        self._remember_beat()
        self._timer = self._loop.call_later(BEAT_SECONDS, self._beat)

    # -- in the thread

    def _run(self) -> None:
        still, seen, told = 0.0, -1, 0.0
        woke = time.monotonic()
        while not self._is_stopped.wait(TICK_SECONDS):
            slept, woke = time.monotonic() - woke, time.monotonic()
            self._num_ticks += slept < 1.5 * TICK_SECONDS  # those that came in time show that the process ran
            progress = self._engine.progress
            is_still = self._engine.is_working and progress == seen and self._engine.failure is None
            still, seen = still + min(slept, 2 * TICK_SECONDS) if is_still else 0.0, progress
            if still >= self._stuck_seconds:
                self._end()
                return
            blocked = woke - self._beat_at if slept < 1.5 * TICK_SECONDS else 0.0
            if blocked > STALLS[0]:
                logger.info("the event loop has not turned for %.2f s:\n%s", blocked, self._stack(self._loop_thread))
            if blocked > STALLS[-1] and told != self._beat_at:
                told = self._beat_at
                logger.error("the event loop is blocked:\n%s", self._stack(self._loop_thread))

    def _end(self) -> None:
        reason = f"the engine thread made no progress for {self._stuck_seconds:g} s"
        logger.critical("%s; the process ends with %d", reason, STUCK)
        for thread in sorted(threading.enumerate(), key=lambda thread: thread.name != "moa-engine"):
            logger.critical("stack of %s:\n%s", thread.name, self._stack(thread.ident))
        self._engine.give_up(reason)
        time.sleep(_GRACE_SECONDS)
        self._exit(STUCK)

    def _stack(self, ident: int | None) -> str:
        frame = sys._current_frames().get(ident or 0)
        return "".join(traceback.format_stack(frame)[-_MOST_FRAMES:]) if frame is not None else "gone"
