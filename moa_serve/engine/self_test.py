"""The self-test of an adapter: on a short prompt it must give finite logits that are not the base's.

Only the questions and the judgement: who asks runs the two requests, `LLM` step by step and the server through its streams. So "it
loaded" always means "it does something", and an adapter that overflows is refused before anyone is served by it. Owns no state.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.rules import RoutingRules
from moa_serve.engine.engine import Collected
from moa_serve.engine.request import Request, SamplingParams
from moa_serve.engine.routing import Routing, assemble, unchanged_reason
from moa_serve.errors import AdapterIneffective, AdapterNotFinite

NUM_TOKENS = 12


def trial_prompt(vocab_size: int, max_model_len: int) -> tuple[int, ...]:
    """Ids spread over the vocabulary: every prompt is as good, but the same one makes a failure repeatable."""
    return tuple((1 + 7919 * index) % vocab_size for index in range(min(NUM_TOKENS, max_model_len)))


def score_request(
    token_ids: Sequence[int],
    revision: str | None,
    manifest: Manifest | None,
    *,
    rules: RoutingRules | None = None,
    logits: bool = True,
    routing: bool = True,
) -> Request:
    """A request that scores its prompt: the logits of every token (V numbers each) and, where there is a router, what it says of them."""
    return Request(
        tuple(token_ids),
        SamplingParams(max_tokens=0),
        revision,
        is_pooled=manifest is not None and manifest.is_pooled,
        rules=rules,
        collect_logits=logits,
        collect_routing=routing and manifest is not None and manifest.router.site != "none",
    )


def read_scores(
    collected: Collected, manifest: Manifest | None, num_tokens: int, rules: RoutingRules | None = None
) -> tuple[Tensor | None, Routing | None]:
    """(T, V) float32 logits on the CPU and the routing of a `score_request` that has ended; None for what it did not ask."""
    logits = torch.cat([piece.cpu() for piece in collected.logits]) if collected.logits else None
    return logits, assemble(manifest, collected.routing, num_tokens, rules) if collected.routing and manifest is not None else None


def judge(name: str, adapter: Adapter, base: Tensor, logits: Tensor, routing: Routing | None) -> Adapter:
    """The adapter, with a warning where it does nothing and that is its honest state: fresh, or nothing selected.

    Unchanged means bitwise equal: an adapter of any strength passes. Where other rows share the step, the base's logits may differ in
    the last bit from those of an earlier step, and then an adapter without effect can pass too; one with an effect is never refused.

    Args:
        base, logits: (T, V) of the trial prompt, without the adapter and with it.
    Raises:
        AdapterNotFinite: NaN or infinity in the logits. AdapterIneffective: they are the base's although its weights are not zero.
    """
    if not bool(torch.isfinite(logits).all()):
        raise AdapterNotFinite(f"adapter {name!r}: gives NaN or infinity on a test prompt; its weights overflow in use")
    if not torch.equal(base, logits):
        return adapter
    reason = unchanged_reason(adapter.manifest, adapter.tensors, routing)
    if reason is None:
        raise AdapterIneffective(
            f"adapter {name!r}: the logits of a test prompt are those of the base although its weights are not zero; "
            f"it would be served without any effect"
        )
    return replace(adapter, warnings=(*adapter.warnings, f"does not change the base on a test prompt: {reason}"))
