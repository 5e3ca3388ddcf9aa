"""The base model's forward with the experts of each segment's adapter mixed in: LLaMA, Mistral, Qwen2 and Qwen3.

    n = norm(x);  h = x + O(attention(Q n, K n, V n) + prompt);  m = norm(h);  y = h + DOWN(silu(GATE m) * UP m) + parallel(m)

Every base linear may have LoRA experts of the token's adapter beside it. The base is frozen and shared; adapters come with the batch.
Attention is an argument (attention.py). Not for sampling, not for scheduling. Owned by the thread that runs it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.config import ModelConfig
from moa_serve.model.attention import Attention, KVCache
from moa_serve.model.batch import Expert, ForwardBatch, Segment
from moa_serve.model.build import build
from moa_serve.model.moa import Mixture, MoaLayer, MoaWeights, Routed
from moa_serve.model.ops import inverse_frequencies, rms_norm, rotate
from moa_serve.model.weights import BaseWeights, LayerWeights


class ActiveLayer:
    """One segment in one layer: its experts, and the layer router's word on its tokens."""

    def __init__(self, number: int, segment: Segment, weights: MoaLayer, index: int, x: Tensor, n: Tensor, batch: ForwardBatch) -> None:
        self.rows = slice(segment.start, segment.end)
        self.number, self.weights, self.index, self.trace = number, weights, index, batch.trace
        self.observer = batch.observer
        self.counters = segment.counters
        self.gates = self._layer_gates(segment, x, n)

    def _layer_gates(self, segment: Segment, x: Tensor, n: Tensor) -> Tensor | None:
        router = self.weights.router
        if router is None:
            return None
        if segment.pooled is None:
            routed = router(x[self.rows] if self.weights.reads_residual else n[self.rows])
        else:
            routed = self._pooled(segment, x)
        self._note("layer", routed)
        return routed.gates

    def _pooled(self, segment: Segment, x: Tensor) -> Routed:
        """Instance level: a sequence's weights come from the mean of its whole prompt, once, and are kept in `pooled.gates`."""
        pooled, router = segment.pooled, self.weights.router
        assert pooled is not None
        assert router is not None
        tokens = x[self.rows]
        for row, span in enumerate(pooled.spans):
            if span is not None:
                fresh = router(tokens[span[0] : span[1]].float().mean(0, keepdim=True)).gates[0]
                pooled.gates[row, self.index, : len(fresh)] = fresh
        outputs = segment.adapter.manifest.layer(self.index).num_outputs
        gates = pooled.gates[:, self.index, :outputs][pooled.row_of_token]
        return Routed(gates, None, torch.ones_like(gates, dtype=torch.bool), gates)

    def _note(self, site: str, routed: Routed | None) -> None:
        if routed is None:
            return
        if self.counters is not None:
            self.counters.add(self.index, site, routed)
        if self.trace is not None:
            self.trace.add(self.number, self.index, site, routed)

    def _add(self, site: str, mixture: Mixture, expert: Expert, source: Tensor, reads: Tensor, out: Tensor) -> Tensor:
        routed = mixture.route(reads[self.rows])
        self._note(site, routed)
        if self.observer is not None:
            self.observer(self.index, site, expert, source[self.rows], routed)
        delta = expert(source[self.rows], self.gates, routed)
        if not torch.is_grad_enabled():
            out[self.rows].add_(delta)
            return out
        # Training: adding in place to a slice would copy all of `out`'s gradient back and forth for every expert.
        if len(delta) == len(out):
            return out + delta
        return torch.cat((out[: self.rows.start], out[self.rows] + delta, out[self.rows.stop :]))

    def add_lora(self, target: str, u: Tensor, out: Tensor) -> Tensor:
        """out (T, out) and on top the LoRA experts at `target` on the linear's input u (T, in). May write into `out`, as all three."""
        experts = self.weights.linears.get(target)
        return out if experts is None else self._add(target, experts.mixture, experts, u, u, out)

    def add_prompt(self, q: Tensor, n: Tensor, out: Tensor) -> Tensor:
        """out (T, H, P) and the attention of the rotated queries to the learned prompt; nested ones are weighed by the normed input n."""
        prompt = self.weights.prompt
        return out if prompt is None else self._add("PROMPT", prompt.mixture, prompt, q, n, out)

    def add_parallel(self, m: Tensor, out: Tensor) -> Tensor:
        parallel = self.weights.parallel
        return out if parallel is None else self._add("P_ADAPTER", parallel.mixture, parallel, m, m, out)


class Transformer:
    """`forward(batch, attention)` -> logits of the wanted rows."""

    def __init__(self, config: ModelConfig, weights: BaseWeights) -> None:
        self.config, self.weights = config, weights
        self.inverse_frequencies = inverse_frequencies(config.rope, config.head_dim, weights.embed.device)

    name = "torch"

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embed.dtype

    @property
    def base_dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        return self.weights.embed.device

    @property
    def weight_bytes(self) -> int:
        return self.weights.num_bytes

    def step_bytes(self, num_tokens: int, context: int) -> int:
        c = self.config
        layer = 4 * c.hidden_size + 2 * c.q_size + 4 * c.kv_size + 3 * c.intermediate_size  # what is alive of one at once, about
        gathered, mask = 2 * context * c.kv_size, num_tokens * context  # of one sequence
        return (num_tokens * layer + gathered + mask) * self.dtype.itemsize + 2 * num_tokens * c.vocab_size * 4

    def bytes_per_block(self, block_size: int) -> int:
        return KVCache.bytes_per_block(self.config, block_size, self.dtype)

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        return KVCache(self.config, num_blocks, block_size, self.dtype, self.device)

    def prepare(self, adapter: Adapter) -> MoaWeights:
        """Stack the adapter's tensors on the base's device, in the base's dtype."""
        return build(adapter.manifest, adapter.tensors, self.weights, self.config, self.dtype)

    def warm(self, adapter: Adapter) -> None:
        """Nothing: tensors on the device belong to the engine thread."""

    def forget(self, revision: str) -> None:
        """Nothing: what was prepared goes with its slot."""

    def close(self) -> None:
        """Nothing: tensors go with their objects."""

    def forward(self, batch: ForwardBatch, attention: Attention) -> Tensor:
        """(N, V) float32: logits of `batch.logit_rows`, or of all T tokens.

        Routers' words on the tokens go to `batch.trace`, and instance-level weights to the segments' `pooled.gates`.
        """
        hidden = self.hidden(batch, attention)
        if batch.logit_rows is not None:
            hidden = hidden[batch.logit_rows]
        return F.linear(rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps), self.weights.head).float()

    def hidden(self, batch: ForwardBatch, attention: Attention) -> Tensor:
        """(T, D): output of the last block, before the final norm."""
        x = F.embedding(batch.token_ids, self.weights.embed)
        angles = batch.positions.float()[:, None] * self.inverse_frequencies
        rope = (angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype))
        for index, weights in enumerate(self.weights.layers):
            x = self.block(index, weights, x, rope, batch, attention)
        return x

    def block(
        self, index: int, w: LayerWeights, x: Tensor, rope: tuple[Tensor, Tensor], batch: ForwardBatch, attention: Attention
    ) -> Tensor:
        """(T, D) -> (T, D)."""
        n = rms_norm(x, w.attention_norm, self.config.rms_norm_eps)
        active = [ActiveLayer(number, segment, layer, index, x, n, batch) for number, segment, layer in batch.active(index)]
        h = x + self._attention(index, w, n, rope, active, attention)
        m = rms_norm(h, w.ffn_norm, self.config.rms_norm_eps)
        return h + self._ffn(w, m, active)

    def _attention(
        self, index: int, w: LayerWeights, n: Tensor, rope: tuple[Tensor, Tensor], active: list[ActiveLayer], attention: Attention
    ) -> Tensor:
        config = self.config
        sizes = [config.q_size, config.kv_size, config.kv_size]
        flat_q, flat_k, flat_v = torch.split(F.linear(n, w.qkv, w.qkv_bias), sizes, dim=1)
        for part in active:
            flat_q = part.add_lora("Q", n, flat_q)
            flat_k = part.add_lora("K", n, flat_k)
            flat_v = part.add_lora("V", n, flat_v)
        q = flat_q.view(len(n), config.num_heads, config.head_dim)
        k = flat_k.view(len(n), config.num_kv_heads, config.head_dim)
        v = flat_v.view(len(n), config.num_kv_heads, config.head_dim)
        if w.q_norm is not None and w.k_norm is not None:
            q, k = rms_norm(q, w.q_norm, config.rms_norm_eps), rms_norm(k, w.k_norm, config.rms_norm_eps)
        q, k = rotate(q, *rope), rotate(k, *rope)
        mixed = attention(index, q, k, v)
        for part in active:
            mixed = part.add_prompt(q, n, mixed)
        mixed = mixed.flatten(1)
        out = F.linear(mixed, w.o, w.o_bias)
        for part in active:
            out = part.add_lora("O", mixed, out)
        return out

    def _ffn(self, w: LayerWeights, m: Tensor, active: list[ActiveLayer]) -> Tensor:
        gate, up = F.linear(m, w.gate_up, w.gate_up_bias).chunk(2, dim=1)
        for part in active:
            up = part.add_lora("UP", m, up)
            gate = part.add_lora("GATE", m, gate)
        z = F.silu(gate) * up
        out = F.linear(z, w.down, w.down_bias)
        for part in active:
            out = part.add_lora("DOWN", z, out)
            out = part.add_parallel(m, out)
        return out
