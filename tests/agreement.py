"""Whether a server's own numbers agree with what its clients saw: `/metrics` and the log against the ledger of traffic.py.

A request that the client cancelled may have ended at the server in its own way just before, and may have made tokens that nobody read:
there the server's count is the truth, and only has to lie between what the client saw and what the request allowed.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from traffic import Entry, Ledger, Outcome

OTHER = "other"  # the label of requests whose adapter was not known when they ended, and of adapters beyond the grid
PAGE = 16  # tokens of the prefix cache
MAX_GROWTH = 1.05
JUDGED_SECONDS = 240.0
TWINS = (
    ("moa_generated_tokens_total", "vllm:generation_tokens_total"),
    ("moa_prompt_tokens_total", "vllm:prompt_tokens_total"),
    ("moa_cached_tokens_total", "vllm:prompt_tokens_cached_total"),
    ("moa_prefix_cache_hits_total", "vllm:prefix_cache_hits_total"),
    ("moa_request_seconds_count", "vllm:e2e_request_latency_seconds_count"),
    ("moa_time_to_first_token_seconds_count", "vllm:time_to_first_token_seconds_count"),
    ("moa_inter_token_seconds_count", "vllm:inter_token_latency_seconds_count"),
)
AT_REST = ("moa_requests_running", "moa_requests_waiting", "moa_kv_usage_ratio", "moa_streams_open", "moa_adapter_leases")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold, and the figures that say whether it does."""

    name: str
    is_met: bool
    detail: str


class Scrape:
    """One page of /metrics. Raises ValueError for a page that Prometheus's own parser does not read."""

    def __init__(self, text: str) -> None:
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples.setdefault(sample.name, []).append((sample.labels, sample.value))

    def total(self, name: str, **labels: str) -> float:
        """Sum over the series with these labels; 0 where there are none."""
        return sum(value for own, value in self._samples.get(name, []) if labels.items() <= own.items())

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Sums by the values of some labels."""
        found: dict[tuple[str, ...], float] = {}
        for own, value in self._samples.get(name, []):
            key = tuple(own[label] for label in labels)
            found[key] = found.get(key, 0.0) + value
        return found

    def without(self, is_left_out: Callable[[str, Mapping[str, str]], bool]) -> "Scrape":
        """The page without some series, by their names and labels."""
        page = Scrape("")
        for name, samples in self._samples.items():
            page._samples[name] = [(labels, value) for labels, value in samples if not is_left_out(name, labels)]
        return page

    @property
    def is_at_rest(self) -> bool:
        return all(self.total(name) == 0 for name in AT_REST)


class Delta:
    """What counters have gone up by between two scrapes."""

    def __init__(self, before: Scrape, after: Scrape) -> None:
        self._before, self._after = before, after

    def total(self, name: str, **labels: str) -> int:
        return round(self._after.total(name, **labels) - self._before.total(name, **labels))


def reconcile(ledger: Ledger, before: Scrape, after: Scrape, models: Sequence[str], *, has_faults: bool = False) -> list[Check]:
    """
    Args:
        has_faults: errors were injected, so that a request whose client left may have ended in one; it is counted once all the same.
        ledger: of all requests between the two scrapes, the one of `before` counted in it, the one of `after` not.
        models: every name that was asked for.
    """
    delta = Delta(before, after)
    return [
        _all_ended(ledger),
        _requests(ledger, delta, models, has_faults=has_faults),
        *([] if has_faults else [_refusals(ledger, delta)]),
        _tokens(ledger, delta, models, "moa_prompt_tokens_total"),
        _tokens(ledger, delta, models, "moa_generated_tokens_total"),
        _twins(delta),
        _responses(ledger, delta),
        _at_rest(after),
        *check_routers(after),
        _routed(ledger, delta, after, models),
    ]


def _all_ended(ledger: Ledger) -> Check:
    ended, errors = sum(ledger.outcomes.values()), ledger.outcomes[Outcome.ERROR]
    first = next((f"; the first: {entry.request_id}: {entry.detail}" for entry in ledger.of(Outcome.ERROR)), "")
    detail = f"{len(ledger.entries):,} begun, {ended:,} ended, {errors} in an error{first}"
    return Check("every request ends once, none in an error", ended == len(ledger.entries) and not errors, detail)


def _left(ledger: Ledger, model: str | None = None) -> list[Entry]:
    """Cancelled ones that the server must know of."""
    return [entry for entry in ledger.of(Outcome.CANCELLED, model) if entry.is_sent]


def _requests(ledger: Ledger, delta: Delta, models: Sequence[str], *, has_faults: bool) -> Check:
    wrong = []
    for model in models:
        ours = Counter(entry.finish_reason for entry in ledger.of(Outcome.OK, model))
        theirs = {reason: delta.total("moa_requests_total", adapter=model, finish_reason=reason) for reason in ("stop", "length", "abort")}
        num_left = len(_left(ledger, model))
        is_fine = all(theirs[reason] >= ours[reason] for reason in ("stop", "length")) and theirs["abort"] <= num_left
        if not is_fine or sum(theirs.values()) > ours.total() + num_left:
            wrong.append(f"{model}: server {theirs}, client {dict(ours)} and {num_left} cancelled")
    all_ours = ledger.outcomes[Outcome.OK] + len(_left(ledger))
    all_theirs = sum(delta.total("moa_requests_total", finish_reason=reason) for reason in ("stop", "length", "abort"))
    detail = "; ".join([f"server {all_theirs:,}, client {all_ours:,} of which {len(_left(ledger))} cancelled", *wrong])
    least = all_ours - len(_left(ledger)) if has_faults else all_ours
    return Check("requests by model and finish reason", least <= all_theirs <= all_ours and not wrong, detail)


def _refusals(ledger: Ledger, delta: Delta) -> Check:
    ours, theirs = ledger.outcomes[Outcome.REFUSED], delta.total("moa_requests_total", finish_reason="error")
    return Check("refused requests", ours == theirs, f"server {theirs:,}, client {ours:,}")


def _tokens(ledger: Ledger, delta: Delta, models: Sequence[str], name: str) -> Check:
    is_prompt = name == "moa_prompt_tokens_total"
    wrong, exact, of_cancelled = [], 0, 0
    for model in models:
        known = sum((entry.prompt_tokens or 0) if is_prompt else entry.generated_tokens for entry in ledger.of(Outcome.OK, model))
        left = [*_left(ledger, model), *(entry for entry in ledger.of(Outcome.REFUSED, model) if entry.is_planned)]
        least = sum((entry.prompt_tokens or 0) if is_prompt else entry.generated_tokens for entry in left)
        most = sum(_most_prompt(entry) if is_prompt else entry.job.n * entry.job.max_tokens for entry in left)
        theirs = delta.total(name, adapter=model)
        exact, of_cancelled = exact + known, of_cancelled + theirs - known
        if not known + least <= theirs <= known + most:
            wrong.append(f"{model}: server {theirs}, client {known} and of cancelled ones {least} to {most}")
    elsewhere = delta.total(name) - sum(delta.total(name, adapter=model) for model in models)
    if elsewhere:
        wrong.append(f"{elsewhere} of names that nobody asked for")
    return Check(name, not wrong, "; ".join([f"client {exact:,}, server the same and {of_cancelled:,} of cancelled requests", *wrong]))


def _most_prompt(entry: Entry) -> int:
    return entry.job.max_prompt_tokens if entry.prompt_tokens is None else entry.prompt_tokens


def _twins(delta: Delta) -> Check:
    wrong = [f"{ours} {delta.total(ours)}, {twin} {delta.total(twin)}" for ours, twin in TWINS if delta.total(ours) != delta.total(twin)]
    return Check("moa_* and vllm:* say the same", not wrong, "; ".join(wrong) or f"{len(TWINS)} pairs")


def _responses(ledger: Ledger, delta: Delta) -> Check:
    """A request that was cancelled before its response came may have got one, which must be a 200."""
    unseen = sum(entry.status is None for entry in _left(ledger))
    statuses = {200, *ledger.statuses}
    found = {status: (delta.total("moa_http_responses_total", status=str(status)), ledger.statuses[status]) for status in statuses}
    is_met = all(ours <= theirs <= ours + (unseen if status == 200 else 0) for status, (theirs, ours) in found.items())
    shown = ", ".join(f"{status}: {theirs:,} and {ours:,}" for status, (theirs, ours) in sorted(found.items()))
    return Check("responses by status", is_met, f"server and client: {shown}; {unseen} left before one came")


def _at_rest(after: Scrape) -> Check:
    shown = ", ".join(f"{name.removeprefix('moa_')} {after.total(name):g}" for name in AT_REST)
    return Check("nothing is held at the end", after.is_at_rest and after.total("moa_engine_failed") == 0, shown)


def check_routers(page: Scrape) -> list[Check]:
    """The router's counters among themselves: also true of a page that was read under load."""
    tokens = page.by("moa_router_tokens_total", "adapter", "layer")
    selected, computed, weights = (
        page.by(name, "adapter", "layer", "expert")
        for name in ("moa_expert_selected_total", "moa_expert_computed_total", "moa_expert_weight_total")
    )
    wrong = []
    for cell, count in selected.items():
        met = tokens[cell[:2]]
        # A weight is at most 1; the sum is one of float32 numbers.
        if not 0 <= count <= computed[cell] <= met or not 0 <= weights[cell] <= count * (1 + 1e-6):
            wrong.append(f"{cell}: selected {count}, computed {computed[cell]}, of tokens {met}, with weights {weights[cell]}")
    cells = Check("router: weights <= selected <= computed <= tokens", not wrong, "; ".join(wrong[:3]) or f"{len(selected):,} experts")
    return [cells, _router_sums(page, selected, computed, tokens)]


def _router_sums(page: Scrape, *cells: Mapping[tuple[str, ...], float]) -> Check:
    wrong = []
    adapters = sorted({cell[0] for cell in cells[0]})
    for adapter in adapters:
        selected, computed, tokens = (sum(value for cell, value in part.items() if cell[0] == adapter) for part in cells)
        kept, met = (page.total(f"moa_experts_per_token_{part}", adapter=adapter) for part in ("sum", "count"))
        evaluated, skipped = (page.total(f"moa_expert_evaluations{part}_total", adapter=adapter) for part in ("", "_skipped"))
        if (selected, tokens, computed) != (kept, met, evaluated - skipped):
            wrong.append(f"{adapter}: {selected, tokens, computed} by cell, {kept, met, evaluated - skipped} in all")
    return Check("router: sums over experts are the totals", not wrong, "; ".join(wrong) or f"{len(adapters)} adapters")


def _routed(ledger: Ledger, delta: Delta, after: Scrape, models: Sequence[str]) -> Check:
    """Every token of a finished request but the last, and those that were cached, went through the routers of its adapter; cancelled and
    repeated ones come on top."""
    name = "router: tokens cover those of finished requests"
    layers = after.by("moa_router_tokens_total", "adapter", "layer")
    if any(adapter == OTHER for adapter, _ in layers):
        return Check(name, True, "not looked at: there are more adapters than series")
    wrong, shown = [], []
    for model in models:
        need = sum(_least_routed(entry) for entry in ledger.of(Outcome.OK, model))
        counts = [delta.total("moa_router_tokens_total", adapter=model, layer=layer) for adapter, layer in layers if adapter == model]
        if counts:
            shown.append(f"{model} {min(counts):,} of {need:,}")
        if any(count < need for count in counts):
            wrong.append(model)
    return Check(name, not wrong, ", ".join(shown) or "no adapter has a router")


def _least_routed(entry: Entry) -> int:
    """What usage says is cached is what all rows found; all but one of them may have found every full page before the last token."""
    before_last = (entry.prompt_tokens or 0) - 1
    return before_last - entry.cached_tokens + (entry.job.n - 1) * (before_last % PAGE) + entry.generated_tokens


def reconcile_log(ledger: Ledger, lines: Iterable[Mapping[str, Any]]) -> list[Check]:
    """The server's log: one line for each request, which says what its client saw; no line of an error."""
    lines = list(lines)
    logged = [line for line in lines if line.get("event") == "request"]
    counts = Counter(str(line["request_id"]) for line in logged)
    known = {entry.request_id: entry for entry in ledger.entries if entry.is_sent}
    wrong = [f"{name}: {counts[name]} lines" for name in known if counts[name] != 1]
    wrong += [f"{name}: nobody sent it" for name in counts if name not in known]
    for line in logged:
        entry = known.get(str(line["request_id"]))
        if entry is not None and entry.outcome is Outcome.OK:
            names = ("status", "adapter", "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens")
            theirs = tuple(line[name] for name in names)
            tokens = (entry.prompt_tokens, entry.generated_tokens, entry.cached_tokens)
            ours = (entry.status, entry.job.adapter, entry.finish_reason, *tokens)
            wrong += [f"{entry.request_id}: {theirs}, but the client saw {ours}"] if theirs != ours else []
    bad = [line for line in lines if line.get("level") in ("warning", "error", "critical")]
    return [
        Check("one line of the log for each request", not wrong, "; ".join(wrong[:3]) or f"{len(logged):,} lines"),
        Check("no warning and no error in the log", not bad, f"{len(bad)} lines" + (f"; the first: {str(bad[0])[:600]}" if bad else "")),
    ]


def memory_is_flat(samples_bytes: Sequence[float], seconds: float) -> Check:
    """The median of the last fifth against that of the second: the first one belongs to what is filled once.

    The pages of the KV cache are touched when they are first used, so memory follows the most that was ever held at once, which takes
    minutes to come up: a short run shows its figures, and is not judged by them.
    """
    size = len(samples_bytes) // 5
    if not size:
        return Check("memory is flat", seconds < JUDGED_SECONDS, f"{len(samples_bytes)} samples are too few to tell")
    early, late = (statistics.median(part) for part in (samples_bytes[size : 2 * size], samples_bytes[-size:]))
    detail = f"{early / 2**20:,.1f} MiB in the second fifth, {late / 2**20:,.1f} MiB in the last: {late / early:.3f}, at most {MAX_GROWTH}"
    if seconds < JUDGED_SECONDS:
        return Check("memory is flat", True, f"{detail}; not judged, as the run is shorter than {JUDGED_SECONDS:g} s")
    return Check("memory is flat", late <= MAX_GROWTH * early, detail)
