"""What outlives the process: whole or not at all, and never two owners."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_serve.adapter.state import FORMAT, Registered, RegistryState, StateDirectory
from moa_serve.errors import InvalidRequest, RegistryWriteFailed

REVISION = "ab" * 32
_NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
_SIGNATURES = st.lists(st.tuples(st.text(max_size=8), *[st.integers(0, 2**63)] * 3), max_size=3).map(tuple)
_STATES = st.builds(
    RegistryState,
    st.dictionaries(_NAMES, st.builds(Registered, st.text(max_size=20), st.none() | st.just("lora"), st.just(REVISION)), max_size=4),
    st.dictionaries(_NAMES, _SIGNATURES, max_size=3),
    st.dictionaries(_NAMES, st.dictionaries(_NAMES, st.integers(0, 100), min_size=1, max_size=3), max_size=3),
    st.frozensets(_NAMES, max_size=3),
)


@given(state=_STATES)
@settings(max_examples=50, deadline=None)
def test_a_state_comes_back_as_it_was_written(state: RegistryState) -> None:
    assert RegistryState.parse(json.loads(json.dumps(state.to_json()))) == state


def test_it_is_read_by_the_next_owner(tmp_path: Path) -> None:
    first = StateDirectory(tmp_path / "deep" / "state")
    assert first.read() == (RegistryState(), None)
    state = RegistryState().loaded("a", Registered("sub/a", None, REVISION)).pinned("a", True).aliased("math", {"a": 1})
    first.write(state)
    with pytest.raises(InvalidRequest, match="another server uses"):
        StateDirectory(tmp_path / "deep" / "state")
    first.close()
    second = StateDirectory(tmp_path / "deep" / "state")
    assert second.read() == (state, None)
    second.close()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        json.dumps({"format": "moa-state/9"}).encode(),
        json.dumps({"format": FORMAT, "more": 1}).encode(),
        json.dumps({"format": FORMAT, "adapters": {"a": {"path": "a", "variant": None, "revision": "short"}}}).encode(),
        json.dumps({"format": FORMAT, "hidden": {"a": [["f", 1, 2]]}}).encode(),
        json.dumps({"format": FORMAT, "aliases": {"a": {}}}).encode(),
        json.dumps({"format": FORMAT, "aliases": {"a": {"b": True}}}).encode(),
        json.dumps({"format": FORMAT, "pins": [1]}).encode(),
    ],
)
def test_a_file_that_cannot_be_understood_is_set_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "registry.json").write_bytes(content)
    directory = StateDirectory(tmp_path)
    state, problem = directory.read()
    assert state == RegistryState()
    assert problem is not None
    (aside,) = tmp_path.glob("*.bad")
    assert aside.read_bytes() == content
    assert aside.name in problem
    assert directory.read() == (RegistryState(), None)
    directory.close()


@pytest.mark.parametrize(("owner", "fails"), [(os, "fsync"), (Path, "replace")], ids=["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, fails: str) -> None:
    directory = StateDirectory(tmp_path)
    state = RegistryState().pinned("a", True)
    directory.write(state)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(owner, fails, full)
        with pytest.raises(RegistryWriteFailed, match="No space left"):
            directory.write(state.pinned("b", True))
    assert directory.read() == (state, None)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lock", "registry.json"]
    directory.close()


def test_a_half_written_file_of_a_killed_process_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".registry.json.0badf00d").write_bytes(b'{"form')
    directory = StateDirectory(tmp_path)
    assert directory.read() == (RegistryState(), None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["lock"]
    directory.close()


def test_a_place_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="cannot be used"):
        StateDirectory(tmp_path / "file")
