"""The yardstick for serving: a Soft or Sparse MoA computed as its authors compute it, on Hugging Face transformers' LLaMA.

Written by us after the facts of their published code (DCDmllm/MoA, the line on transformers). What decides its cost is kept: a router in
each decoder layer, one expert after the other, a Sparse MoA's with gather and scatter into zeros of the output's size, a Soft MoA's and
every prompt densely, a prompt's keys and values projected anew in every step, all of it in the base's dtype. What would only make it
slower is left out: their loop of generation, and the promotion to float32 by float32 masks. Base and cache are transformers' own,
attention is SDPA. It takes the tensors that are served, so a test holds its logits against ours. Not for serving.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from moa_serve.adapter.manifest import Manifest, SelectConstant, SelectThresholdFn
from moa_serve.bench import goals
from moa_serve.bench.goals import Judged
from moa_serve.bench.step import num_threads
from moa_serve.bench.synthetic import SPARE_TOKENS, made_up
from moa_serve.bench.timing import Spread, interleaved, ratio, seconds
from moa_serve.bench.workload import CONTEXT, Pages, Workload, has_goals, selected_share, steps_for, wait_for
from moa_serve.errors import InvalidRequest
from moa_serve.model.backend import Backend
from moa_serve.model.moa import Affine, LinearNet, SwigluNet

FAMILIES = ("sparse_moa", "soft_moa")
ROWS = (1, 8, 16)
_LINEARS = {
    "Q": ("self_attn", "q_proj"),
    "K": ("self_attn", "k_proj"),
    "V": ("self_attn", "v_proj"),
    "O": ("self_attn", "o_proj"),
    "UP": ("mlp", "up_proj"),
    "GATE": ("mlp", "gate_proj"),
    "DOWN": ("mlp", "down_proj"),
}


# -- an adapter beside the modules of transformers


@dataclass(eq=False, slots=True)
class _Gates:
    """What a layer's router said of the tokens that are being computed: (B, T, E), exactly 0 where an expert is not selected."""

    now: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(eq=False, slots=True)
class _Router:
    """s = sigmoid(R(x)), and for a Sparse MoA s * [s >= t], t = t_max * sigmoid(w.x + b) or a constant. In x's dtype."""

    net: LinearNet | SwigluNet
    is_sparse: bool
    max_threshold: float
    threshold_fn: Affine | None

    def __call__(self, x: Tensor) -> Tensor:
        score = self.net(x).sigmoid()
        if not self.is_sparse:
            return score
        threshold = self.max_threshold if self.threshold_fn is None else self.max_threshold * self.threshold_fn(x).sigmoid()
        return score * (score >= threshold).to(score.dtype)


@dataclass(eq=False, slots=True)
class _Expert:
    """What one expert adds to an output: `compute` (..., in) -> (..., out), times its column of the gates."""

    compute: Callable[[Tensor], Tensor]
    column: int
    gates: _Gates
    is_sparse: bool

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """x (B, T, in) and out (B, T, out) -> (B, T, out)."""
        weight = self.gates.now[..., self.column]
        if not self.is_sparse:
            return out + self.compute(x) * weight[..., None]
        rows = torch.where(weight)
        full = torch.zeros_like(out)
        full[rows] = self.compute(x[rows])
        return out + full * weight[..., None]


class _RoutedNorm(nn.Module):
    """The norm before attention; on its way the layer's router reads what comes out of it, or what goes in."""

    def __init__(self, norm: nn.Module, router: _Router, gates: _Gates, *, reads_residual: bool) -> None:
        super().__init__()
        self.norm, self.router, self.gates, self.reads_residual = norm, router, gates, reads_residual

    def forward(self, x: Tensor) -> Tensor:
        n: Tensor = self.norm(x)
        self.gates.now = self.router(x if self.reads_residual else n)
        return n


class _WithExpert(nn.Module):
    """A module of the base, and an expert beside it that reads the same input."""

    def __init__(self, module: nn.Module, expert: _Expert) -> None:
        super().__init__()
        self.module, self.expert = module, expert

    def forward(self, x: Tensor) -> Tensor:
        return self.expert.add(x, self.module(x))


@dataclass(eq=False, slots=True)
class _Prompt:
    """gate_h * softmax(q_h . K / sqrt(P)) V over n learned rows.

    K and V are the frozen projections of the rows, without norm, LoRA or rotation.
    """

    rows: Tensor  # (n, D)
    head_gate: Tensor  # (H, 1, 1)
    keys: nn.Module
    values: nn.Module
    head_dim: int

    def __call__(self, q: Tensor) -> Tensor:
        """Rotated (B, H, T, P) -> (B, H, T, P)."""
        keys, values = self._heads(self.keys, q.shape[1]), self._heads(self.values, q.shape[1])
        scores = q @ keys.transpose(1, 2) * self.head_dim**-0.5  # (B, H, T, n)
        share = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        out: Tensor = share @ values * self.head_gate
        return out

    def _heads(self, projection: nn.Module, heads: int) -> Tensor:
        """(H, n, P)."""
        projected: Tensor = projection(self.rows)
        split = projected.view(len(self.rows), -1, self.head_dim).transpose(0, 1)  # (K, n, P)
        return split[:, None].expand(-1, heads // len(split), -1, -1).flatten(0, 1)


class _PromptAttention(nn.Module):
    """transformers' attention with a prompt expert's part before its last linear: the rotated queries can be had nowhere else."""

    def __init__(self, attention: Any, prompt: _Prompt, column: int, gates: _Gates) -> None:
        super().__init__()
        self.attention, self.prompt, self.column, self.gates = attention, prompt, column, gates

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        own, flat = self.attention, hidden_states.shape[:-1]
        q, k, v = (linear(hidden_states).view(*flat, -1, own.head_dim).transpose(1, 2) for linear in (own.q_proj, own.k_proj, own.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, own.layer_idx)
        out, _weights = sdpa_attention_forward(own, q, k, v, attention_mask, scaling=own.scaling)  # (B, T, H, P)
        out = out + self.prompt(q).transpose(1, 2) * self.gates.now[..., self.column, None, None]
        return own.o_proj(out.reshape(*flat, -1)), None


def _lora(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return F.linear(F.linear(x, a), b) * scale


def _parallel(m: Tensor, down: Affine, up: Affine) -> Tensor:
    return up(F.silu(down(m)))


def _check(manifest: Manifest) -> None:
    is_plain = all(expert.inner is None for expert in manifest.experts)
    if manifest.variant not in FAMILIES or manifest.router.activation != "sigmoid" or not is_plain:
        raise InvalidRequest(
            f"the authors' way is written for {' and '.join(FAMILIES)} with a sigmoid router and without nested experts; "
            f"{manifest.variant} as it is here is measured against nothing",
            param="family",
        )


class _Adaptation:
    """Puts an adapter's experts beside the modules of a model of transformers."""

    def __init__(self, manifest: Manifest, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        _check(manifest)
        self.manifest = manifest
        self.tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        self.is_sparse = manifest.variant == "sparse_moa"

    def _affine(self, prefix: str) -> Affine:
        return Affine(self.tensors[f"{prefix}.weight"], self.tensors.get(f"{prefix}.bias"))

    def apply(self, layer: Any, index: int) -> None:
        """Change decoder layer `index` in place."""
        plan, gates = self.manifest.layer(index), _Gates()
        if not plan.experts:
            return
        parts: dict[str, tuple[str, int]] = {}
        for spec, column in zip(plan.experts, plan.columns, strict=True):
            prefix = f"layers.{index}.{spec.site}"
            if spec.site not in _LINEARS:
                parts[spec.site] = (prefix, column)
                continue
            owner, name = getattr(layer, _LINEARS[spec.site][0]), _LINEARS[spec.site][1]
            compute = partial(_lora, a=self.tensors[f"{prefix}.lora_A"], b=self.tensors[f"{prefix}.lora_B"], scale=spec.scale)
            setattr(owner, name, _WithExpert(getattr(owner, name), _Expert(compute, column, gates, self.is_sparse)))
        # These take the whole of attention or MLP in, so their linears have to have their experts already.
        if "PROMPT" in parts:
            prefix, column = parts["PROMPT"]
            layer.self_attn = _PromptAttention(layer.self_attn, self._prompt(prefix, layer.self_attn), column, gates)
        if "P_ADAPTER" in parts:
            prefix, column = parts["P_ADAPTER"]
            compute = partial(_parallel, down=self._affine(f"{prefix}.down"), up=self._affine(f"{prefix}.up"))
            layer.mlp = _WithExpert(layer.mlp, _Expert(compute, column, gates, self.is_sparse))
        reads_residual = self.manifest.router.input == "residual"
        layer.input_layernorm = _RoutedNorm(
            layer.input_layernorm, self._router(f"layers.{index}.router"), gates, reads_residual=reads_residual
        )

    def _router(self, prefix: str) -> _Router:
        spec, limit = self.manifest.router, 1.0
        net: LinearNet | SwigluNet
        if spec.net == "swiglu":
            net = SwigluNet(*(self._affine(f"{prefix}.{part}") for part in ("w1", "w2", "w3")))
        else:
            net = LinearNet(self._affine(prefix))
        if isinstance(spec.select, SelectConstant):
            limit = spec.select.threshold
        elif isinstance(spec.select, SelectThresholdFn):
            limit = spec.select.max_threshold
        return _Router(net, self.is_sparse, limit, self._affine(f"{prefix}.threshold") if spec.has_threshold_fn else None)

    def _prompt(self, prefix: str, attention: Any) -> _Prompt:
        keys, values = (linear.module if isinstance(linear, _WithExpert) else linear for linear in (attention.k_proj, attention.v_proj))
        gate = self.tensors[f"{prefix}.gate"].view(-1, 1, 1)
        return _Prompt(self.tensors[f"{prefix}.rows"], gate, keys, values, attention.head_dim)


class AuthorsWay:
    """transformers' LLaMA with one adapter, or none: prefill once, then step from there as often as wanted.

    Args:
        base_folder: config.json and safetensors of a LLaMA.
        dtype, device: of base and adapter; None for the CPU.
        manifest, tensors: of a Soft or Sparse MoA, as in an `Adapter`; both None for the base alone.
    Raises:
        InvalidRequest: the adapter is of another family.
    """

    def __init__(
        self,
        base_folder: Path,
        dtype: torch.dtype,
        manifest: Manifest | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        where = device or torch.device("cpu")
        adaptation = None if manifest is None else _Adaptation(manifest, tensors or {}, dtype, where)
        self._model: Any = LlamaForCausalLM.from_pretrained(base_folder, dtype=dtype, attn_implementation="sdpa").to(where)
        self._cache: Any = None
        self._length = 0
        if adaptation is not None:
            for index, layer in enumerate(self._model.model.layers):
                adaptation.apply(layer, index)
        self._model.eval()

    @torch.inference_mode()
    def logits(self, token_ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, V) in the base's dtype; nothing is cached."""
        logits: Tensor = self._model(token_ids, use_cache=False).logits
        return logits

    @torch.inference_mode()
    def prefill(self, token_ids: Tensor) -> Tensor:
        """(B, T) int64 into a new cache; (B, V) logits of the last tokens."""
        self._cache, self._length = DynamicCache(config=self._model.config), token_ids.shape[1]
        return self._last(token_ids)

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """(B, 1) int64 behind what is cached, and into it; (B, V) logits. `rewind` before the next one, where that shall see the same."""
        assert self._cache is not None, "a step needs a prefill"
        logits = self._last(token_ids)
        wait_for(logits)
        return logits

    @torch.inference_mode()
    def rewind(self) -> None:
        """Put the cache back to what the prefill left."""
        if extra := self._cache.get_seq_length() - self._length:
            self._cache.crop(-extra)

    def _last(self, token_ids: Tensor) -> Tensor:
        logits: Tensor = self._model(token_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1]


# -- the comparison


@dataclass(frozen=True, slots=True)
class Compared:
    """A decode step of `rows` sequences.

    Args:
        ms: milliseconds a step: ours, authors (both with the adapter), base and control (ours without), transformers (theirs without).
        adapter, base: theirs over ours.
        control: our base over itself.
        selected_share: of the routers' choices in our step.
    """

    rows: int
    ms: Mapping[str, Spread]
    adapter: Judged
    base: Judged
    control: Judged
    selected_share: float | None

    def to_json(self) -> dict[str, Any]:
        ratios = {name: getattr(self, name).to_json() for name in ("adapter", "base", "control")}
        ms = {name: spread.to_json() for name, spread in self.ms.items()}
        return {"rows": self.rows, "ms": ms, "selected_share": self.selected_share} | ratios


@dataclass(frozen=True, slots=True)
class ReferenceReport:
    backend: str
    dtype: str
    threads: int
    family: str
    context: int
    rounds: int
    sizes: Sequence[Compared]

    def to_json(self) -> dict[str, Any]:
        run = {name: getattr(self, name) for name in ("backend", "dtype", "threads", "family", "context", "rounds")}
        return run | {"sizes": [size.to_json() for size in self.sizes]}


def compare(
    model: Backend,
    base_folder: Path,
    *,
    family: str = "sparse_moa",
    rows: Sequence[int] = ROWS,
    rounds: int = 15,
    context: int = CONTEXT,
    on_progress: Callable[[str], None] = lambda _: None,
) -> ReferenceReport:
    """Decode steps of ours against theirs: the same weights, adapter, dtype, tokens and length of context, taking turns in one process.

    Args:
        model: of the base in `base_folder`, without a cache yet.
        family: of `FAMILIES`.
    Raises:
        InvalidRequest: another family, or a base that is not a LLaMA.
    """
    if family not in FAMILIES:
        raise InvalidRequest(f"family is {family!r}, but must be one of {', '.join(FAMILIES)}", param="family")
    if not rows or min(rows) < 1:
        raise InvalidRequest(f"rows are {tuple(rows)}, but must be numbers of sequences from 1", param="rows")
    if model.config.architecture != "llama":
        raise InvalidRequest(f"the authors' way is written for LLaMA; this base is {model.config.architecture}", param="model")
    on_progress("filling the cache and making an adapter")
    pages = Pages(model, [context] * max(rows), spare=SPARE_TOKENS)
    adapter = made_up(pages, family, seed=0)
    prepared = model.prepare(adapter)
    on_progress("loading transformers")
    theirs = {
        "authors": AuthorsWay(base_folder, model.dtype, adapter.manifest, adapter.tensors, device=model.device),
        "transformers": AuthorsWay(base_folder, model.dtype, device=model.device),
    }
    sizes = []
    for count in rows:
        on_progress(f"decoding {count} rows")
        ours = {
            "ours": Workload(pages, [prepared] * count),
            "base": Workload(pages, [None] * count),
            "control": Workload(pages, [None] * count),
        }
        sizes.append(_compare(pages, ours, theirs, rounds))
    dtype = str(model.dtype).removeprefix("torch.")
    return ReferenceReport(model.name, dtype, num_threads(model), family, context, rounds, sizes)


def _compare(pages: Pages, ours: Mapping[str, Workload], theirs: Mapping[str, AuthorsWay], rounds: int) -> Compared:
    next_ids = ours["ours"].batch.token_ids[:, None]
    rows = len(next_ids)
    cases: dict[str, Callable[[], float]] = {name: partial(_our_seconds, work, steps_for(work.run)) for name, work in ours.items()}
    for name, way in theirs.items():
        way.prefill(torch.stack(pages.token_ids[:rows]))
        cases[name] = partial(_their_seconds, way, next_ids, steps_for(partial(_their_seconds, way, next_ids, 1)))
    times = interleaved(cases, rounds)
    backend, is_judged = pages.model.name, has_goals(pages.model)
    return Compared(
        rows,
        {name: Spread.of([1e3 * value for value in values]) for name, values in times.items()},
        Judged(ratio(times["authors"], times["ours"]), goals.against_authors(backend, rows) if is_judged else None, is_floor=True),
        Judged(
            ratio(times["transformers"], times["base"]), goals.against_transformers(backend, rows) if is_judged else None, is_floor=True
        ),
        Judged(ratio(times["control"], times["base"])),
        selected_share(ours["ours"].trace()),
    )


def _our_seconds(work: Workload, steps: int) -> float:
    def repeated() -> None:
        for _ in range(steps):
            work.run()

    return seconds(repeated) / steps


def _their_seconds(way: AuthorsWay, token_ids: Tensor, steps: int) -> float:
    """Of a step; putting the cache back between two does not count."""
    spent = 0.0
    for _ in range(steps):
        spent += seconds(partial(way.step, token_ids))
        way.rewind()
    return spent / steps
