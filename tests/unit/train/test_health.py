"""Collapse and imbalance as numbers: what the even and the one-sided router look like."""

import numpy as np
import pytest

from moa_serve.model.counters import RoutingTotals
from moa_serve.train.health import RouterHealth


def totals(gates: list[list[float]], selected: list[list[float]], names: tuple[str, ...], tokens: int = 100) -> RoutingTotals:
    kept, weights = np.array(selected, dtype=np.float64), np.array(gates, dtype=np.float64)
    return RoutingTotals(tokens, kept, weights, kept, np.zeros(len(gates)), (names,) * len(gates))


def test_an_even_router_is_healthy() -> None:
    health = RouterHealth.of(totals([[50, 50, 50, 50]], [[100] * 4], ("Q", "K", "V", "O")))
    assert health is not None
    assert health.entropy == pytest.approx(1)
    assert (health.imbalance, health.dominant, health.idle, health.skipped) == (0, 0.25, 0, 0)


def test_a_collapsed_router_is_seen() -> None:
    health = RouterHealth.of(totals([[90, 0, 0, 0]], [[100, 0, 0, 0]], ("Q", "K", "V", "O")))
    assert health is not None
    assert health.imbalance == pytest.approx(3**0.5)
    assert health.entropy == 0
    assert health.dominant == 1
    assert (health.idle, health.skipped) == (0.75, 0.75)


def test_routers_at_each_linear_are_judged_apart() -> None:
    """Two linears that are even in themselves, one busier than the other: no imbalance."""
    names = ("Q/0", "Q/1", "V/0", "V/1")
    health = RouterHealth.of(totals([[10, 10, 90, 90]], [[100] * 4], names))
    assert health is not None
    assert health.imbalance == 0
    assert health.entropy == pytest.approx(1)


def test_layers_without_experts_and_lone_experts_do_not_count() -> None:
    weights = np.array([[1.0, 1.0], [5.0, 0.0], [0.0, 0.0]])
    mixed = RoutingTotals(10, np.ones((3, 2)), weights, np.ones((3, 2)), np.zeros(3), (("Q", "K"), ("Q",), ()))
    health = RouterHealth.of(mixed)
    assert health is not None
    assert health.imbalance == 0


def test_without_routers_or_tokens_there_is_nothing_to_say() -> None:
    assert RouterHealth.of(RoutingTotals(10, np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 2)), np.zeros(1))) is None
    assert RouterHealth.of(totals([[0, 0]], [[0, 0]], ("Q", "K"), tokens=0)) is None


def test_a_router_that_keeps_nothing_is_no_crash() -> None:
    health = RouterHealth.of(totals([[0, 0]], [[0, 0]], ("Q", "K")))
    assert health is not None
    assert (health.skipped, health.idle) == (1, 1)
