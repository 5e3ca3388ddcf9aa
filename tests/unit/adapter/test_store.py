"""AdapterStore: names, paths, leases; a broken adapter never gets a name."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_tensors, tiny_config, tiny_manifest

from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.store import AdapterSource, AdapterStore, resolve_below
from moa_serve.errors import (
    AdapterExists,
    AdapterLimit,
    AdapterMemory,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterPathDenied,
    AdapterUnreadable,
)

_CONFIG = tiny_config()
_MANIFEST = tiny_manifest(_CONFIG, "soft_moa")
_SIZE = 4 * _MANIFEST.num_parameters


def write(root: Path, name: str, seed: int = 0) -> AdapterSource:
    write_adapter(root / name, _MANIFEST, random_tensors(_MANIFEST, seed))
    return AdapterSource(root / name)


def store_with(root: Path, names: str, **options: Any) -> AdapterStore:
    store = AdapterStore(_CONFIG, base_name="base", adapters_dir=root, **options)
    for seed, name in enumerate(names):
        source = write(root, name, seed)
        store.publish(name, source, store.read(name, source))
    return store


def test_a_published_adapter_can_be_leased_by_name(tmp_path: Path) -> None:
    store = store_with(tmp_path, "ab")
    assert store.names() == ["a", "b"]
    assert "a" in store
    with store.lease("a") as adapter:
        assert adapter.revision == store.get("a").revision
        assert adapter.num_bytes == _SIZE
    with pytest.raises(AdapterExists):
        store.publish("a", AdapterSource(tmp_path / "b"), adapter)


@pytest.mark.case(22)
@pytest.mark.parametrize("name", ["base", "", "a" * 65, "a/b", ".hidden", "a b", "a\n", "\u202eabc", "ä", None, 7, ["a"]])
def test_bad_names_are_refused(tmp_path: Path, name: Any) -> None:
    """Names reach metrics, logs, URLs and paths: control characters and slashes would forge any of them."""
    store = AdapterStore(_CONFIG, base_name="base")
    with pytest.raises(AdapterNameInvalid):
        store.read(name, write(tmp_path, "good"))


@pytest.mark.case(17)
@pytest.mark.parametrize(
    "path", ["..", "../x", "a/../../x", "/etc", "", ".", "~/x", "$HOME", "http://x/y", "a\0b", "link", "link/a", "x" * 5000]
)
def test_paths_outside_the_directory_are_denied(tmp_path: Path, path: str) -> None:
    """A load request must not reach files that the operator did not put there."""
    root = tmp_path / "root"
    write(tmp_path / "outside", "a")
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(AdapterPathDenied):
        resolve_below(root, path)


def test_paths_inside_the_directory_are_taken(tmp_path: Path) -> None:
    """Relative and absolute; a root that is itself reached through a link counts as the root."""
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    write(tmp_path / "real", "a")
    for root in (tmp_path / "alias", tmp_path / "real"):
        for path in ("a", root / "a", tmp_path / "real" / "a"):
            assert resolve_below(root, path) == tmp_path / "real" / "a"


def test_scan_finds_adapters_and_skips_the_rest(tmp_path: Path) -> None:
    """A folder of notes, a link and a stray file are no adapters, and are no error either."""
    for name in ("good", "base"):
        write(tmp_path, name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "bad name").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "good")
    for name, marker in (("meta", "adapter_params.json"), ("peft", "adapter_config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / marker).write_text("broken, but there")
    store = AdapterStore(_CONFIG, base_name="base", adapters_dir=tmp_path)
    assert store.scan() == ["good", "meta", "peft"]
    assert store.names() == []
    assert AdapterStore(_CONFIG, base_name="base").scan() == []


@pytest.mark.case(23)
def test_ten_thousand_folders_scan_fast_and_the_limit_holds(tmp_path: Path) -> None:
    """A scan that opens files would block the start for minutes; its time is taken against listing alone."""
    for index in range(10_000):
        os.mkdir(tmp_path / f"a{index}")
        (tmp_path / f"a{index}" / "adapter_config.json").touch()
    store = AdapterStore(_CONFIG, base_name="base", adapters_dir=tmp_path)
    start = time.perf_counter()
    listed = sum(len(os.listdir(tmp_path / name)) for name in os.listdir(tmp_path))
    middle = time.perf_counter()
    assert len(store.scan()) == listed == 10_000
    assert time.perf_counter() - middle < 10 * (middle - start)
    small = AdapterStore(_CONFIG, base_name="base", adapters_dir=tmp_path, max_adapters=9_999)
    with pytest.raises(AdapterLimit):
        small.scan()


@pytest.mark.case(23)
def test_more_than_max_adapters_are_not_published(tmp_path: Path) -> None:
    store = store_with(tmp_path, "ab", max_adapters=2)
    source = write(tmp_path, "c", 2)
    with pytest.raises(AdapterLimit):
        store.publish("c", source, store.read("c", source))


@pytest.mark.case(24, 80)
def test_an_evicted_adapter_is_read_again(tmp_path: Path) -> None:
    """More adapters than memory is the normal case; names stay, weights come and go."""
    store = store_with(tmp_path, "abc", max_bytes=2 * _SIZE)
    assert len(store.cache) == 2
    for name in "abc":
        with store.lease(name) as adapter:
            assert adapter.revision == store.get(name).revision
    with store.lease("a"), store.lease("b"), pytest.raises(AdapterMemory), store.lease("c"):
        pass
    assert store.cache.num_leases(store.get("a").revision) == 0


@pytest.mark.case(80)
def test_replaced_files_are_not_served_under_the_old_revision(tmp_path: Path) -> None:
    """Cached keys and values belong to the old weights: mixing the two would answer with neither."""
    store = store_with(tmp_path, "ab", max_bytes=_SIZE)
    write(tmp_path, "a", seed=9)
    with pytest.raises(AdapterUnreadable, match="replaced"), store.lease("a"):
        pass
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(AdapterNotFound), store.lease("a"):
        pass


@pytest.mark.case(21)
def test_files_may_change_and_vanish_while_the_adapter_is_in_memory(tmp_path: Path) -> None:
    """Served weights are a copy: a truncated file must neither crash the process nor change an answer."""
    store = store_with(tmp_path, "a")
    expected = random_tensors(_MANIFEST, 0)
    os.truncate(tmp_path / "a" / "adapter.safetensors", 10)
    with store.lease("a") as adapter:
        assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in expected.items())


def test_removing_frees_the_memory_after_the_last_lease(tmp_path: Path) -> None:
    """A live request keeps its weights; an unknown name is said to be so."""
    store = store_with(tmp_path, "a")
    with store.lease("a") as adapter:
        store.remove("a")
        with pytest.raises(AdapterNotFound), store.lease("a"):
            pass
        assert store.cache.num_bytes == adapter.num_bytes
    assert store.cache.num_bytes == 0
    with pytest.raises(AdapterNotFound):
        store.remove("a")


def test_two_names_for_one_content_share_the_memory(tmp_path: Path) -> None:
    """Removing one of them must not take the weights of the other."""
    store = store_with(tmp_path, "a")
    source = write(tmp_path, "twin", 0)
    store.publish("twin", source, store.read("twin", source))
    assert store.cache.num_bytes == _SIZE
    store.remove("a")
    with store.lease("twin") as adapter:
        assert adapter.revision == store.get("twin").revision
    assert store.cache.num_bytes == _SIZE


def test_errors_name_the_adapter(tmp_path: Path) -> None:
    """Fifty adapters and one message: it must say which."""
    store = AdapterStore(_CONFIG, base_name="base", adapters_dir=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterNotFound, match="adapter 'gone'"):
        store.read("gone", AdapterSource("gone"))
