"""Expert activity: sums that are weighed by tokens, and a table that leaves nothing out at any width."""

import pytest
import torch

from moa_serve.engine.activity import Activity
from moa_serve.engine.routing import Routing
from moa_serve.shell.activity import activity_table


def routing(weights: list[list[list[float]]], selected: list[list[list[bool]]], experts: list[list[str]]) -> Routing:
    return Routing(torch.tensor(weights), torch.tensor(selected), None, experts)


def wide(per_linear: int) -> Activity:
    """Two layers with `per_linear` experts at each of three linears, of which every second is selected."""
    names = [f"{target}/{index}" for target in ("Q", "GATE", "DOWN") for index in range(per_linear)]
    selected = torch.zeros(2, 1, len(names), dtype=torch.bool)
    selected[..., ::2] = True
    activity = Activity()
    activity.add(Routing(torch.full((2, 1, len(names)), 0.25), selected, None, [names, names]), 1)
    return activity


def test_prompts_count_by_their_tokens() -> None:
    """A mean of means would give a one-word prompt the weight of a page."""
    activity = Activity()
    activity.add(routing([[[1.0, 0.5]] * 3], [[[True, False]] * 3], [["Q", "V"]]), 3)
    activity.add(routing([[[0.0, 0.5]]], [[[False, False]]], [["Q", "V"]]), 1)
    (layer,) = activity.layers
    assert (layer["Q"].weight, layer["Q"].selected) == (0.75, 0.75)
    assert (layer["V"].weight, layer["V"].selected) == (0.5, 0.0)
    assert activity.experts_per_token == (0.75, 2.0)
    assert activity.skippable == 0.625


def test_layers_without_experts_are_no_part_of_the_mean() -> None:
    activity = Activity()
    activity.add(
        routing([[[0.5, 0.5]], [[0.0, 0.0]], [[0.5, 0.0]]], [[[True, True]], [[False, False]], [[True, False]]], [["Q", "V"], [], ["V"]]), 1
    )
    assert activity.experts_per_token == (1.5, 1.5)
    assert activity.skippable == 0
    text = "\n".join(line.plain for line in activity_table(activity, 80))
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["layer", "Q", "V"],
        ["0", "0.50", "0.50"],
        ["2", "·", "0.50"],
        ["mean", "0.50", "0.50"],
    ]


@pytest.mark.parametrize("width", [30, 40, 80, 120, 1000])
@pytest.mark.parametrize("per_linear", [1, 2, 4, 8, 20])
def test_every_expert_is_in_the_table_and_the_table_in_the_terminal(width: int, per_linear: int) -> None:
    lines = [line.plain for line in activity_table(wide(per_linear), width)[1:]]
    assert max(map(len, lines)) <= width
    first = [cell for line in lines if line.startswith("    0 ") for cell in line.split()[1:]]
    shares = [cell for cell in first if cell in ("0", "100")]
    numbers = [line for line in lines if line.startswith(" " * 6) and set(line.split()) <= set(map(str, range(per_linear)))]
    assert len(shares) == 3 * per_linear
    assert sum(len(line.split()) for line in numbers) == 3 * per_linear


def test_experts_of_one_linear_stay_together_where_they_fit() -> None:
    headers = [line.plain.split() for line in activity_table(wide(4), 40) if line.plain.startswith("layer")]
    assert headers == [["layer", "Q", "GATE"], ["layer", "DOWN"]]
