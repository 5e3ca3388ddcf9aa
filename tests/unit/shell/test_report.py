"""What `check` counts."""

import pytest
from families import FAMILIES, random_adapter

from moa_serve.shell.report import ROUTERS, _parameters, expert_rows, ranges, router_text


@pytest.mark.parametrize(("numbers", "text"), [([0, 1, 2, 3], "0-3"), ([4], "4"), ([0, 2, 3, 9], "0,2-3,9"), ([], "")])
def test_ascending_numbers_are_written_as_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_routers_sum_to_all_parameters(family: str) -> None:
    """A parameter that belongs to nobody would make the table lie about where the bytes are."""
    manifest, tensors = random_adapter(family)
    shared = sum(count for (owner, _), count in _parameters(manifest).items() if owner == ROUTERS)
    assert sum(row.num_parameters for row in expert_rows(manifest)) + shared == manifest.num_parameters
    assert manifest.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert router_text(manifest)


def test_equal_experts_of_one_linear_share_a_row() -> None:
    manifest, _ = random_adapter("adamole")
    assert [(row.name, row.layers, row.size) for row in expert_rows(manifest)] == [
        ("Q/0-3", "0-2", "rank 4"),
        ("O/0-3", "0-2", "rank 4"),
        ("GATE/0-3", "0-2", "rank 4"),
    ]
