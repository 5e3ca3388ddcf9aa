"""How alike the experts of an adapter are: what each of them adds for the same tokens, before a router weighs it.

Experts stand at places of different width, so they are compared by linear CKA, which asks whether two sets of outputs tell the same tokens
apart, whatever axes and scale they use (Kornblith et al. 2019, arXiv:1905.00414, section 3). Experts at one place also share one output
space: there the mean absolute cosine says whether they add the same direction. High in both is representation collapse. Neither has to be
0 for experts that learned nothing alike: all of them read the same tokens.

Two precautions, without which a few tokens decide (SmolLM2-135M, 7 sentences). Each output has unit length: some tokens have activations
that are 25 times the median's in DOWN of layer 2, and give eight random experts there a CKA of 0.96; at unit length it is 0.05. And the
first token of a text is left out: it is an attention sink, like no other token (adapters/math-soft, layer 16: 0.10 with it, 0.06 without).

Not for serving: it needs a T x T matrix for each expert of a layer. Tensors in, tensors out; keeps no state.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_serve.adapter.manifest import KINDS
from moa_serve.model.attention import CausalAttention
from moa_serve.model.batch import Expert, ForwardBatch, PooledRows, Segment
from moa_serve.model.moa import MoaWeights, Routed
from moa_serve.model.transformer import Transformer

MIN_TOKENS = 4  # the unbiased estimator divides by T - 3
GOOD_TOKENS = 100  # unrelated outputs stray from 0 by 1.4 / T (standard deviation, simulated, ranks 1 to 16)
MAX_TOKENS = 512  # a float64 matrix of 2 MB for each expert of a layer
ACROSS = "across"  # stands among the places for the pairs of experts at different ones

_CONSTANT = 1e-12  # of the outputs' sum of squares: what float32 leaves over where an expert adds the same to every token


@dataclass(frozen=True, slots=True)
class Collapse:
    """Some pairs of experts in one number each: the mean of their CKA and of their cosine; NaN where there is nothing to compare."""

    cka: float
    cosine: float


@dataclass(frozen=True, slots=True, eq=False)
class Similarity:
    """Every pair of some experts.

    Args:
        experts: `Q`, `PROMPT`, ... ; `Q/0` of routers at each linear; `Q.0` inside a nested expert. In canonical order.
        cka: (E, E) float64, linear CKA of unit outputs: 1 where they are equal up to rotation and scale, about 0 where they are unrelated
            (being unbiased it may fall a little below); NaN where an expert adds nothing, or the same to every token.
        cosine: (E, E) float64 in 0..1; NaN for experts at different places.
    """

    experts: list[str]
    cka: Tensor
    cosine: Tensor

    @property
    def places(self) -> list[str]:
        return list(dict.fromkeys(map(place_of, self.experts)))

    @property
    def collapse(self) -> dict[str, Collapse]:
        """By place where several experts stand, and ACROSS for all pairs at different places."""
        crowded = [place for place in self.places if sum(place_of(name) == place for name in self.experts) > 1]
        found = {place: self.between(place, place) for place in crowded}
        if len(self.places) > 1:
            found[ACROSS] = self._mean(lambda a, b: a != b)
        return found

    def between(self, first: str, second: str) -> Collapse:
        """Of the pairs with one expert at each of two places, or with both at one."""
        return self._mean(lambda a, b: (a, b) in ((first, second), (second, first)))

    def _mean(self, is_wanted: Callable[[str, str], bool]) -> Collapse:
        places = [place_of(name) for name in self.experts]
        wanted = torch.tensor([[i < j and is_wanted(a, b) for j, b in enumerate(places)] for i, a in enumerate(places)], dtype=torch.bool)
        return Collapse(float(self.cka[wanted].nanmean()), float(self.cosine[wanted].nanmean()))


def place_of(name: str) -> str:
    """Where an expert adds its output: `Q` of `Q/0` and of `Q.0`."""
    return re.split("[/.]", name, maxsplit=1)[0]


def mean_over_layers(layers: Sequence[Similarity | None]) -> Similarity:
    """Each pair in the mean over the layers where it can be compared; experts that stand in some layers only are part of it."""
    found = [layer for layer in layers if layer is not None]
    names = sorted({name for layer in found for name in layer.experts}, key=canonical)
    stacked = torch.full((2, len(found), len(names), len(names)), torch.nan, dtype=torch.float64)
    for number, layer in enumerate(found):
        at = torch.tensor([names.index(name) for name in layer.experts])
        stacked[0, number, at[:, None], at] = layer.cka
        stacked[1, number, at[:, None], at] = layer.cosine
    cka, cosine = stacked.nanmean(1)
    return Similarity(names, cka, cosine)


def canonical(name: str) -> tuple[int, int]:
    """Key that sorts experts of all families in their one order."""
    place, *number = re.split("[/.]", name)
    return KINDS.index(place), int(number[0]) if number else 0


# -- comparing outputs


def linear_cka(outputs: Sequence[Tensor]) -> Tensor:
    """(E, E) float64 from E outputs (T, d_e): CKA(X, Y) = <K, L> / (|K| |L|), K and L the U-centred Gram matrices of X and Y.

    That is HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) with the unbiased HSIC of Song et al. 2012, section 2.2. The biased one would call
    unrelated outputs of rank 8 alike by 0.14 at 50 tokens and by 0.08 at 100 (simulated; unbiased 0.00), more for wider experts than for
    narrow ones. NaN for outputs that do not differ between tokens, and everywhere below MIN_TOKENS.
    """
    return _pairwise([_gram(x) for x in outputs])


def _gram(outputs: Tensor) -> Tensor:
    """(T, d) -> (T * T,) float64: X X^T, U-centred (Szekely & Rizzo 2014, arXiv:1310.2926, definition 2).

    k_ij - sum_l k_il / (T - 2) - sum_l k_lj / (T - 2) + sum_lm k_lm / ((T - 1) (T - 2)) off the diagonal, which is 0 before and after.
    """
    count = len(outputs)
    if count < MIN_TOKENS:
        return torch.full((1,), torch.nan, dtype=torch.float64)
    wide = outputs.double()
    x = wide - wide.mean(0)  # U-centring does the same; done before, no digits are lost
    if x.square().sum() <= _CONSTANT * wide.square().sum():
        return x.new_full((count * count,), torch.nan)
    gram = (x @ x.T).fill_diagonal_(0)
    sums = gram.sum(1) / (count - 2)
    gram -= sums[:, None] + sums - gram.sum() / ((count - 1) * (count - 2))
    return gram.fill_diagonal_(0).flatten()


def _pairwise(grams: Sequence[Tensor]) -> Tensor:
    """(E, E) cosines between the results of `_gram`."""
    flat = torch.stack(tuple(grams))
    flat /= flat.norm(dim=1, keepdim=True)
    return (flat @ flat.T).cpu()


def mean_absolute_cosine(outputs: Sequence[Tensor]) -> Tensor:
    """(E, E) float64 from E outputs (T, d) of one width: the mean over tokens of |x.y| / (|x| |y|).

    Tokens to which one of the two adds nothing do not count; NaN where none is left.
    """
    unit = _unit(torch.stack(tuple(outputs), 1))  # (T, E, d)
    counts = (unit != 0).any(2).double()
    return ((unit @ unit.transpose(1, 2)).abs().sum(0) / (counts.T @ counts)).cpu()


def _unit(outputs: Tensor) -> Tensor:
    """float64, at length 1; what is 0 stays 0."""
    wide = outputs.double()
    norms = wide.norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, wide / norms, 0.0)


# -- from a text to outputs


def expert_similarity(model: Transformer, weights: MoaWeights, prompts: Sequence[Sequence[int]]) -> tuple[list[Similarity | None], int]:
    """Run prompts under one adapter and compare its experts in each layer.

    Every expert reads what it reads in serving, with all others in place, and all its outputs count, those of tokens that did not select
    it as well; only their direction, and not those of a prompt's first token.

    Args:
        prompts: each a sequence of its own; what goes beyond MAX_TOKENS together is cut off.
    Returns:
        One for each layer, None where the adapter has no expert; and the number of tokens that were compared.
    """
    prompts = _cut(prompts)
    ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0).tolist()
    spans = [(end - len(prompt), end) for prompt, end in zip(prompts, ends, strict=True)]
    is_compared = torch.ones(ends[-1], dtype=torch.bool)
    is_compared[[start for start, _ in spans]] = False
    observer = _Observer(weights, is_compared)
    device = model.device
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts]).to(device)
    token_ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    lengths = [len(prompt) for prompt in prompts]
    pooled = PooledRows.of_whole(lengths, lengths, weights, device) if weights.manifest.is_pooled else None
    segment = Segment(0, len(token_ids), weights, pooled)
    with torch.inference_mode():
        model.hidden(ForwardBatch(token_ids, positions, (segment,), observer=observer), CausalAttention(spans))
    return observer.finish(), int(is_compared.sum())


def _cut(prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    kept, left = [], MAX_TOKENS
    for prompt in prompts:
        if left and len(prompt):
            kept.append(prompt[:left])
            left -= len(kept[-1])
    return kept


def outputs_of(expert: Expert, source: Tensor, routed: Routed | None) -> Iterator[Tensor]:
    """What each expert behind one call adds alone and with the weight 1: (T, d) for one, or for every output of its own router.

    The served module itself is asked, with a router's word that names one of them, so that no formula stands here a second time.
    """
    if routed is None:
        yield expert(source, None, None).flatten(1)
        return
    for index in range(routed.gates.shape[-1]):
        alone = torch.zeros_like(routed.gates)
        alone[:, index] = 1
        yield expert(source, None, Routed(alone, None, alone > 0, alone)).flatten(1)


class _Observer:
    """Turns outputs into matrices while they come, place by place, and compares them when the layer is complete."""

    def __init__(self, weights: MoaWeights, is_compared: Tensor) -> None:
        self._separator = "/" if weights.manifest.router.site == "linear" else "."
        self._is_compared = is_compared
        self._layers: list[Similarity | None] = [None] * len(weights.layers)
        self._layer = 0
        self._begin()

    def _begin(self) -> None:
        self._names: list[str] = []
        self._grams: list[Tensor] = []
        self._blocks: list[Tensor] = []  # cosines at each place

    def __call__(self, layer: int, site: str, expert: Expert, source: Tensor, routed: Routed | None) -> None:
        if layer != self._layer:
            self._end_layer()
            self._layer = layer
        outputs = [output[self._is_compared.to(output.device)] for output in outputs_of(expert, source, routed)]
        self._names += [site] if routed is None else [f"{site}{self._separator}{index}" for index in range(len(outputs))]
        self._grams += [_gram(_unit(output)) for output in outputs]
        self._blocks.append(mean_absolute_cosine(outputs))

    def _end_layer(self) -> None:
        if self._names:
            cosine = torch.full((len(self._names), len(self._names)), torch.nan, dtype=torch.float64)
            start = 0
            for block in self._blocks:
                place = slice(start, start + len(block))
                cosine[place, place] = block
                start = place.stop
            self._layers[self._layer] = Similarity(self._names, _pairwise(self._grams), cosine)
        self._begin()

    def finish(self) -> list[Similarity | None]:
        self._end_layer()
        return self._layers
