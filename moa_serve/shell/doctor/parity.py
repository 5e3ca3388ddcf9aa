"""Checks that compute: a backend on its device against the torch definition, live and as the package's golden numbers have it.

Each makes an `LLM` as the command's arguments want it: any backend that `LLM` knows is checked, in the engine that serves. Not for speed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_serve.engine.request import SamplingParams
from moa_serve.llm import LLM, Completion, resolve
from moa_serve.shell.doctor import golden
from moa_serve.shell.doctor.findings import Finding, Subject
from moa_serve.shell.doctor.made_up import RECIPES, SMALL, TINY, prompt_ids, write_family, written

EXACT = 2e-4  # between float32 logits of a few units
# In bfloat16, of logits up to a row's first selection that flips: mean and largest distance; and the share of selections that do.
MEAN, LARGEST, FLIPS = 0.04, 0.6, {"mola": 0.025, "adamole": 0.025}
OTHER_FLIPS = 0.015
NUM_TOKENS = 24  # greedy ones: some more than a CUDA graph needs to be recorded
_REPORT = "answers would be wrong: do not serve with this backend here, serve with --backend torch --device cpu, and report it"
_SWAPPED = ("soft_moa", "sparse_moa")  # with a prompt and without: what the first leaves in the slot must not count


def kernels(subject: Subject) -> Finding:
    """Adapters of all families and heads as LLaMA's, float32: logits of each, and greedy tokens of all in one batch."""
    backend, device, _ = resolve(subject.backend, subject.device, "float32")
    if (backend, device.type) == ("torch", "cpu"):
        return Finding("skipped", "torch on a CPU is the definition itself")
    with written(SMALL) as (base, adapters), _definition(base, adapters) as exact, _opened(subject, base, adapters) as ours:
        names = [None, *adapters]
        prompts = [prompt_ids(5 + 3 * row, SMALL["vocab_size"], seed=row) for row in range(len(names))]
        off = {
            name: _distance(ours.logits(prompt, adapter=name), exact.logits(prompt, adapter=name))
            for name, prompt in zip(names, prompts, strict=True)
        }
        wrong = [f"{name or 'the base'} by {value:.1e}" for name, value in off.items() if not value <= EXACT]
        found, expected = (_greedy(llm, prompts, names) for llm in (ours, exact))
        parted = [name or "the base" for name, a, b in zip(names, found, expected, strict=True) if not _same_tokens(a, b)]
    where = f"{backend} on {device.type}, float32"
    if wrong or parted:
        parts = [f"logits off: {', '.join(wrong)}"] * bool(wrong) + [f"other greedy tokens: {', '.join(parted)}"] * bool(parted)
        return Finding("failed", f"{where}: {'; '.join(parts)}", _REPORT)
    said = f"{where}: {len(adapters)} adapters and the base within {max(off.values()):.1e} of the definition, greedy tokens equal"
    return Finding("ok", said)


def golden_numbers(subject: Subject) -> Finding:
    """The numbers that the package carries: in float32, and in bfloat16 where that is what would be served."""
    backend, device, served = resolve(subject.backend, subject.device, "auto")
    where, problems, said = f"{backend} on {device.type}", [], []
    expected = golden.read()
    with written(TINY) as (base, adapters):
        for dtype in dict.fromkeys(("float32", str(served).removeprefix("torch."))):
            with _opened(subject, base, adapters, dtype=dtype) as ours:
                close = closeness(golden.compute(ours), expected)
            problems += [f"{dtype}: {problem}" for problem in (misses_exact(close) if dtype == "float32" else misses_bfloat16(close))]
            flips, total = sum(one.flips for one in close.values()), sum(one.selections for one in close.values())
            largest = max(one.largest for one in close.values())
            said.append(f"{dtype} within {largest:.1e} of the numbers, {flips} of {total:,} selections flipped")
    if problems:
        return Finding("failed", f"{where}: {'; '.join(problems)}", _REPORT)
    return Finding("ok", f"{where}: {'; '.join(said)}")


@dataclass(frozen=True, slots=True)
class Closeness:
    """Of one adapter's numbers to the golden ones. Logits count up to a row's first flipped selection: then they are another expert's.

    Args:
        largest, mean: distance of the logits that count; NaN where one is not finite, 0 where none counts.
    """

    largest: float
    mean: float
    flips: int
    selections: int


def closeness(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Closeness]:
    """By adapter, "base" for the base alone; the keys are golden.compute's."""
    close = {}
    for name in (golden.BASE, *RECIPES):
        distances, flips, selections = [], 0, 0
        for row, prompt in enumerate(golden.PROMPTS):
            until, key = len(prompt), f"{name}/{row}/selected"
            if key in expected:
                flipped = found[key] != expected[key]  # (L, T, E)
                flips, selections = flips + int(flipped.sum()), selections + flipped.numel()
                until = int(flipped.any(2).any(0).int().argmax()) if bool(flipped.any()) else until
            key = f"{name}/{row}/logits"
            distances.append((found[key][:until] - expected[key][:until]).abs().flatten())
        distance = torch.cat(distances)
        if not len(distance):  # both rows flip at their first token
            distance = torch.zeros(1)
        close[name] = Closeness(float(distance.max()), float(distance.mean()), flips, selections)
    return close


def misses_exact(close: Mapping[str, Closeness]) -> list[str]:
    """What float32 may not be."""
    far = [f"{name} is off by {one.largest:.1e}" for name, one in close.items() if not one.largest <= EXACT]
    return far + [f"{name} selects {one.flips} other experts" for name, one in close.items() if one.flips]


def misses_bfloat16(close: Mapping[str, Closeness]) -> list[str]:
    """What bfloat16 may not be: the limits of tests/golden/test_native_bfloat16.py."""
    problems = []
    for name, one in close.items():
        if not (one.mean <= MEAN and one.largest <= LARGEST):
            problems.append(f"{name} is off by {one.mean:.3f} in the mean and {one.largest:.2f} at most (limits {MEAN} and {LARGEST})")
        most = FLIPS.get(RECIPES[name].variant, OTHER_FLIPS) if name in RECIPES else 0.0
        if one.flips > most * one.selections:
            problems.append(f"{name} selects {one.flips} of {one.selections} other experts (limit {most:.1%})")
    return problems


def swaps(subject: Subject) -> Finding:
    """One slot: an adapter decodes, another one in its place, the first again, and then another of its name; each as if it were alone.

    Where decode steps are CUDA graphs, they are replayed after each swap, and would show what a slot held before.
    """
    backend, device, _ = resolve(subject.backend, subject.device, "float32")
    prompt = prompt_ids(9, SMALL["vocab_size"])
    with written(SMALL, _SWAPPED) as (base, adapters), _opened(subject, base, adapters, num_slots=1) as ours:
        first, second = _SWAPPED
        another = adapters[first].with_name("another")
        write_family(another, first, SMALL, seed=1)
        with _definition(base, {**adapters, "another": another}) as exact:
            turns = [(first, first), (second, second), (None, None), (first, first)]
            found = [_greedy(ours, [prompt] * 2, [name] * 2) for name, _ in turns]
            ours.unload_adapter(first)
            ours.load_adapter(first, another)
            turns.append((first, "another"))
            found.append(_greedy(ours, [prompt] * 2, [first] * 2))
            recorded = getattr(ours._engine.model, "num_recorded", None)
            wrong = []
            for turn, ((_, name), rows) in enumerate(zip(turns, found, strict=True)):
                expected = _greedy(exact, [prompt], [name])[0]
                if not all(_same_tokens(row, expected) for row in rows):
                    wrong.append(f"{name or 'the base'} (turn {turn + 1})")
    where = f"{backend} on {device.type}, float32"
    if wrong:
        return Finding("failed", f"{where}: other tokens after a swap: {', '.join(wrong)}", _REPORT)
    said = f"{where}: {len(turns)} turns of {NUM_TOKENS} tokens in one slot, each as if it were alone"
    if recorded == 0 and device.type == "cuda":
        return Finding("failed", f"{said}; but no decode step was recorded as a CUDA graph", "report it, with the log of a server's start")
    return Finding("ok", said if recorded is None else f"{said}; {recorded} decode steps are recorded")


def _opened(subject: Subject, base: object, adapters: Mapping[str, object], *, dtype: str = "float32", num_slots: int = 8) -> LLM:
    resolved, _, _ = resolve(subject.backend, subject.device, dtype)
    return LLM(
        str(base),
        adapters={name: str(folder) for name, folder in adapters.items()},
        backend=resolved,  # by name: "auto" would serve by torch where a GPU's kernels fail their trial
        device=subject.device,
        dtype=dtype,
        kv_cache_bytes=golden.KV_CACHE_BYTES,
        num_slots=num_slots,
        prefix_cache=False,
    )


def _definition(base: object, adapters: Mapping[str, object]) -> LLM:
    return _opened(Subject(backend="torch", device="cpu"), base, adapters)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def _greedy(llm: LLM, prompts: Sequence[list[int]], names: Sequence[str | None]) -> list[Completion]:
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=2)
    return llm.generate(prompts, params, adapter=names)


def _same_tokens(found: Completion, expected: Completion) -> bool:
    """Equal, or parting where the definition finds both tokens as good within twice the tolerance: then all that follows differs."""
    ours, theirs = found.token_ids, expected.token_ids
    if ours == theirs:
        return True
    if len(ours) != len(theirs) or expected.logprobs is None:
        return False
    first = next(index for index, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    best = dict(expected.logprobs[first].top)
    return ours[first] in best and best[theirs[first]] - best[ours[first]] <= 2 * EXACT
