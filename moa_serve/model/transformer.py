"""The base model's forward with the experts of each segment's adapter mixed in: LLaMA, Mistral, Qwen2 and Qwen3.

    n = norm(x);  h = x + O(attention(Q n, K n, V n) + prompt);  m = norm(h);  y = h + DOWN(silu(GATE m) * UP m) + parallel(m)

Every base linear may have LoRA experts of the token's adapter beside it. The base is frozen and shared; adapters come with the batch.
Attention is an argument (attention.py). Not for sampling, not for scheduling. Owned by the thread that runs it.
"""

import threading
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.rules import RouterRule
from moa_serve.config import ModelConfig
from moa_serve.model.attention import Attention, KVCache
from moa_serve.model.bank import bytes_per_slot
from moa_serve.model.batch import Expert, ForwardBatch, PooledRows
from moa_serve.model.build import build
from moa_serve.model.clock import PartClock
from moa_serve.model.graphs import MOST, DecodeGraphs
from moa_serve.model.moa import Mixture, MoaLayer, MoaWeights, Routed, Router
from moa_serve.model.ops import inverse_frequencies, linear, prepacked, rms_norm, rotate
from moa_serve.model.stacked import Part, Stacks, join, parts_of
from moa_serve.model.weights import BaseWeights, LayerWeights

_MOST_WARMED = 8  # adapters that are laid out and wait for a slot; each takes memory as one in a slot does


class ActiveLayer:
    """A part of a step in one layer: its experts, and the layer router's word on its tokens."""

    def __init__(self, part: Part, weights: MoaLayer, index: int, x: Tensor, n: Tensor, batch: ForwardBatch) -> None:
        self.part, self.weights, self.index, self.batch = part, weights, index, batch
        # Small products are 3 to 8 times faster in float32 on a CPU, however narrow their base; in training they are not that small.
        self._widens = x.device.type == "cpu" and not torch.is_grad_enabled()
        self._source: Tensor | None = None
        self.gates = self._layer_gates(x, n)

    def _of(self, x: Tensor) -> Tensor:
        """The part's tokens of a batch's x, made once for all that read the same."""
        if x is not self._source:
            own = self.part.of(x)
            self._source, self._own = x, own.float() if self._widens else own
        return self._own

    def _layer_gates(self, x: Tensor, n: Tensor) -> Tensor | None:
        router = self.weights.router
        if router is None:
            return None
        pooled = self.part.segments[0][1].pooled
        rule = self._rule("layer")
        own = x if self.weights.reads_residual else n
        routed = router(self._of(own), rule) if pooled is None else self._pooled(router, pooled, rule, x)
        self._hear("layer", routed)
        return routed.gates

    def _rule(self, site: str) -> RouterRule | None:
        """What the part has instead of the router's own rule."""
        rules = self.part.rules
        return None if rules is None else rules.get(self.index, site)

    def _pooled(self, router: Router, pooled: PooledRows, rule: RouterRule | None, x: Tensor) -> Routed:
        """Instance level: a sequence's weights come from the mean of its whole prompt, once, and are kept in `pooled.words`."""
        tokens = x[self.part.rows]
        for row, span in enumerate(pooled.spans):
            if span is not None:
                fresh = router(tokens[span[0] : span[1]].float().mean(0, keepdim=True), rule)
                pooled.words[row, self.index, :, : fresh.gates.shape[1]] = torch.cat((fresh.gates, fresh.scores))
        outputs = self.part.segments[0][1].adapter.manifest.layer(self.index).num_outputs
        gates, scores = pooled.words[:, self.index, :, :outputs][pooled.row_of_token].unbind(1)
        limit = (rule or router.rule).threshold  # a constant: no function of a token is asked here
        threshold = None if limit is None else gates.new_full((len(gates), 1), limit)
        return Routed(scores, threshold, gates != 0, gates)

    def _hear(self, site: str, routed: Routed | None) -> None:
        if routed is not None:
            self.part.hear(self.index, site, routed)

    def _add(self, site: str, mixture: Mixture, expert: Expert, source: Tensor, reads: Tensor, out: Tensor) -> Tensor:
        routed = self._route(site, mixture, reads) if mixture.router else None
        self._hear(site, routed)
        own = self._of(source)
        if self.batch.observer is not None:
            self.batch.observer(self.index, site, expert, own, routed)
        return self.part.add(expert(own, self.gates, routed), out)

    def _route(self, site: str, mixture: Mixture, reads: Tensor) -> Routed | None:
        return mixture.route(self._of(reads), self._rule(site))

    def add_lora(self, target: str, u: Tensor, out: Tensor) -> Tensor:
        """out (T, out) and on top the LoRA experts at `target` on the linear's input u (T, in). May write into `out`, as all three."""
        if experts := self.weights.linears.get(target):
            return self._add(target, experts.mixture, experts, u, u, out)
        joined = self.weights.joined.get(target)
        return out if joined is None else self.part.add(joined(self._of(u), self.gates, None), out)

    def add_prompt(self, q: Tensor, n: Tensor, out: Tensor) -> Tensor:
        """out (T, H, P) and the attention of the rotated queries to the learned prompt; nested ones are weighed by the normed input n."""
        prompt = self.weights.prompt
        return out if prompt is None else self._add("PROMPT", prompt.mixture, prompt, q, n, out)

    def add_parallel(self, m: Tensor, out: Tensor) -> Tensor:
        parallel = self.weights.parallel
        return out if parallel is None else self._add("P_ADAPTER", parallel.mixture, parallel, m, m, out)


class TimedLayer(ActiveLayer):
    """The same in a step that is timed by part."""

    def __init__(
        self, clock: PartClock, part: Part, weights: MoaLayer, index: int, x: Tensor, n: Tensor, batch: ForwardBatch
    ) -> None:  # fmt: skip
        self._clock = clock
        super().__init__(part, weights, index, x, n, batch)

    def _layer_gates(self, x: Tensor, n: Tensor) -> Tensor | None:
        if self.weights.router is None:
            return None
        with self._clock.part("router"):
            return super()._layer_gates(x, n)

    def _route(self, site: str, mixture: Mixture, reads: Tensor) -> Routed | None:
        with self._clock.part("router"):
            return super()._route(site, mixture, reads)

    def add_lora(self, target: str, u: Tensor, out: Tensor) -> Tensor:
        with self._clock.part("experts"):
            return super().add_lora(target, u, out)

    def add_prompt(self, q: Tensor, n: Tensor, out: Tensor) -> Tensor:
        with self._clock.part("experts"):
            return super().add_prompt(q, n, out)

    def add_parallel(self, m: Tensor, out: Tensor) -> Tensor:
        with self._clock.part("experts"):
            return super().add_parallel(m, out)


class Transformer:
    """`forward(batch, attention)` -> logits of the wanted rows."""

    def __init__(self, config: ModelConfig, weights: BaseWeights) -> None:
        self.config, self.weights = config, weights
        self.layers_done = 0
        self._clock: PartClock | None = None  # while forwards are timed by part
        self._stacks = Stacks()
        self.inverse_frequencies = inverse_frequencies(config.rope, config.head_dim, weights.embed.device)
        self._warmed: OrderedDict[str, MoaWeights] = OrderedDict()  # by revision, until a slot takes them
        self._warming = threading.Lock()
        self._graphs: DecodeGraphs | None = None
        if self.device.type == "cuda":
            self._graphs = DecodeGraphs()
            # For every new shape cuDNN makes a plan first, which takes longer than many steps. A switch around each call would cost, too.
            torch.backends.cuda.enable_cudnn_sdp(False)

    @classmethod
    def packed(cls, config: ModelConfig, weights: BaseWeights) -> Self:
        """To serve with: takes `weights` over and packs them layer by layer where that is a gain, so that they never stand there twice.

        The embedding is looked up by rows and stays as it is, and with it a head that is tied to it.
        """
        for layer in weights.layers:
            layer.qkv, layer.o = prepacked(layer.qkv), prepacked(layer.o)
            layer.gate_up, layer.down = prepacked(layer.gate_up), prepacked(layer.down)
        if weights.head is not weights.embed:
            weights.head = prepacked(weights.head)
        return cls(config, weights)

    name = "torch"

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embed.dtype

    @property
    def base_dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def adapter_dtype(self) -> torch.dtype:
        """The base's, and on a CPU float32, where small products want it."""
        return torch.float32 if self.device.type == "cpu" else self.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.embed.device

    @property
    def weight_bytes(self) -> int:
        return self.weights.num_bytes

    @property
    def beside_bytes(self) -> int:
        return 0

    def slots_bytes(self, num_slots: int) -> int:
        return num_slots * bytes_per_slot(self.config, self.adapter_dtype)

    def step_bytes(self, num_tokens: int, context: int) -> int:
        c = self.config
        layer = 4 * c.hidden_size + 2 * c.q_size + 4 * c.kv_size + 3 * c.intermediate_size  # what is alive of one at once, about
        gathered, mask = 2 * context * c.kv_size, num_tokens * context  # of one sequence
        return (num_tokens * layer + gathered + mask) * self.dtype.itemsize + 2 * num_tokens * c.vocab_size * 4

    def recorded_bytes(self, num_rows: int, context: int) -> int:
        """They share the buffers of one step, beside those of steps that are not recorded; each has logits of its own."""
        if self._graphs is None:
            return 0
        return self.step_bytes(num_rows, context) + MOST * num_rows * self.config.vocab_size * 4

    def bytes_per_block(self, block_size: int) -> int:
        return KVCache.bytes_per_block(self.config, block_size, self.dtype)

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        self._forget_graphs()
        return KVCache(self.config, num_blocks, block_size, self.dtype, self.device)

    def prepare(self, adapter: Adapter, slot: int | None = None) -> MoaWeights:
        """Stack the adapter's tensors on the base's device, where it was not done before."""
        with self._warming:
            warmed = self._warmed.pop(adapter.revision, None)
        self._forget_graphs()  # it takes the slot of another, whose memory they may keep
        return warmed or self._prepare(adapter)

    def _prepare(self, adapter: Adapter) -> MoaWeights:
        weights = build(adapter.manifest, adapter.tensors, self.weights, self.config, self.adapter_dtype)
        join(weights)
        return weights

    def warm(self, adapter: Adapter) -> None:
        """On a CPU. Tensors on another device belong to the engine thread."""
        if self.device.type != "cpu":
            return
        with self._warming:
            if adapter.revision in self._warmed:
                self._warmed.move_to_end(adapter.revision)
                return
        weights = self._prepare(adapter)
        with self._warming:
            self._warmed[adapter.revision] = weights
            while len(self._warmed) > _MOST_WARMED:
                self._warmed.popitem(last=False)

    def cool(self, revision: str) -> None:
        """Nothing: what was prepared stands in slots only."""

    def forget(self, revision: str) -> None:
        """What was prepared goes with its slot, but for the stacks that it stood in, and what no slot has taken."""
        with self._warming:
            self._warmed.pop(revision, None)
        self.trim()

    def trim(self) -> None:
        self._stacks = Stacks()
        self._forget_graphs()

    def close(self) -> None:
        """Tensors go with their objects, but for those that recorded steps keep."""
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        if self._graphs is not None:
            self._graphs.clear()

    timing_is_free = False

    def start_timing(self) -> None:
        self._clock = PartClock(self.device)

    def take_timing(self) -> dict[str, float]:
        assert self._clock is not None, "timing was not started"
        clock, self._clock = self._clock, None
        return clock.seconds

    def _part(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self._clock is None else self._clock.part(name)

    def forward(self, batch: ForwardBatch, attention: Attention) -> Tensor:
        """(N, V) float32: logits of `batch.logit_rows`, or of all T tokens.

        Routers' words on the tokens go to `batch.trace`, and instance-level weights to the segments' `pooled.words`.
        """
        if self._graphs is not None and self._clock is None:  # a recorded step has no parts that could be timed
            return self._graphs.forward(batch, attention, self._parts, self._compute)
        return self._compute(batch, self._parts(batch), attention)

    def _compute(self, batch: ForwardBatch, parts: list[Part], attention: Attention) -> Tensor:
        with self._part("base"):
            hidden = self._hidden(batch, parts, attention)
        with self._part("head"):
            if batch.logit_rows is not None:
                hidden = hidden[batch.logit_rows]
            return linear(rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps), self.weights.head).float()

    def _parts(self, batch: ForwardBatch) -> list[Part]:
        # An observer wants to meet every segment by itself, and a gradient would have to find its way through the stack.
        is_together = batch.observer is None and not torch.is_grad_enabled()
        return parts_of(batch.segments, self._stacks if is_together else None, self.device)

    def hidden(self, batch: ForwardBatch, attention: Attention) -> Tensor:
        """(T, D): output of the last block, before the final norm."""
        return self._hidden(batch, self._parts(batch), attention)

    def _hidden(self, batch: ForwardBatch, parts: list[Part], attention: Attention) -> Tensor:
        x = F.embedding(batch.token_ids, self.weights.embed)
        angles = batch.positions.float()[:, None] * self.inverse_frequencies
        cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
        rope = (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
        if self._clock is not None:
            attention = self._clock.timing("attention", attention)
        for index, weights in enumerate(self.weights.layers):
            x = self.block(index, weights, x, rope, batch, parts, attention)
            self.layers_done += 1
        for part in parts:
            if batch.trace is not None:
                part.tell(batch.trace)
            part.count()
        return x

    def block(
        self,
        index: int,
        w: LayerWeights,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        batch: ForwardBatch,
        parts: list[Part],
        attention: Attention,
    ) -> Tensor:
        """(T, D) -> (T, D)."""
        n = rms_norm(x, w.attention_norm, self.config.rms_norm_eps)
        make = ActiveLayer if self._clock is None else partial(TimedLayer, self._clock)
        active = [make(part, layer, index, x, n, batch) for part in parts if (layer := part.layers[index]) is not None]
        h = x + self._attention(index, w, n, rope, active, attention)
        m = rms_norm(h, w.ffn_norm, self.config.rms_norm_eps)
        return h + self._ffn(w, m, active)

    def _attention(
        self, index: int, w: LayerWeights, n: Tensor, rope: tuple[Tensor, Tensor], active: list[ActiveLayer], attention: Attention
    ) -> Tensor:
        config = self.config
        fused = linear(n, w.qkv, w.qkv_bias)
        for part in active:
            fused = part.add_lora("QKV", n, fused)
        flat_q, flat_k, flat_v = torch.split(fused, [config.q_size, config.kv_size, config.kv_size], dim=1)
        for part in active:
            flat_q = part.add_lora("Q", n, flat_q)
            flat_k = part.add_lora("K", n, flat_k)
            flat_v = part.add_lora("V", n, flat_v)
        q = flat_q.view(len(n), config.num_heads, config.head_dim)
        k = flat_k.view(len(n), config.num_kv_heads, config.head_dim)
        v = flat_v.view(len(n), config.num_kv_heads, config.head_dim)
        if w.q_norm is not None and w.k_norm is not None:
            q, k = rms_norm(q, w.q_norm, config.rms_norm_eps), rms_norm(k, w.k_norm, config.rms_norm_eps)
        q, k = torch.split(rotate(torch.cat((q, k), 1), *rope), [config.num_heads, config.num_kv_heads], 1)
        mixed = attention(index, q, k, v)
        for part in active:
            mixed = part.add_prompt(q, n, mixed)
        mixed = mixed.flatten(1)
        out = linear(mixed, w.o, w.o_bias)
        for part in active:
            out = part.add_lora("O", mixed, out)
        return out

    def _ffn(self, w: LayerWeights, m: Tensor, active: list[ActiveLayer]) -> Tensor:
        fused = linear(m, w.gate_up, w.gate_up_bias)
        for part in active:
            fused = part.add_lora("GATE_UP", m, fused)
        gate, up = fused.chunk(2, dim=1)
        for part in active:
            up = part.add_lora("UP", m, up)
            gate = part.add_lora("GATE", m, gate)
        z = F.silu(gate) * up
        out = linear(z, w.down, w.down_bias)
        for part in active:
            out = part.add_lora("DOWN", z, out)
            out = part.add_parallel(m, out)
        return out
