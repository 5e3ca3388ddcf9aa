"""Decode steps recorded as CUDA graphs, once when a model starts: for some numbers of rows, without adapters and with.

A recorded step reads its numbers at fixed addresses (`StaticStep`), and adapters in their slots, so it stays right whatever is there: it
covers as many rows as it was recorded for, each of which may be of another adapter. Fewer rows are computed by the next larger one, whose
last rows are none. Recorded on the engine thread, which owns all of it.
"""

import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from moa_serve.gpu.kernels import CHUNK_FIELDS
from moa_serve.gpu.plan import ROW_BUCKETS
from moa_serve.gpu.step import HostNumbers, StepBuffers
from moa_serve.model.graphs import Recorder, Replay

logger = logging.getLogger(__name__)

_LEAST_WIDTH = 16  # pages of a row that are copied at least, so that copies have few shapes


class StaticStep:
    """The numbers of steps of up to `rows` rows, at fixed addresses.

    Args:
        width: pages that a row has at most. given: layers, and numbers of layer gates and scores of a token.
    """

    def __init__(self, rows: int, width: int, given: tuple[int, int], device: torch.device) -> None:
        self.rows = rows
        # One copy for all: addresses of counters, which are 64 bits wide, then chunks, places, lengths, slots.
        sizes = (8 * rows, CHUNK_FIELDS * rows, rows, rows, rows)
        self._ends = np.cumsum(sizes).tolist()
        self._ints = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        counters, chunks, places, lengths, slots = torch.split(self._ints, list(sizes))
        self.buffers = StepBuffers(
            token_ids=torch.zeros(rows, dtype=torch.int64, device=device),
            positions=torch.zeros(rows, dtype=torch.int64, device=device),
            chunks=chunks.view(rows, CHUNK_FIELDS),
            places=places,
            rows=None,
            lengths=lengths,
            slots=slots,
            tables=torch.zeros(rows, width, dtype=torch.int32, device=device),
            counters=counters.view(torch.int64).view(rows, 4),
            given=torch.zeros(given[0], rows, given[1], device=device),
            logit_rows=torch.zeros(rows, dtype=torch.int64, device=device),
        )
        self.clear()

    def clear(self) -> None:
        """No rows."""
        self._ints.copy_(self._packed(0, None))

    def fill(self, token_ids: Tensor, positions: Tensor, logit_rows: Tensor, numbers: HostNumbers) -> None:
        """The next step's; the rows behind them are none."""
        own, count = self.buffers, len(token_ids)
        self._ints.copy_(self._packed(count, numbers), non_blocking=True)
        own.token_ids[:count].copy_(token_ids)
        own.positions[:count].copy_(positions)
        own.logit_rows[: len(logit_rows)].copy_(logit_rows)
        used = min(max(_LEAST_WIDTH, 1 << (numbers.tables.shape[1] - 1).bit_length()), own.tables.shape[1])
        tables = np.zeros((count, used), dtype=np.int32)
        tables[:, : numbers.tables.shape[1]] = numbers.tables
        own.tables[:count, :used].copy_(torch.from_numpy(tables), non_blocking=True)

    def _packed(self, count: int, numbers: HostNumbers | None) -> Tensor:
        out = np.zeros(self._ends[-1], dtype=np.int32)
        counters, chunks, places, _, slots = np.split(out, self._ends[:-1])
        places[:], slots[:] = -1, -1
        if numbers is not None:
            counters[: 2 * numbers.counters.size] = numbers.counters.view(np.int32).ravel()
            chunks[: numbers.chunks.size] = numbers.chunks.ravel()
            places[:count], slots[:count] = numbers.places, numbers.slots
            out[self._ends[2] : self._ends[2] + count] = numbers.lengths
        return torch.from_numpy(out)


class RowGraphs:
    """Recorded steps by number of rows and kind.

    Args:
        compute: a step's device part: its numbers, and whether there are adapters -> logits (rows, V).
    """

    def __init__(self, recorder: Recorder, compute: Callable[[StepBuffers, bool], Tensor]) -> None:
        self._recorder, self._compute = recorder, compute
        self._steps: dict[int, StaticStep] = {}
        self._replays: dict[tuple[int, bool], Replay] = {}

    @property
    def num_recorded(self) -> int:
        return len(self._replays)

    def record(self, most_rows: int, width: int, given: tuple[int, int], device: torch.device) -> None:
        """All of them up to `most_rows`. What was recorded before is gone."""
        self.clear()
        started = time.perf_counter()
        for rows in reversed([rows for rows in ROW_BUCKETS if rows <= most_rows]):  # the largest first: the others fit into its memory
            self._steps[rows] = step = StaticStep(rows, width, given, device)
            for has_adapter in (False, True):
                self._compute(step.buffers, has_adapter)  # kernels are compiled, and products find their workspaces
                self._replays[rows, has_adapter] = self._recorder.record(lambda s=step, h=has_adapter: self._compute(s.buffers, h))  # type: ignore[misc]
        logger.info("recorded %d decode steps in %.1f s", len(self._replays), time.perf_counter() - started)

    def clear(self) -> None:
        self._steps.clear()
        self._replays.clear()
        self._recorder.renew()

    def step(self, rows: int) -> StaticStep | None:
        """Where the numbers of a step of so many rows go; None where it is not recorded."""
        found = next((bucket for bucket in sorted(self._steps) if bucket >= rows), None)
        return None if found is None else self._steps[found]

    def replay(self, step: StaticStep, has_adapter: bool) -> Tensor:
        """(rows, V) float32, overwritten by the next one."""
        return self._replays[step.rows, has_adapter]()
