"""The mathematics once more, naively: one token, one head, one expert at a time, in float64, from the paper and the format's specification.

An oracle that shares no code with moa_serve: it reads the raw manifest and the named tensors. Slow on purpose; for tiny models.
"""

import math
from typing import Any

import torch
from torch import Tensor

TARGET_OF = {"Q": "self_attn.q_proj", "K": "self_attn.k_proj", "V": "self_attn.v_proj", "O": "self_attn.o_proj",
             "UP": "mlp.up_proj", "GATE": "mlp.gate_proj", "DOWN": "mlp.down_proj"}  # fmt: skip
ORDER = ["Q", "K", "V", "PROMPT", "O", "UP", "GATE", "DOWN", "P_ADAPTER"]


class NaiveModel:
    """LLaMA with one adapter. `base` are tensors by their Hugging Face names, `config` the raw config.json."""

    def __init__(
        self,
        config: dict[str, Any],
        base: dict[str, Tensor],
        manifest: dict[str, Any] | None,
        tensors: dict[str, Tensor],
        options: dict[str, Any] | None = None,
    ) -> None:
        self.c = config
        self.base = {name: tensor.double() for name, tensor in base.items()}
        self.m = manifest
        self.t = {name: tensor.double() for name, tensor in tensors.items()}
        self.options = options or {}  # as a request has them, but `disable` and `force` are sets of (layer, expert)
        self.gates: dict[tuple[int, int], dict[str, float]] = {}  # (layer, token) -> site or expert -> weight that counts

    # -- small pieces

    def affine(self, prefix: str, x: Tensor) -> Tensor:
        out = self.t[f"{prefix}.weight"] @ x
        bias = self.t.get(f"{prefix}.bias")
        return out if bias is None else out + bias

    def norm(self, x: Tensor, name: str) -> Tensor:
        rms = math.sqrt(float((x * x).mean()) + self.c["rms_norm_eps"])
        return x / rms * self.base[name]

    def rotate(self, vector: Tensor, position: int) -> Tensor:
        half = len(vector) // 2
        out = vector.clone()
        for j in range(half):
            angle = position * self.c["rope_theta"] ** (-2 * j / len(vector))
            a, b = float(vector[j]), float(vector[j + half])
            out[j] = a * math.cos(angle) - b * math.sin(angle)
            out[j + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    # -- routing

    def select(self, scores: list[float], threshold: float | None) -> list[float]:
        assert self.m is not None
        kind = self.m["router"].get("select", {"kind": "all"})
        if kind["kind"] == "all":
            return scores
        if kind["kind"] == "constant":
            return [s if s >= kind["threshold"] else 0.0 for s in scores]
        if kind["kind"] == "threshold_fn":
            assert threshold is not None
            return [s if s >= kind["max_threshold"] * threshold else 0.0 for s in scores]
        if kind["kind"] == "top_k":
            best = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[: kind["k"]]
            total = sum(scores[e] for e in best)
            return [scores[e] / total if e in best else 0.0 for e in range(len(scores))]
        assert threshold is not None
        excess = [max(0.0, s - threshold / len(scores)) for s in scores]
        total = sum(excess) or 1.0
        return [e / total for e in excess]

    def select_as_asked(self, scores: list[float], threshold: float | None, layer: int, names: list[list[str]]) -> list[float]:
        """The same under the options of a request; `names` are the experts that each output weighs."""
        assert self.m is not None
        kind, count = self.m["router"].get("select", {"kind": "all"}), len(scores)
        own = {"constant": kind.get("threshold"), "threshold_fn": (threshold or 0.0) * kind.get("max_threshold", 0.0)}.get(kind["kind"])
        limit = (threshold or 0.0) / count if kind["kind"] == "adamole" else own
        most = kind.get("k", count)
        if self.options.get("mode") == "soft":
            limit, most = None, count
        asked = self.options.get("threshold")
        if isinstance(asked, dict) and "scale" in asked:
            assert limit is not None
            limit *= asked["scale"]
        elif asked is not None:
            limit = asked["constant"] if isinstance(asked, dict) else asked
        most = self.options.get("top_k", most)
        is_subtracted = kind["kind"] == "adamole" and limit is not None
        values = [score - (limit or 0.0) if is_subtracted else score for score in scores]
        forced = [any((layer, name) in self.options.get("force", ()) for name in own) for own in names]
        able = [bool(own) and not any((layer, name) in self.options.get("disable", ()) for name in own) for own in names]
        reached = [limit is None or (value > 0 if is_subtracted else score >= limit) for score, value in zip(scores, values, strict=True)]
        candidates = [e for e in range(count) if able[e] and (forced[e] or reached[e])]
        kept = sorted(candidates, key=lambda e: (not forced[e], -values[e] if not forced[e] else 0, e))[:most]
        gates = [values[e] if e in kept else 0.0 for e in range(count)]
        total = sum(gates) if kind["kind"] in ("top_k", "adamole") else 1.0
        return [gate / (total or 1.0) for gate in gates]

    def weighed(self, layer: int, site: str, count: int) -> list[list[str]]:
        """The names of the experts that each output of a router weighs."""
        here: list[list[str]] = [[] for _ in range(count)]
        for index, expert in enumerate(self.experts(layer)):
            target, _, number = expert["name"].partition("/")
            if site == "layer":
                here[expert.get("column", index)].append(expert["name"])
            elif target == site:
                here[int(number)].append(expert["name"])
        return here

    def route(self, prefix: str, x: Tensor) -> list[float]:
        assert self.m is not None
        spec = self.m["router"]
        if spec.get("net") == "swiglu":
            gate = self.affine(f"{prefix}.w1", x)
            logits = self.affine(f"{prefix}.w2", gate * torch.sigmoid(gate) * self.affine(f"{prefix}.w3", x))
        else:
            logits = self.affine(prefix, x)
        if spec.get("activation", "sigmoid") == "softmax":
            scores = [float(s) for s in logits.softmax(0)]
        else:
            scores = [1 / (1 + math.exp(-float(z))) for z in logits]
        threshold = None
        if f"{prefix}.threshold.weight" in self.t:
            threshold = 1 / (1 + math.exp(-float(self.affine(f"{prefix}.threshold", x)[0])))
        if not self.options:
            return self.select(scores, threshold)
        _, number, place, *_ = prefix.split(".")
        site = "layer" if place == "router" else place
        return self.select_as_asked(scores, threshold, int(number), self.weighed(int(number), site, len(scores)))

    def experts(self, layer: int) -> list[dict[str, Any]]:
        if self.m is None:
            return []
        here = [expert for expert in self.m["experts"] if layer in expert["layers"]]

        def place(expert: dict[str, Any]) -> tuple[int, int]:
            site, _, number = expert["name"].partition("/")
            return ORDER.index(site), int(number or 0)

        return sorted(here, key=place)

    # -- experts

    def lora(self, layer: int, target: str, u: Tensor, weights: dict[str, float]) -> Tensor:
        """Sum of the LoRA experts at one linear for one token."""
        out = torch.zeros(len(self.base[f"model.layers.{layer}.{TARGET_OF[target]}.weight"]), dtype=torch.float64)
        group = [expert for expert in self.experts(layer) if expert["name"].split("/")[0] == target]
        if not group:
            return out
        assert self.m is not None
        prefix = f"layers.{layer}.{target}"
        if self.m["router"]["site"] == "linear":
            routed = self.route(f"{prefix}.router", u)
            for expert, weight in zip(group, routed, strict=True):
                out += self.one_lora(f"layers.{layer}.{expert['name']}", prefix, expert, u, weight)
            return out
        (expert,) = group
        weight = weights.get(target, 1.0)
        if "inner" not in expert:
            return self.one_lora(prefix, prefix, expert, u, weight)
        for index, share in enumerate(self.affine(f"{prefix}.router", u).softmax(0)):
            out += self.one_lora(f"{prefix}.{index}", prefix, expert, u, weight * float(share))
        return out

    def one_lora(self, own: str, shared: str, expert: dict[str, Any], u: Tensor, weight: float) -> Tensor:
        a = self.t.get(f"{own}.lora_A", self.t.get(f"{shared}.lora_A"))
        assert a is not None
        out: Tensor = weight * expert["alpha"] / expert["rank"] * (self.t[f"{own}.lora_B"] @ (a @ u))
        return out

    def parallel(self, layer: int, m: Tensor, weights: dict[str, float]) -> Tensor:
        found = [expert for expert in self.experts(layer) if expert["name"] == "P_ADAPTER"]
        if not found:
            return torch.zeros_like(m)
        prefix, weight = f"layers.{layer}.P_ADAPTER", weights.get("P_ADAPTER", 1.0)
        if "inner" not in found[0]:
            low = self.affine(f"{prefix}.down", m)
            return weight * self.affine(f"{prefix}.up", low * torch.sigmoid(low))
        out = torch.zeros_like(m)
        for index, share in enumerate(self.affine(f"{prefix}.router", m).softmax(0)):
            down = f"{prefix}.down" if f"{prefix}.down.weight" in self.t else f"{prefix}.{index}.down"
            low = self.affine(down, m)
            out += weight * float(share) * self.affine(f"{prefix}.{index}.up", low * torch.sigmoid(low))
        return out

    def prompt(self, layer: int, q: list[Tensor], n: Tensor, weights: dict[str, float]) -> list[Tensor]:
        """For each head: w * gate * softmax over all rows of q.k, with each row's share weighed by its inner expert."""
        found = [expert for expert in self.experts(layer) if expert["name"] == "PROMPT"]
        if not found:
            return [torch.zeros_like(head) for head in q]
        prefix, weight = f"layers.{layer}.PROMPT", weights.get("PROMPT", 1.0)
        rows, size = self.t[f"{prefix}.rows"], len(q[0])
        shares = torch.ones(len(rows), dtype=torch.float64)
        if "inner" in found[0]:
            inner = self.affine(f"{prefix}.router", n).softmax(0)
            shares = inner.repeat_interleave(found[0]["length"])
        group = len(q) // (self.c["num_key_value_heads"])
        out = []
        for head, query in enumerate(q):
            kv = slice(head // group * size, (head // group + 1) * size)
            keys = rows @ self.base[f"model.layers.{layer}.self_attn.k_proj.weight"][kv].T
            values = rows @ self.base[f"model.layers.{layer}.self_attn.v_proj.weight"][kv].T
            share = (keys @ query / math.sqrt(size)).softmax(0) * shares
            out.append(weight * self.t[f"{prefix}.gate"][head] * (share @ values))
        return out

    # -- the model

    def layer_weights(self, layer: int, xs: list[Tensor], ns: list[Tensor], token: int) -> dict[str, float]:
        if self.m is None or self.m["router"]["site"] != "layer" or not self.experts(layer):
            return {}
        source = self.m["router"]["input"]
        x = torch.stack(xs).mean(0) if source == "pooled" else (xs if source == "residual" else ns)[token]
        routed = self.route(f"layers.{layer}.router", x)
        return {expert["name"]: routed[expert.get("column", i)] for i, expert in enumerate(self.experts(layer))}

    def linear(self, layer: int, target: str, u: Tensor, weights: dict[str, float]) -> Tensor:
        return self.base[f"model.layers.{layer}.{TARGET_OF[target]}.weight"] @ u + self.lora(layer, target, u, weights)

    def block(self, layer: int, xs: list[Tensor]) -> list[Tensor]:
        heads, kv_heads = self.c["num_attention_heads"], self.c["num_key_value_heads"]
        prefix = f"model.layers.{layer}"
        ns = [self.norm(x, f"{prefix}.input_layernorm.weight") for x in xs]
        keys: list[list[Tensor]] = []
        values: list[list[Tensor]] = []
        out = []
        for token, (x, n) in enumerate(zip(xs, ns, strict=True)):
            w = self.layer_weights(layer, xs, ns, token)
            self.gates[layer, token] = w
            q = [self.rotate(head, token) for head in self.linear(layer, "Q", n, w).chunk(heads)]
            keys.append([self.rotate(head, token) for head in self.linear(layer, "K", n, w).chunk(kv_heads)])
            values.append(list(self.linear(layer, "V", n, w).chunk(kv_heads)))
            mixed = []
            for head in range(heads):
                kv = head // (heads // kv_heads)
                scores = torch.stack([keys[s][kv] @ q[head] / math.sqrt(len(q[head])) for s in range(token + 1)]).softmax(0)
                mixed.append(sum(scores[s] * values[s][kv] for s in range(token + 1)))
            extra = self.prompt(layer, q, n, w)
            att = torch.cat([a + b for a, b in zip(mixed, extra, strict=True)])
            h = x + self.linear(layer, "O", att, w)
            m = self.norm(h, f"{prefix}.post_attention_layernorm.weight")
            gate, up = self.linear(layer, "GATE", m, w), self.linear(layer, "UP", m, w)
            out.append(h + self.linear(layer, "DOWN", gate * torch.sigmoid(gate) * up, w) + self.parallel(layer, m, w))
        return out

    def logits(self, token_ids: list[int]) -> Tensor:
        """(T, V) float64."""
        xs = [self.base["model.embed_tokens.weight"][token] for token in token_ids]
        for layer in range(self.c["num_hidden_layers"]):
            xs = self.block(layer, xs)
        head = self.base.get("lm_head.weight", self.base["model.embed_tokens.weight"])
        return torch.stack([head @ self.norm(x, "model.norm.weight") for x in xs])
