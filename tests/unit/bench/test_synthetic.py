"""Made-up adapters are what they are measured as: every family whole, none the identity, Sparse ones as sparse as the paper's."""

import pytest
import torch

from moa_serve.adapter.manifest import OUTPUT_FACTORS, VARIANTS
from moa_serve.bench.synthetic import FAMILIES, made_up, synthetic, tuned
from moa_serve.bench.workload import Pages, Workload, selected_share
from moa_serve.errors import EngineError
from moa_serve.model.weights import Base


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_whole_and_not_the_identity(family: str, base: Base) -> None:
    adapter, other = synthetic(family, base.config, 0), synthetic(family, base.config, 1)
    assert {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()} == adapter.manifest.expected_tensors()
    factors = [name for name in adapter.tensors if name.endswith(OUTPUT_FACTORS)]
    assert factors
    assert all(adapter.tensors[name].any() for name in factors)
    assert not any(torch.equal(tensor, other.tensors[name]) for name, tensor in adapter.tensors.items())


def test_every_variant_is_among_the_families() -> None:
    assert {recipe.variant for recipe in FAMILIES.values()} == set(VARIANTS)


@pytest.mark.parametrize("seed", [0, 1])
def test_tuned_routers_select_the_papers_share(pages: Pages, seed: int) -> None:
    """On other tokens than they were tuned on. In real sizes within 0.02; here are fewer experts to take a mean over."""
    prepared = pages.model.prepare(made_up(pages, "sparse_moa", seed))
    share = selected_share(Workload(pages, [prepared] * 4, tokens=128, seed=7).trace())
    assert share == pytest.approx(0.59, abs=0.05)


def test_a_share_out_of_reach_is_an_error(torch_pages: Pages) -> None:
    """No number of the tokens and experts is that share exactly."""
    with pytest.raises(EngineError, match="cannot be tuned to select 59%"):
        tuned(torch_pages, synthetic("sparse_moa", torch_pages.model.config, 0), share=0.5901, tolerance=1e-9)
