"""The soak under faults, in small: each fault once, every answer held against the one that was given alone, every counter reconciled.

`python -m tests.soak` is the same for ten minutes, and judges how much there was and how long it took.
"""

import asyncio
from pathlib import Path

import pytest
from soak import weather
from storm import NUM_ADAPTERS, SWAPPED
from storm_faults import BAD_CASES, KINDS


@pytest.mark.case(11, 24, 50, 53, 56, 57, 59, 60, 61, 62, 66, 70, 71, 75, 77, 83, 84, 85)
def test_a_storm_of_faults_loses_no_request_and_changes_no_answer(tmp_path: Path) -> None:
    found = asyncio.run(weather(tmp_path, seconds=25, seed=3))
    storm = found.storm
    told = [f"{goal.name}: {goal.figure}" for goal in found.goals if goal.is_met is False]
    told += [f"{check.name}: {check.detail}" for check in found.checks if not check.is_met]
    assert found.is_ok, "\n".join([*told, *storm.failed, *storm.wrong])
    assert set(storm.survived) >= set(KINDS)
    assert len(storm.survived) >= len(KINDS) + len(BAD_CASES)
    assert len(storm.num_of_model) > NUM_ADAPTERS
    assert storm.num_golden.total() > 300
    assert storm.num_of_model[SWAPPED] > 0
    assert storm.num_reloads > 0
    assert storm.num_preemptions > 0
