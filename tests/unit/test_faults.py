"""The hook by which tests hurt a running server: it must do what its file says, and nothing else."""

import errno
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from moa_serve import faults
from moa_serve.faults import Faults


def write(file: Path, *found: dict[str, Any]) -> Faults:
    file.write_text(json.dumps([{"id": str(number), **fault} for number, fault in enumerate(found)]))
    return Faults(file)


def test_off_unless_somebody_turns_it_on() -> None:
    assert faults.active is None


def test_a_fault_strikes_as_often_as_it_says_and_where_it_says(tmp_path: Path) -> None:
    found = write(tmp_path / "f", {"at": "forward", "raise": "MemoryError", "times": 2, "where": {"adapter": "3fa", "seed": 7}})
    for facts in ({}, {"adapter": "3fa9"}, {"adapter": "4fa", "seed": 7}, {"adapter": [None, "x"], "seed": [7]}):
        found.strike("forward", **facts)
    found.strike("sample", adapter="3fa9", seed=7)
    for _ in range(2):
        with pytest.raises(MemoryError, match="fault 0"):
            found.strike("forward", adapter=[None, "3fa9"], seed=[5, 7])
    found.strike("forward", adapter="3fa9", seed=7)


def test_null_is_the_base(tmp_path: Path) -> None:
    found = write(tmp_path / "f", {"at": "logits", "times": None, "where": {"adapter": None}})
    assert found.is_struck("logits", adapter=None)
    assert not found.is_struck("logits", adapter="3fa9")


def test_errors_of_the_disk_have_their_numbers(tmp_path: Path) -> None:
    found = write(tmp_path / "f", {"at": "write", "raise": "ENOSPC"})
    with pytest.raises(OSError) as caught:
        found.strike("write", name="x")
    assert caught.value.errno == errno.ENOSPC


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    """A test writes it while the server runs; a half of it is not taken for the whole."""
    file = tmp_path / "f"
    found = Faults(file)
    assert found.value("memory", 0.5) == 0.5
    write(file, {"id": "a", "at": "memory", "value": 0.9})
    assert [found.value("memory", 0.5) for _ in range(2)] == [0.9, 0.5]
    file.write_text('[{"id": "b"')
    os.utime(file, ns=(1, 1))
    assert found.value("memory", 0.5) == 0.5
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert found.value("memory", 0.5) == 0.5, "no descriptor is free to read it, which is no fault of a step"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    write(file, {"id": "c", "at": "memory", "value": 0.7})
    assert found.value("memory", 0.5) == 0.7
    file.unlink()
    assert found.value("memory", 0.5) == 0.5


@pytest.mark.case(84)
def test_the_clock_is_wrong_as_long_as_it_stands_in_the_file(tmp_path: Path) -> None:
    found = write(tmp_path / "f", {"at": "clock", "value": 3600})
    found.strike("loop")
    try:
        assert time.time() - faults._true_time() == pytest.approx(3600, abs=1)
    finally:
        write(tmp_path / "f", {"id": "none", "at": "loop"})
        found.strike("step")
    assert time.time() == pytest.approx(faults._true_time(), abs=1)
