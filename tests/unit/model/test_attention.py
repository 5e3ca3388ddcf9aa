"""What a GPU computes in another order than the CPU, against the definition; here both on the CPU."""

import pytest
import torch

from moa_serve.model.attention import _causal, _causal_grouped


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("new", "known"), [(1, 7), (5, 0), (5, 11)])
def test_heads_of_a_group_as_queries_of_one(heads: int, kv_heads: int, new: int, known: int) -> None:
    """A mask that is repeated in the wrong order lets a token see what comes behind it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(new, heads, 8), torch.randn(known + new, kv_heads, 8), torch.randn(known + new, kv_heads, 8)
    seen = torch.arange(known + new) <= torch.arange(known, known + new)[:, None]
    torch.testing.assert_close(_causal_grouped(q, k, v, seen), _causal(q, k, v, seen))
