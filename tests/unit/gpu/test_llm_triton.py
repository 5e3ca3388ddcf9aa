"""`LLM` on the fused form, in Triton's interpreter, beside the torch backend: what a user sees of both is the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import write_base
from gpu_steps import SMALL, manifest_of, random_tensors

from moa_serve import LLM, SamplingParams
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.errors import AdapterIneffective, AdapterNotFinite

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy, about what is not finite
ONE = SMALL | {"num_hidden_layers": 1, "eos_token_id": None}
FAMILIES = ("sparse_fn", "instance", "mola_layerwise")
PROMPTS = [[5, 17, 8], [3], [*range(18)]]
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_bytes": 2**18, "num_slots": 3}


def write(folder: Path, family: str, seed: int = 1, scale: float | None = None) -> Path:
    made = manifest_of(family, ONE)
    tensors = random_tensors(made, seed)
    if scale is not None:
        tensors = {name: tensor * scale if name.endswith("lora_A") else tensor for name, tensor in tensors.items()}
    write_adapter(folder, made, tensors)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fused")
    return {"base": write_base(root / "base", ONE)} | {family: write(root / family, family) for family in FAMILIES}


def opened(folders: dict[str, Path], backend: str, **options: Any) -> LLM:
    return LLM(folders["base"], adapters={name: folders[name] for name in FAMILIES}, backend=backend, **OPTIONS | options)


@pytest.fixture(scope="module")
def both(folders: dict[str, Path]) -> Iterator[tuple[LLM, LLM]]:
    with opened(folders, "triton") as ours, opened(folders, "torch") as theirs:
        yield ours, theirs


def tokens(llm: LLM, prompts: list[list[int]], names: list[str | None], **options: Any) -> list[list[int]]:
    return [completion.token_ids for completion in llm.generate(prompts, GREEDY, adapter=names, **options)]


def test_answers_of_several_adapters_in_one_batch(both: tuple[LLM, LLM]) -> None:
    """Prompts in chunks beside decoding rows, prefixes that are cached, and requests' own rules; then the totals of it all."""
    ours, theirs = both
    names: list[str | None] = [None, *FAMILIES]
    prompts = [PROMPTS[index % 3] for index in range(len(names))]
    assert tokens(ours, prompts, names) == tokens(theirs, prompts, names)
    again = [[*range(18), 4], [*range(18), 5]]
    assert tokens(ours, again, ["mola_layerwise", "sparse_fn"]) == tokens(theirs, again, ["mola_layerwise", "sparse_fn"])
    assert tokens(ours, PROMPTS[:2], ["sparse_fn"] * 2, moa={"top_k": 2}) == tokens(
        theirs, PROMPTS[:2], ["sparse_fn"] * 2, moa={"top_k": 2}
    )
    for family in FAMILIES:
        found, expected = ours.routing_totals(family), theirs.routing_totals(family)
        assert found is not None
        assert expected is not None
        assert (found.tokens, found.experts) == (expected.tokens, expected.experts)
        np.testing.assert_array_equal(found.selected, expected.selected)
        np.testing.assert_allclose(found.gate_sum, expected.gate_sum, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.thresholds, expected.thresholds, rtol=1e-4, atol=1e-4)
        assert (found.computed <= expected.computed).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_logits_and_scores(both: tuple[LLM, LLM], family: str) -> None:
    ours, theirs = both
    found, expected = ours.route(PROMPTS[0], adapter=family), theirs.route(PROMPTS[0], adapter=family)
    assert found.experts == expected.experts
    assert torch.equal(found.selected, expected.selected)
    for name in ("weights", "gates"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.logits(PROMPTS[0], adapter=family), theirs.logits(PROMPTS[0], adapter=family), atol=2e-4, rtol=1e-4)
    choices = [[7, 8, 9], [7], [4, 5]]
    one, other = (llm.score_choices([PROMPTS[0]], [choices], adapter=family)[0] for llm in both)
    assert [score.logprob for score in one] == pytest.approx([score.logprob for score in other], abs=1e-3)


def test_more_adapters_than_slots_and_one_that_fits_into_none(folders: dict[str, Path], tmp_path: Path) -> None:
    """They queue and take each other's slot; one that came later and is larger than a slot is answered as well."""
    names: list[str | None] = [*FAMILIES, "large"]
    prompts = [PROMPTS[0]] * len(names)
    found = []
    large = write(tmp_path / "large", "hydralora")
    for backend, slots in (("triton", 1), ("torch", 4)):
        with opened(folders, backend, num_slots=slots) as llm:
            llm.load_adapter("large", large)
            found.append(tokens(llm, prompts, names))
    assert found[0] == found[1]


def test_loading_and_unloading_while_others_stay(folders: dict[str, Path], tmp_path: Path) -> None:
    """A name's next adapter is never the one before; one that overflows, or that does nothing, is refused, and nobody notices."""
    first, second = folders["sparse_fn"], write(tmp_path / "second", "sparse_fn", seed=2)
    with LLM(folders["base"], adapters={"a": first, "stays": folders["mola_layerwise"]}, backend="triton", **OPTIONS) as llm:
        old, stays = tokens(llm, PROMPTS[:1], ["a"]), llm.logits(PROMPTS[0], adapter="stays")
        old_logits = llm.logits(PROMPTS[0], adapter="a")
        llm.unload_adapter("a")
        llm.load_adapter("a", second)
        assert not torch.equal(llm.logits(PROMPTS[0], adapter="a"), old_logits)
        with pytest.raises(AdapterNotFinite):
            llm.load_adapter("bad", write(tmp_path / "bad", "mola_layerwise", scale=1e38))
        with pytest.raises(AdapterIneffective):
            llm.load_adapter("nothing", write(tmp_path / "nothing", "mola_layerwise", scale=0.0))
        llm.unload_adapter("a")
        llm.load_adapter("a", first)
        assert tokens(llm, PROMPTS[:1], ["a"]) == old
        assert torch.equal(llm.logits(PROMPTS[0], adapter="stays"), stays)
