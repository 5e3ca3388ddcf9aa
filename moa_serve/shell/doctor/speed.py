"""The bench of the doctor: decode steps with adapters over those of the base alone, on the backend that would serve, against the goals.

Interleaved rounds, medians of what each round says (bench/timing.py); a step waits for the device. On a base with made-up weights in
LLaMA's shapes. Two minutes; `moa-serve bench step` measures more.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from moa_serve.bench import goals
from moa_serve.bench.goals import Judged
from moa_serve.bench.shapes import SHAPES, made_up_base
from moa_serve.bench.step import WARMUPS, Clock
from moa_serve.bench.synthetic import SPARE_TOKENS, made_up, slot_shape
from moa_serve.bench.timing import Spread, interleaved, quiet, ratio
from moa_serve.bench.workload import CONTEXT, Pages, Workload, steps_for
from moa_serve.config import ModelConfig
from moa_serve.engine.engine import EngineOptions
from moa_serve.llm import new_model, resolve
from moa_serve.model.backend import Backend, PreparedAdapter
from moa_serve.shell.doctor.findings import Finding, Progress, Subject
from moa_serve.shell.doctor.made_up import own_cache

ROWS = (1, 16, goals.DISTINCT_ADAPTERS)
BASE, CONTROL, DISTINCT = "base", "control", "distinct soft_moa"
FAMILIES = ("soft_moa", "sparse_moa")
_LARGE_BYTES = 24 * 10**9  # of a GPU from which on it is measured with the larger base
_ROUNDS = 15


@dataclass(frozen=True, slots=True)
class Row:
    """One case at one number of rows, each of which decodes a token.

    Args:
        ms: milliseconds a step.
        to_base: its step over the base's, round by round.
    """

    rows: int
    case: str
    ms: Spread
    to_base: Judged

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "case": self.case, "ms": self.ms.to_json(), "to_base": self.to_base.to_json()}


def bench(subject: Subject) -> Finding:
    """Missed goals are a warning: slow is not wrong."""
    if subject.is_quick:
        return Finding("skipped", "--quick leaves it out")
    if not subject.is_on_gpu:
        return Finding("skipped", "its goals are a GPU's; `moa-serve bench step` measures a CPU")
    total = torch.cuda.get_device_properties(0).total_memory
    shapes = "llama-3.1-8b" if total >= _LARGE_BYTES else "llama-3.2-1b"
    return measured(subject, shapes, SHAPES[shapes])


def measured(subject: Subject, name: str, config: ModelConfig, *, rounds: int = _ROUNDS, inner_steps: int | None = None) -> Finding:
    """The finding for a made-up base of these shapes."""
    backend, device, dtype = resolve(subject.backend, subject.device, "auto")
    subject.on_progress(f"bench: making up weights for {name}")
    base = made_up_base(name, config, dtype, device)
    rows: list[Row] = []
    for num_adapters, sizes in ((1, ROWS), (goals.DISTINCT_ADAPTERS, ROWS[-1:])):
        # A server with eight slots for most, and one with a slot for each of many: what a step costs a GPU depends on how many there are.
        options = EngineOptions(num_slots=max(EngineOptions().num_slots, num_adapters + len(FAMILIES) + 1))
        shape = slot_shape(FAMILIES, base.config)
        with own_cache(), quiet(), closing(new_model(backend, base, options=options, shape=shape)) as model:
            found = measure(model, num_adapters, sizes=sizes, rounds=rounds, inner_steps=inner_steps, on_progress=subject.on_progress)
        many = f", {options.num_slots} slots" if num_adapters > 1 else ""
        rows += [replace(row, case=row.case + many) for row in found]
        if num_adapters == 1:
            del model
            base = made_up_base(name, config, dtype, device)  # the first model took the weights over
    facts = {
        "base": name,
        "backend": backend,
        "dtype": str(dtype).removeprefix("torch."),
        "context": CONTEXT,
        "rounds": rounds,
        "rows": [row.to_json() for row in rows],
    }
    missed = [row for row in rows if row.to_base.is_met is False]
    judged = [row for row in rows if row.to_base.goal is not None]
    said = f"{name} on {backend}, {facts['dtype']}: {len(judged) - len(missed)} of {len(judged)} goals met"
    if not missed:
        return Finding("ok", said, details=facts)
    worst = "; ".join(f"{row.case} at {row.rows}: {row.to_base.found.median:.3f}, goal {row.to_base.goal:g}" for row in missed)
    return Finding("warning", f"{said} ({worst})", "let nothing else run, and see whether the control is near 1; report it", facts)


def measure(
    model: Backend,
    num_adapters: int,
    *,
    sizes: Sequence[int] = ROWS,
    rounds: int = _ROUNDS,
    inner_steps: int | None = None,
    on_progress: Progress = lambda _: None,
) -> list[Row]:
    """Every case at every number of rows: one adapter of each family for all of them, or `num_adapters` where there are as many.

    `inner_steps`: of one measurement; None for about a tenth of a second.
    """
    on_progress("bench: filling the cache and making adapters")
    pages = Pages(model, [CONTEXT] * max(sizes), spare=SPARE_TOKENS)
    single = {family: made_up(pages, family, seed=0) for family in FAMILIES}
    # The same numbers at as many places: what a step costs does not depend on them, and to draw them takes longer than to measure.
    several, prepared = [], {}
    if num_adapters > 1:
        several = [model.prepare(replace(single["soft_moa"], revision=f"{index:064x}")) for index in range(num_adapters)]
    else:
        prepared = {family: model.prepare(adapter) for family, adapter in single.items()}
    found = []
    for rows in sizes:
        on_progress(f"bench: decoding {rows} {'row' if rows == 1 else 'rows'}")
        found += _measure_size(pages, prepared, several, rows, rounds, inner_steps)
    return found


def _measure_size(
    pages: Pages,
    prepared: Mapping[str, PreparedAdapter],
    several: Sequence[PreparedAdapter],
    rows: int,
    rounds: int,
    inner_steps: int | None,
) -> list[Row]:
    adapters: dict[str, list[PreparedAdapter | None]] = {BASE: [None] * rows, CONTROL: [None] * rows}
    adapters |= {family: [adapter] * rows for family, adapter in prepared.items()}
    if rows == len(several):
        adapters[DISTINCT] = list(several)
    work = {name: Workload(pages, own) for name, own in adapters.items()}
    steps = inner_steps or steps_for(work[BASE].run)
    clock = Clock(pages.model)
    cases: dict[str, Callable[[], float]] = {name: clock.measurement(name, [one], steps) for name, one in work.items()}
    times = interleaved(cases, rounds, warmups=WARMUPS)
    return [
        Row(rows, name, Spread.of([1e3 * value for value in values]), Judged(ratio(values, times[BASE]), _goal(name, rows)))
        for name, values in times.items()
    ]


def _goal(case: str, rows: int) -> float | None:
    if case == DISTINCT:
        return goals.DISTINCT_TO_BASE_ON_GPU
    return goals.adapter_to_base_on_gpu(rows) if case in FAMILIES else None
