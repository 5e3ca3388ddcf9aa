"""One step of a model, built once and run as often as a measurement wants: pages with a context in them, and a batch that goes on from it.

For any backend. Of what the engine's runner does in every step, `Workload.run` does the attention's layout anew; the batch stays. Owned by
the thread that measures.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moa_serve.adapter.rules import RoutingRules
from moa_serve.bench.timing import seconds
from moa_serve.config import ModelConfig
from moa_serve.errors import InvalidRequest
from moa_serve.model.attention import CachedSpan
from moa_serve.model.backend import Backend, PreparedAdapter
from moa_serve.model.batch import ForwardBatch, PooledRows, RoutingTrace, Segment
from moa_serve.model.counters import RouterCounters
from moa_serve.model.memory import available_bytes

PAGE = 16  # tokens; the native backend knows no other size
CONTEXT = 128  # tokens before a decoded one, by default
_CHUNK = 512  # tokens of a context that are computed at once; all of a long one would need buffers as large as the cache
_MEASURED_SECONDS, _MOST_STEPS = 0.1, 64  # of one measurement: long against a clock's ticks, short against a machine's moods


def num_pages(tokens: int) -> int:
    return -(-tokens // PAGE)


def refuse_beyond(config: ModelConfig, num_tokens: int, asked: str, param: str) -> None:
    """Raises InvalidRequest: so many tokens, which are what was `asked`, do not fit the base."""
    if num_tokens > config.max_position:
        raise InvalidRequest(f"{asked} are more than the {config.max_position} tokens that the base was made for", param=param)


def steps_for(run: Callable[[], object]) -> int:
    """How many runs make a measurement of about a tenth of a second. The first runs, which fill buffers and caches, do not count."""
    run()
    run()
    return max(1, min(_MOST_STEPS, round(_MEASURED_SECONDS / seconds(run))))


def has_goals(model: Backend) -> bool:
    """Those of goals.py are a CPU's."""
    return model.device.type == "cpu"


def wait_for(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def random_ids(model: Backend, rows: int, tokens: int, seed: int) -> Tensor:
    """(rows, tokens) int64 on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, tokens), generator=generator).to(model.device)


class Pages:
    """The cache of a model, with a sequence of random tokens in it for each row of a batch.

    All workloads of a model go on from the same pages: what a step costs depends on how many tokens it attends to, not on their keys and
    values, so the base computes them once, and every step writes the place behind them again. One a model, as its cache is.

    Args:
        contexts: tokens of each sequence.
        spare: tokens that have pages beside these, to prefill into.
    Raises:
        InvalidRequest: so many tokens do not fit memory.
    """

    def __init__(self, model: Backend, contexts: Sequence[int], *, spare: int = 0) -> None:
        self.model, self.contexts = model, tuple(contexts)
        ends = list(itertools.accumulate((num_pages(context + 1) for context in contexts), initial=1))  # page 0 is padding to torch
        used = range(1, ends[-1] + num_pages(spare))
        needed, free = used.stop * model.bytes_per_block(PAGE), available_bytes(model.device)
        if needed > free:
            raise InvalidRequest(
                f"a cache for {len(contexts)} rows with a context of up to {max(contexts)} tokens takes {needed} bytes, but {free} are "
                f"free; measure fewer rows or a shorter context",
                param="context",
            )
        self.cache = model.new_cache(used.stop, PAGE)
        self.cache.zero(used)
        self.tables = [list(range(start, end)) for start, end in itertools.pairwise(ends)]
        self._spare = list(range(ends[-1], used.stop))
        drawn = random_ids(model, len(contexts), max(contexts), seed=0)
        self.token_ids = [ids[:context] for ids, context in zip(drawn, contexts, strict=True)]  # of each row (context,)
        self._fill()

    @torch.inference_mode()
    def _fill(self) -> None:
        for token_ids, table in zip(self.token_ids, self.tables, strict=True):
            for start in range(0, len(token_ids), _CHUNK):
                chunk = token_ids[start : start + _CHUNK]
                positions = torch.arange(start, start + len(chunk), device=self.model.device)
                batch = ForwardBatch(chunk, positions, logit_rows=positions[-1:] - start)
                self.model.forward(batch, self.cache.attention([CachedSpan(0, len(chunk), start, table)]))

    def spare_tables(self, rows: int, tokens: int) -> list[list[int]]:
        """Pages for `rows` new sequences of `tokens` tokens; whoever asks next gets the same."""
        size = num_pages(tokens)
        assert rows * size <= len(self._spare), f"there are spare pages for {len(self._spare) * PAGE} tokens only"
        return [self._spare[row * size : (row + 1) * size] for row in range(rows)]


class Workload:
    """A step with one adapter for each row, None for the base alone; neighbours with the same one make a segment, as in the engine.

    Instance-level adapters decode with random weights, where their prompt's would be, and prefill as whole prompts. Routers are counted, as
    they are in serving.

    Args:
        rules: of each row, how its adapter's routers choose, None for its own way; None for the own way of all. They part segments, too.
        tokens: of each row: one behind its context, or several with nothing before them.
        context: tokens before a decoded one; None for all that the first row's pages hold. Fewer than they hold write into the midst of
            them, which no other workload's cost depends on.
        first_row: of the pages, where not all of their rows decode.
    """

    def __init__(
        self,
        pages: Pages,
        adapters: Sequence[PreparedAdapter | None],
        *,
        rules: Sequence[RoutingRules | None] | None = None,
        tokens: int = 1,
        context: int | None = None,
        first_row: int = 0,
        seed: int = 1,
    ) -> None:
        rows, end, device = len(adapters), first_row + len(adapters), pages.model.device
        tables = pages.tables[first_row:end] if tokens == 1 else pages.spare_tables(rows, tokens)
        assert len(tables) == rows, f"the pages hold {len(pages.tables)} rows"
        computed = 0
        if tokens == 1:
            computed = pages.contexts[first_row] if context is None else context
            assert computed <= min(pages.contexts[first_row:end]), f"the pages of these rows hold less than {computed} tokens"
        # For all of the pages' rows, so that a row has the same tokens whichever others are in the batch.
        token_ids = random_ids(pages.model, max(len(pages.tables), end), tokens, seed)[first_row:end]
        self.pages, self.num_tokens = pages, rows * tokens
        self.spans = [CachedSpan(row * tokens, tokens, computed, table) for row, table in enumerate(tables)]
        self.batch = ForwardBatch(
            token_ids.flatten(),
            torch.arange(computed, computed + tokens, device=device).repeat(rows),
            tuple(_segments(adapters, rules or [None] * rows, tokens, device)),
            torch.arange(tokens - 1, rows * tokens, tokens, device=device),
        )

    @torch.inference_mode()
    def run(self) -> Tensor:
        """(rows, V) float32, logits of each row's last token, when they are there: a GPU is waited for, as the sampler does."""
        logits = self.pages.model.forward(self.batch, self.pages.cache.attention(self.spans))
        wait_for(logits)
        return logits

    @torch.inference_mode()
    def trace(self) -> RoutingTrace:
        """What the routers say in this step."""
        trace = RoutingTrace()
        self.pages.model.forward(replace(self.batch, trace=trace), self.pages.cache.attention(self.spans))
        return trace


def _segments(
    adapters: Sequence[PreparedAdapter | None], rules: Sequence[RoutingRules | None], tokens: int, device: torch.device
) -> Iterator[Segment]:
    counters: dict[int, RouterCounters] = {}
    first = 0
    for (adapter, rule), run in itertools.groupby(zip(adapters, rules, strict=True)):  # adapters are equal to themselves only
        count = len(list(run))
        if adapter is not None:
            if id(adapter) not in counters:
                counters[id(adapter)] = RouterCounters(adapter.manifest, device)
            pooled = _pooled(adapter, count, tokens, device) if adapter.manifest.is_pooled else None
            yield Segment(first * tokens, (first + count) * tokens, adapter, pooled, counters[id(adapter)], rule)
        first += count


def _pooled(adapter: PreparedAdapter, rows: int, tokens: int, device: torch.device) -> PooledRows:
    if tokens > 1:
        return PooledRows.of_whole([tokens] * rows, [tokens] * rows, adapter, device)
    generator = torch.Generator().manual_seed(0)
    words = torch.rand(PooledRows.shape(rows, adapter), generator=generator)
    return PooledRows(torch.arange(rows, device=device), (None,) * rows, words.to(device))


def selected_share(trace: RoutingTrace) -> float | None:
    """Of all that the routers chose among; None where there is no router."""
    selected = [routed.selected for layers in trace.records.values() for sites in layers.values() for routed in sites.values()]
    if not selected:
        return None
    return float(torch.cat([one.flatten() for one in selected]).float().mean())
