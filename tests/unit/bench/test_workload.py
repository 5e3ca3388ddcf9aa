"""A measured step is a real one: the same logits by every backend, behind the context that it claims to have."""

import pytest
import torch

from moa_serve.bench import workload
from moa_serve.bench.synthetic import FAMILIES, synthetic
from moa_serve.bench.workload import Pages, Workload, selected_share
from moa_serve.errors import InvalidRequest
from moa_serve.model.attention import CausalAttention
from moa_serve.model.backend import Backend, PreparedAdapter
from moa_serve.model.batch import ForwardBatch
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import Base, BaseWeights


def prepared(pages: Pages, family: str, seed: int = 0) -> PreparedAdapter:
    return pages.model.prepare(synthetic(family, pages.model.config, seed, scale=0.3))


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_backends_agree(family: str, tokens: int, torch_pages: Pages, native_pages: Pages) -> None:
    logits = []
    for pages in (torch_pages, native_pages):
        adapter = prepared(pages, family)
        work = Workload(pages, [adapter, adapter, None], tokens=tokens)
        logits.append(work.run())
        torch.testing.assert_close(work.run(), logits[-1])
    assert logits[0].shape == (3, torch_pages.model.config.vocab_size)
    torch.testing.assert_close(logits[0], logits[1], atol=2e-4, rtol=1e-4)


def expected(pages: Pages, base: BaseWeights, row: int, context: int, last: torch.Tensor) -> torch.Tensor:
    """(V,) logits behind so many of a row's tokens and `last`, all computed in one go."""
    token_ids = torch.cat([pages.token_ids[row][:context], last.view(1)])
    with torch.inference_mode():
        whole = Transformer(pages.model.config, base).forward(
            ForwardBatch(token_ids, torch.arange(len(token_ids))), CausalAttention([(0, len(token_ids))])
        )
    return whole[-1]


def test_the_context_is_there(pages: Pages, base: Base) -> None:
    work = Workload(pages, [None, None])
    for row, logits in enumerate(work.run()):
        torch.testing.assert_close(logits, expected(pages, base.weights, row, 20, work.batch.token_ids[row]), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [7, 64])
def test_contexts_of_any_length_and_the_beginnings_of_them(
    chunk: int, fresh_model: Backend, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed in chunks where they are long."""
    monkeypatch.setattr(workload, "_CHUNK", chunk)
    pages = Pages(fresh_model, [40, 23])
    for first_row, context in ((1, 23), (0, 17)):
        work = Workload(pages, [None] * (2 - first_row), first_row=first_row, context=context)
        for row, logits in enumerate(work.run(), start=first_row):
            last = work.batch.token_ids[row - first_row]
            torch.testing.assert_close(logits, expected(pages, base.weights, row, context, last), atol=2e-4, rtol=1e-4)
    with pytest.raises(AssertionError, match="hold less than 40 tokens"):
        Workload(pages, [None, None])


def test_a_cache_that_does_not_fit_is_refused(fresh_model: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    page = fresh_model.bytes_per_block(16)
    monkeypatch.setattr(workload, "available_bytes", lambda _: 8 * page - 1)
    with pytest.raises(
        InvalidRequest, match=f"2 rows with a context of up to 50 tokens takes {8 * page} bytes, but {8 * page - 1} are free"
    ):
        Pages(fresh_model, [40, 50])
    Pages(fresh_model, [40, 40])


def test_a_row_does_not_depend_on_the_others(pages: Pages) -> None:
    soft, sparse = prepared(pages, "soft_moa"), prepared(pages, "sparse_moa")
    rows = [soft, soft, None, sparse]
    mixed = Workload(pages, rows)
    assert [(segment.start, segment.end) for segment in mixed.batch.segments] == [(0, 2), (3, 4)]
    logits = mixed.run()
    for row, adapter in enumerate(rows):
        alone = Workload(pages, [adapter], first_row=row).run()
        torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-4, rtol=1e-4)
    base = Workload(pages, [None] * 4).run()
    assert [not torch.allclose(logits[row], base[row], atol=1e-2) for row in range(4)] == [True, True, False, True]


@pytest.mark.parametrize("family", ["soft_moa_instance", "unipeft"])
def test_instance_level_weights_are_known_only_behind_a_prompt(family: str, torch_pages: Pages) -> None:
    adapter = prepared(torch_pages, family)
    pooled = [Workload(torch_pages, [adapter] * 2, tokens=tokens).batch.segments[0].pooled for tokens in (1, 5)]
    assert [one.spans for one in pooled if one is not None] == [(None, None), ((0, 5), (5, 10))]


def test_what_routers_chose_is_counted(pages: Pages) -> None:
    assert selected_share(Workload(pages, [None]).trace()) is None
    assert selected_share(Workload(pages, [prepared(pages, "soft_moa")]).trace()) == 1
    assert selected_share(Workload(pages, [prepared(pages, "mola")], tokens=7).trace()) == pytest.approx(2 / 8)


def test_there_must_be_pages(torch_pages: Pages) -> None:
    with pytest.raises(AssertionError, match="hold 8 rows"):
        Workload(torch_pages, [None] * 9)
    with pytest.raises(AssertionError, match="spare pages for 512 tokens"):
        Workload(torch_pages, [None], tokens=513)
