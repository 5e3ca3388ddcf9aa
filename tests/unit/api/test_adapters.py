"""The registry and its routes on a real engine: a name is a whole adapter or none, and what a request began with it ends with."""

import asyncio
import gc
import json
import logging
import shutil
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import random_adapter, write_family
from registries import PROMPT, Place, SlowStore, refused, rest, serve, until
from safetensors.torch import load_file, save_file

from moa_serve.adapter.adapter import AdapterSource
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.store import AdapterStore
from moa_serve.api import adapters as adapters_module
from moa_serve.engine.engine import QUARANTINE_AFTER
from moa_serve.engine.request import Request, SamplingParams
from moa_serve.errors import (
    AdapterBusy,
    AdapterMemory,
    AdapterQuarantined,
    AdapterUnavailable,
    ModelNotListed,
    Overloaded,
)
from moa_serve.model.counters import RoutingTotals
from moa_serve.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("looks_always")


def poison(folder: Path, value: float) -> None:
    """Every weight of an adapter becomes `value`."""
    file = folder / "adapter.safetensors"
    save_file({name: torch.full_like(tensor, value) for name, tensor in load_file(file).items()}, file)


# -- available, loaded, unloaded


def test_a_folder_is_served_on_its_first_request(base: Path, tmp_path: Path) -> None:
    for name in ("soft", "molora"):
        write_family(tmp_path / "adapters" / name, name)
    (tmp_path / "adapters" / "notes").mkdir()

    async def body(place: Place) -> None:
        assert place.states() == {"molora": "available", "soft": "available"}
        assert [item.variant for item in place.registry.items()] == ["molora", "soft_moa"], "the header tells"
        lease = await place.registry.lease("soft")
        item = place.registry.item("soft")
        assert (item.state, item.revision, item.leases, item.is_explicit) == ("loaded", lease.adapter.revision, 1, False)
        assert item.bytes == lease.adapter.num_bytes > 0
        lease.release()
        lease.release()
        assert place.registry.item("soft").leases == 0
        assert place.states() == {"molora": "available", "soft": "loaded"}
        assert b'moa_adapter_load_seconds_count{result="ok",source="lazy"} 1' in place.metrics.render()[0]

    serve(base, tmp_path / "adapters", body)


def test_a_folder_that_comes_later_is_found_by_its_name(base: Path, tmp_path: Path) -> None:
    async def body(place: Place) -> None:
        with pytest.raises(ModelNotListed, match="does not exist"):
            await place.registry.lease("late")
        write_family(place.folder / "late", "lora")
        await place.use("late")
        shutil.rmtree(place.folder / "late")
        await place.use("late")  # it is in memory
        with pytest.raises(ModelNotListed):
            await place.registry.lease("other")
        assert place.states() == {"late": "loaded"}

    serve(base, tmp_path / "adapters", body)


def test_unknown_names_do_not_make_the_server_read_the_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that asks for junk costs one look a second, and looks in progress are shared."""
    monkeypatch.setattr(adapters_module, "SCAN_EVERY_SECONDS", 3600.0)
    looks = []

    def scan(store: AdapterStore) -> list[str]:
        looks.append(1)
        return []

    monkeypatch.setattr(SlowStore, "scan", scan)

    async def body(place: Place) -> None:
        looks.clear()
        place.registry.looks._ended_at = -1e9
        results = await asyncio.gather(*(place.registry.lease(f"junk{i}") for i in range(50)), return_exceptions=True)
        assert all(isinstance(result, ModelNotListed) for result in results)
        assert looks == [1]

    serve(base, tmp_path / "adapters", body)


def test_load_and_unload_answer_as_vllm_does(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "sub" / "one", "soft")

    async def body(place: Place) -> None:
        done = await place.load("mine", "sub/one")
        assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
        assert done.headers["content-type"].startswith("text/plain")
        message = refused(await place.load("mine", "sub/one"), 400, "adapter_exists", param="lora_name")
        assert message == (
            "The lora adapter 'mine' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."
        )
        assert (await place.load("mine", str(place.folder / "sub" / "one"), load_inplace=True)).status_code == 200
        (item,) = (await place.http.get("/v1/adapters")).json()["data"]
        assert (item["id"], item["state"], item["path"], item["is_explicit"]) == ("mine", "loaded", "sub/one", True)
        assert (await place.http.get("/v1/adapters/mine")).json() == item
        gone = await place.http.post("/v1/unload_lora_adapter", json={"lora_name": "mine", "lora_int_id": 7})
        assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
        assert refused(await place.unload("mine"), 404, "adapter_not_found") == "The lora adapter 'mine' cannot be found."
        refused(await place.http.get("/v1/adapters/mine"), 404, "adapter_not_found")
        assert (await place.http.get("/v1/adapters")).json() == {"object": "list", "data": []}

    serve(base, tmp_path / "adapters", body)


def test_an_explicit_load_after_a_lazy_one_is_no_conflict(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "a", "soft")

    async def body(place: Place) -> None:
        revision = await place.use("a")
        assert (await place.load("a")).status_code == 200
        assert (await place.use("a"), place.registry.item("a").is_explicit) == (revision, True)
        refused(await place.load("a"), 400, "adapter_exists")

    serve(base, tmp_path / "adapters", body)


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"lora_name": "x"}, 400, "invalid_value", "lora_path"),
        ({"lora_path": "good"}, 400, "adapter_name_invalid", "lora_name"),
        ({"lora_name": "", "lora_path": "good"}, 400, "adapter_name_invalid", "lora_name"),
        ({"lora_name": 5, "lora_path": "good"}, 400, "adapter_name_invalid", "lora_name"),
        ({"lora_name": "x", "lora_path": ["good"]}, 400, "invalid_value", "lora_path"),
        ({"lora_name": "x", "lora_path": "good", "load_inplace": "yes"}, 400, "invalid_value", "load_inplace"),
        ({"lora_name": "x", "lora_path": "good", "rank": 4}, 400, "unknown_parameter", "rank"),
        ({"lora_name": "x" * 65, "lora_path": "good"}, 400, "adapter_name_invalid", "lora_name"),
        ({"lora_name": "a/b", "lora_path": "good"}, 400, "adapter_name_invalid", "lora_name"),
        ({"lora_name": "base", "lora_path": "good"}, 400, "adapter_name_invalid", "lora_name"),
        ({"lora_name": "x", "lora_path": "../outside"}, 400, "adapter_path_denied", "lora_path"),
        ({"lora_name": "x", "lora_path": "/etc"}, 400, "adapter_path_denied", "lora_path"),
        ({"lora_name": "x", "lora_path": "link"}, 400, "adapter_path_denied", "lora_path"),
        ({"lora_name": "x", "lora_path": "."}, 400, "adapter_path_denied", "lora_path"),
        ({"lora_name": "x", "lora_path": "good\0"}, 400, "adapter_path_denied", "lora_path"),
        ({"lora_name": "x", "lora_path": "https://host/good"}, 400, "adapter_path_denied", "lora_path"),
        ({"lora_name": "x", "lora_path": "missing"}, 404, "adapter_not_found", None),
        ({"lora_name": "x", "lora_path": "empty"}, 400, "adapter_incomplete", None),
        ({"lora_name": "x", "lora_path": "bad"}, 400, "adapter_corrupt", None),
        ({"lora_name": "x", "lora_path": "good", "variant": "lora"}, 400, "adapter_config_invalid", "variant"),
    ],
)
def test_a_bad_load_is_refused_and_registers_nothing(
    base: Path, tmp_path: Path, body: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    """And its message does not say where the adapters directory is."""
    folder = tmp_path / "adapters"
    write_family(folder / "good", "soft")
    write_family(folder / "bad", "soft")
    (folder / "bad" / "adapter.safetensors").write_bytes(b"\x80\x02junk, not tensors")
    write_family(tmp_path / "outside", "soft")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "empty").mkdir()

    async def run(place: Place) -> None:
        before = place.registry.items()
        response = await place.http.post("/v1/load_lora_adapter", json=body)
        message = refused(response, status, code, param=param)
        assert str(tmp_path) not in message
        assert place.registry.items() == before
        assert len(place.store.cache) == 0
        with pytest.raises(ModelNotListed):
            await place.registry.lease("x")
        assert (await place.load("x", "good")).status_code == 200, "a mended load works at once"

    serve(base, folder, run)


def test_both_fields_must_be_given_in_vllms_words(base: Path, tmp_path: Path) -> None:
    async def body(place: Place) -> None:
        message = refused(await place.http.post("/v1/load_lora_adapter", json={}), 400, "adapter_name_invalid")
        assert message == "Both 'lora_name' and 'lora_path' must be provided."
        message = refused(await place.http.post("/v1/unload_lora_adapter", json={"lora_int_id": 1}), 400, "adapter_name_invalid")
        assert message == "'lora_name' needs to be provided to unload a LoRA adapter."

    serve(base, tmp_path / "adapters", body)


# -- broken folders


def test_a_header_that_does_not_fit_is_known_before_anyone_asks(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    write_family(folder / "good", "soft")
    write_family(folder / "bad", "soft")
    manifest = json.loads((folder / "bad" / "adapter.json").read_text())
    manifest["base"]["num_layers"] = 99
    (folder / "bad" / "adapter.json").write_text(json.dumps(manifest))

    async def body(place: Place) -> None:
        assert place.states() == {"bad": "broken", "good": "available"}
        assert [item.name for item in place.registry.items() if item.is_listed] == ["good"]
        with pytest.raises(ModelNotListed, match=r"`bad` was found but could not be loaded: adapter 'bad'.*num_layers"):
            await place.registry.lease("bad")
        assert place.store.reads == []
        (broken, _) = (await place.http.get("/v1/adapters")).json()["data"]
        assert "num_layers" in broken["error"]

    serve(base, folder, body)


def test_a_broken_folder_is_read_once_until_it_changes(base: Path, tmp_path: Path) -> None:
    """NaN shows only in the values: the first request finds it, the thousandth must not read gigabytes again."""
    write_family(tmp_path / "adapters" / "a", "soft")
    poison(tmp_path / "adapters" / "a", float("nan"))

    async def body(place: Place) -> None:
        assert place.states() == {"a": "available"}
        for _ in range(3):
            with pytest.raises(ModelNotListed, match=r"found but could not be loaded.*NaN"):
                await place.registry.lease("a")
        assert place.store.reads == ["a"]
        assert place.states() == {"a": "broken"}
        refused(await place.unload("a"), 404, "adapter_not_found")
        write_family(place.folder / "a", "soft")
        await place.use("a")
        assert place.states() == {"a": "loaded"}

    serve(base, tmp_path / "adapters", body)


def test_refused_loads_leave_nothing_behind_though_nobody_scrapes(base: Path, tmp_path: Path) -> None:
    """What the routers did in each self-test was kept until the next scrape, so for ever where no Prometheus asks."""
    manifest, tensors = random_adapter("soft")
    for number in range(3):
        overflowing = {name: tensor * (1e30 + number * 1e28) for name, tensor in tensors.items()}
        write_adapter(tmp_path / "adapters" / f"hot{number}", manifest, overflowing)

    def num_totals() -> int:
        gc.collect()
        return sum(type(found) is RoutingTotals for found in gc.get_objects())

    async def body(place: Place) -> None:
        before = num_totals()
        for number in range(3):
            refused(await place.load(f"hot{number}"), 400, "adapter_not_finite")
        await place.settle()
        assert num_totals() == before

    serve(base, tmp_path / "adapters", body)


def test_an_adapter_without_effect_is_refused_and_a_fresh_one_warns(base: Path, tmp_path: Path) -> None:
    """The worst bug of such servers is a load that succeeds and then serves the base."""
    folder = tmp_path / "adapters"
    manifest, tensors = random_adapter("lora")
    write_adapter(folder / "vain", manifest, {name: t if "lora_B" in name else torch.zeros_like(t) for name, t in tensors.items()})
    write_adapter(folder / "fresh", manifest, {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors.items()})
    write_adapter(folder / "hot", manifest, {name: t * 1e30 for name, t in tensors.items()})

    async def body(place: Place) -> None:
        refused(await place.load("vain"), 400, "adapter_ineffective")
        refused(await place.load("hot"), 400, "adapter_not_finite")
        await place.settle()
        assert set(place.engine.engine.slot_table.revisions) == {None}, "what was refused keeps no slot"
        assert (await place.load("fresh")).status_code == 200
        (warning,) = place.registry.item("fresh").warnings
        assert "does not change the base" in warning
        assert (await place.load("again", "fresh")).status_code == 200
        assert place.registry.item("again").warnings == (warning,), "the same content under another name"

    serve(base, folder, body)


# -- under traffic


def test_loading_stalls_nobody(base: Path, tmp_path: Path) -> None:
    """While a folder is read, the loop answers and the engine gives tokens."""
    write_family(tmp_path / "adapters" / "a", "soft")
    write_family(tmp_path / "adapters" / "b", "molora")

    async def body(place: Place) -> None:
        await place.use("a")
        place.store.gate.clear()
        loading = asyncio.create_task(place.load("b"))
        await until(lambda: place.store.reads[-1] == "b")
        assert len(await place.tokens("a", 30)) == 30
        assert (await place.http.get("/v1/adapters/b")).json()["state"] == "loading"
        place.store.gate.set()
        assert (await loading).status_code == 200

    serve(base, tmp_path / "adapters", body)


def test_first_requests_share_one_load_which_outlives_them(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "a", "soft")

    async def body(place: Place) -> None:
        place.store.gate.clear()
        waiting = [asyncio.create_task(place.registry.lease("a")) for _ in range(8)]
        await until(lambda: place.store.reads == ["a"])
        waiting[0].cancel()  # whose request began it
        place.store.gate.set()
        leases = await asyncio.gather(*waiting[1:])
        assert place.store.reads == ["a"]
        assert place.registry.item("a").leases == 7
        assert len({id(lease.adapter) for lease in leases}) == 1
        for lease in leases:
            lease.release()

    serve(base, tmp_path / "adapters", body)


@pytest.mark.case(75)
def test_unload_hides_at_once_waits_and_frees_every_byte(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "a", "soft")

    async def body(place: Place) -> None:
        stream = await place.open("a", 400)
        await anext(stream)
        assert stream.adapter is not None
        tensors = [weakref.ref(tensor) for tensor in stream.adapter.tensors.values()]
        size = stream.adapter.num_bytes
        unloading = asyncio.create_task(place.registry.unload("a"))
        await until(lambda: place.states() == {"a": "unloading"})
        with pytest.raises(ModelNotListed):
            await place.registry.lease("a")
        assert not place.registry.item("a").is_listed
        refused(await place.unload("a"), 404, "adapter_not_found")
        refused(await place.load("a"), 409, "adapter_busy")
        assert not unloading.done()
        stream.close()
        assert await unloading == size
        assert place.store.cache.num_bytes == 0
        assert place.states() == {}
        del stream
        await place.settle()
        gc.collect()
        assert [tensor() for tensor in tensors] == [None] * len(tensors)
        assert set(place.engine.engine.slot_table.revisions) == {None}

    serve(base, tmp_path / "adapters", body)


@pytest.mark.case(75)
def test_an_unload_that_waits_too_long_is_taken_back(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "a", "soft")

    async def body(place: Place) -> None:
        lease = await place.registry.lease("a")
        refused(await place.unload("a"), 409, "adapter_busy")
        assert place.states() == {"a": "loaded"}
        await place.use("a")
        lease.release()
        assert (await place.unload("a")).status_code == 200

    serve(base, tmp_path / "adapters", body, unload_seconds=0.02)


@pytest.mark.case(77)
def test_a_reload_never_changes_a_running_request(base: Path, tmp_path: Path) -> None:
    """Each answer is wholly old or wholly new, and the old weights leave with the last old request."""
    folder = tmp_path / "adapters"
    for name, seed in (("v1", 1), ("v2", 2)):
        write_family(folder / name, "soft", seed)

    async def body(place: Place) -> None:
        assert (await place.load("a", "v1")).status_code == 200
        old_tokens, revision = await place.tokens("a", 40), await place.use("a")
        stream = await place.open("a", 40)
        first = [event.token_id for event in await anext(stream)]
        assert (await place.load("a", "v2", load_inplace=True)).status_code == 200
        new_revision = await place.use("a")
        assert new_revision != revision
        new_tokens = await place.tokens("a", 40)
        assert new_tokens != old_tokens
        assert first + await rest(stream) == old_tokens
        assert place.store.cache.num_leases(revision) == 1
        stream.close()
        assert revision not in place.store.cache
        await place.settle()
        assert revision not in place.engine.engine.slot_table.revisions
        assert await place.tokens("a", 40) == new_tokens

    serve(base, folder, body)


@pytest.mark.case(78)
def test_a_failed_reload_leaves_the_old_one_serving(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    write_family(folder / "good", "soft")
    write_family(folder / "nan", "soft", 2)
    poison(folder / "nan", float("nan"))

    async def body(place: Place) -> None:
        assert (await place.load("a", "good")).status_code == 200
        revision = await place.use("a")
        refused(await place.load("a", "nan", load_inplace=True), 400, "adapter_not_finite")
        refused(await place.load("a", "missing", load_inplace=True), 404, "adapter_not_found")
        assert await place.use("a") == revision
        assert (place.registry.item("a").state, place.registry.item("a").error) == ("loaded", None)

    serve(base, folder, body)


@pytest.mark.case(76)
@pytest.mark.parametrize("kinds", ["ll", "lu", "ul", "uu", "luluul", "rrrr", "lluurr"])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_operations_on_one_name_are_serial(base: Path, tmp_path: Path, kinds: str, is_loaded: bool) -> None:
    """l load, u unload, r load in place, all at once: each is done or refused, none fails, and the end is a whole state."""
    write_family(tmp_path / "adapters" / "sub" / "a", "lora")

    async def body(place: Place) -> None:
        if is_loaded:
            assert (await place.load("a", "sub/a")).status_code == 200
        calls = [place.unload("a") if kind == "u" else place.load("a", "sub/a", load_inplace=kind == "r") for kind in kinds]
        responses = await asyncio.gather(*calls)
        statuses = [response.status_code for response in responses]
        assert set(statuses) <= {200, 400, 404, 409}
        if kinds in ("ll", "uu"):
            assert statuses.count(200) == (is_loaded == (kinds == "uu"))
        await asyncio.gather(place.unload("a"), return_exceptions=True)
        assert place.states() == {}
        assert place.store.cache.num_bytes == 0
        assert (await place.load("a", "sub/a")).status_code == 200
        assert place.registry.item("a").leases == 0

    serve(base, tmp_path / "adapters", body)


@pytest.mark.case(76)
def test_traffic_beside_loads_and_unloads_only_ever_sees_200_or_404(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    for seed in (1, 2):
        write_family(folder / f"v{seed}", "molora", seed)

    async def body(place: Place) -> None:
        whole = set()
        for name in ("v1", "v2"):
            whole.add(tuple(await place.tokens(name)))
        ends: list[tuple[int | None, ...] | None] = []

        async def client() -> None:
            for _ in range(12):
                try:
                    ends.append(tuple(await place.tokens("a")))
                except ModelNotListed:
                    ends.append(None)

        async def operator() -> None:
            for turn in range(6):
                assert (await place.load("a", f"v{1 + turn % 2}", load_inplace=True)).status_code in (200, 409)
                if turn % 3 == 2:
                    assert (await place.unload("a")).status_code in (200, 404, 409)

        await asyncio.gather(operator(), *(client() for _ in range(4)))
        assert len(ends) == 48
        assert set(ends) - {None} <= whole
        await until(lambda: place.engine.num_open == 0)
        assert all(item.leases == 0 for item in place.registry.items())
        await place.settle()
        held = {revision for revision in place.engine.engine.slot_table.revisions if revision}
        assert held <= {item.revision for item in place.registry.items()}

    serve(base, folder, body)


def test_a_load_waits_for_room_in_a_full_engine(base: Path, tmp_path: Path) -> None:
    """The self-test takes a place like any request; an operator's load does not fail because clients are many."""
    write_family(tmp_path / "adapters" / "a", "soft")

    async def body(place: Place) -> None:
        params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
        streams = [place.engine.open(Request(PROMPT, params)) for _ in range(2)]
        with pytest.raises(Overloaded):
            await place.registry.lease("a")
        assert place.states() == {"a": "available"}
        loading = asyncio.create_task(place.load("a"))
        await until(lambda: len(place.store.reads) == 2)
        for stream in streams:
            stream.close()
        assert (await loading).status_code == 200

    serve(base, tmp_path / "adapters", body, max_num_seqs=1, max_waiting=1)


# -- hidden names


def test_an_unloaded_folder_stays_hidden_until_it_is_loaded(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "a", "soft")

    async def body(place: Place) -> None:
        assert (await place.unload("a")).status_code == 200, "an available name can be hidden too"
        for _ in range(2):
            with pytest.raises(ModelNotListed, match="does not exist"):
                await place.registry.lease("a")
        assert place.states() == {}
        assert (await place.load("a")).status_code == 200
        await place.use("a")
        assert (await place.unload("a")).status_code == 200
        assert place.states() == {}

    serve(base, tmp_path / "adapters", body)


def test_an_adapter_that_was_loaded_before_its_folder_was_seen_can_be_unloaded_for_good(base: Path, tmp_path: Path) -> None:
    async def body(place: Place) -> None:
        write_family(place.folder / "late", "soft")
        assert (await place.load("late")).status_code == 200
        assert (await place.unload("late")).status_code == 200
        with pytest.raises(ModelNotListed, match="does not exist"):
            await place.registry.lease("late")

    (tmp_path / "adapters").mkdir()
    serve(base, tmp_path / "adapters", body)


@pytest.mark.case(79)
def test_changed_content_brings_a_hidden_name_back(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "a", "soft", 1)

    async def body(place: Place) -> None:
        revision = await place.use("a")
        write_family(place.folder / "a", "soft", 2)
        assert await place.use("a") == revision, "what is loaded is not touched by its files"
        assert (await place.unload("a")).status_code == 200
        with pytest.raises(ModelNotListed):  # the content that lay there when it was unloaded is hidden, not the one that was loaded
            await place.registry.lease("a")
        write_family(place.folder / "a", "soft", 3)
        assert await place.use("a") != revision

    serve(base, tmp_path / "adapters", body)


# -- memory


@pytest.mark.case(24, 80)
def test_the_least_recently_used_leaves_and_is_read_again(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    for seed, name in enumerate(("a", "b", "c")):
        write_family(folder / name, "soft", seed)
    size = sum(tensor.numel() * 4 for tensor in random_adapter("soft")[1].values())

    async def body(place: Place) -> None:
        revisions = {name: await place.use(name) for name in ("a", "b", "c")}
        assert place.registry.item("a").bytes == 0
        assert place.states() == dict.fromkeys("abc", "loaded")
        assert await place.use("a") == revisions["a"]
        assert place.store.reads == ["a", "b", "c", "a"]
        assert place.store.cache.num_bytes <= 2.5 * size
        held = [await place.registry.lease(name) for name in ("a", "c")]
        with pytest.raises(AdapterMemory):
            await place.registry.lease("b")
        refused(await place.load("x", "b"), 503, "adapter_memory")
        held[0].release()
        assert await place.use("b") == revisions["b"]
        held[1].release()
        answers = [await place.tokens(name) for name in "abcabc"]
        assert answers[:3] == answers[3:]

    serve(base, folder, body, max_bytes=int(size * 2.5))


def test_what_is_refused_after_its_trial_is_forgotten(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was laid out for the backend and stood in a slot: nobody would ever name it again, and free that."""
    folder, forgotten = tmp_path / "adapters", list[str]()
    for seed, name in enumerate(("a", "b")):
        write_family(folder / name, "soft", seed)
    size = sum(tensor.numel() * 4 for tensor in random_adapter("soft")[1].values())
    monkeypatch.setattr(Transformer, "forget", lambda _, revision: forgotten.append(revision))

    async def body(place: Place) -> None:
        held = await place.registry.lease("a")
        refused(await place.load("x", "b"), 503, "adapter_memory")
        with pytest.raises(AdapterMemory):
            await place.registry.lease("b")
        await place.settle()
        other = await asyncio.to_thread(place.store.read, "b", AdapterSource("b"))
        assert forgotten == [other.revision] * 2
        assert set(place.engine.engine.slot_table.revisions) == {None, held.adapter.revision}
        held.release()

    serve(base, folder, body, max_bytes=int(size * 1.5))


@pytest.mark.case(80)
def test_an_evicted_adapter_whose_files_changed(base: Path, tmp_path: Path) -> None:
    """What an operator chose is never swapped behind his back; what requests found is what lies there."""
    folder = tmp_path / "adapters"
    for seed, name in enumerate(("chosen", "found", "filler")):
        write_family(folder / name, "soft", seed)
    size = sum(tensor.numel() * 4 for tensor in random_adapter("soft")[1].values())

    async def body(place: Place) -> None:
        assert (await place.load("chosen")).status_code == 200
        found = await place.use("found")
        await place.use("filler")
        for name in ("chosen", "found"):
            write_family(place.folder / name, "soft", 9)
        with pytest.raises(AdapterUnavailable, match="replaced"):
            await place.registry.lease("chosen")
        new = await place.use("found")
        assert new != found
        shutil.rmtree(place.folder / "chosen")
        with pytest.raises(AdapterUnavailable, match="no such folder"):
            await place.registry.lease("chosen")
        assert place.states()["chosen"] == "loaded"
        await place.use("filler")
        shutil.rmtree(place.folder / "found")
        with pytest.raises(ModelNotListed, match="does not exist"):
            await place.registry.lease("found")
        assert (await place.unload("chosen")).status_code == 200
        assert set(place.states()) == {"filler"}

    serve(base, folder, body, max_bytes=int(size * 1.5))


def test_two_names_of_one_content_share_its_memory(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "sub" / "a", "soft")

    async def body(place: Place) -> None:
        for name in ("x", "y"):
            assert (await place.load(name, "sub/a")).status_code == 200
        assert place.store.cache.num_bytes == place.registry.item("x").bytes
        stream = await place.open("y", 400)
        assert await place.registry.unload("x") == 0, "the other name's requests do not keep it"
        await anext(stream)
        stream.close()
        assert await place.registry.unload("y") > 0

    serve(base, tmp_path / "adapters", body)


@pytest.mark.case(11)
def test_loading_again_ends_a_quarantine(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "a", "soft")

    async def body(place: Place) -> None:
        assert (await place.load("a")).status_code == 200
        revision = await place.use("a")
        await place.settle()  # what the load told the engine is done
        place.engine.engine._nonfinite[revision] = QUARANTINE_AFTER
        with pytest.raises(AdapterQuarantined):
            await place.tokens("a")
        assert place.registry.item("a").leases == 1, "open raised, so the caller still holds its lease"
        refused(await place.load("a"), 400, "adapter_exists")
        assert (await place.load("a", load_inplace=True)).status_code == 200
        await place.settle()
        assert len(await place.tokens("a")) == 6

    serve(base, tmp_path / "adapters", body)


def test_who_is_told_of_a_load_may_use_it_at_once(base: Path, tmp_path: Path) -> None:
    """Also where the engine thread is busy, and hears of the load later than the operator might."""
    write_family(tmp_path / "adapters" / "a", "soft")

    async def body(place: Place) -> None:
        await place.load("a")
        revision = await place.use("a")
        await place.settle()
        place.engine.engine._nonfinite[revision] = QUARANTINE_AFTER
        place.engine._commands.put(lambda: time.sleep(0.3))
        assert (await place.load("a", load_inplace=True)).status_code == 200
        assert len(await place.tokens("a")) == 6

    serve(base, tmp_path / "adapters", body)


# -- scale and ends


def test_without_an_adapters_directory_nothing_can_be_loaded(base: Path, tmp_path: Path) -> None:
    async def body(place: Place) -> None:
        place.store.adapters_dir = None
        refused(await place.load("a"), 400, "adapter_path_denied", param="lora_path")
        with pytest.raises(ModelNotListed):
            await place.registry.lease("a")

    serve(base, tmp_path / "adapters", body)


@pytest.mark.case(23)
def test_too_many_folders_at_run_time_change_nothing(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_family(tmp_path / "adapters" / "a", "soft")

    async def body(place: Place) -> None:
        write_family(place.folder / "b", "soft")
        with caplog.at_level(logging.WARNING), pytest.raises(ModelNotListed):
            await place.registry.lease("b")
        assert "cannot be scanned" in caplog.text
        await place.use("a")

    serve(base, tmp_path / "adapters", body, max_adapters=1)


def test_an_operation_survives_its_caller(base: Path, tmp_path: Path) -> None:
    """A client that goes away in the middle of its load leaves a whole adapter, and a name that can be used again."""
    write_family(tmp_path / "adapters" / "sub" / "a", "soft")

    async def body(place: Place) -> None:
        place.store.gate.clear()
        loading = asyncio.create_task(place.registry.load("a", "sub/a"))
        await until(lambda: bool(place.store.reads))
        loading.cancel()
        with pytest.raises(AdapterBusy):
            await place.registry.unload("a")
        place.store.gate.set()
        await until(lambda: place.states() == {"a": "loaded"})
        lease = await place.registry.lease("a")
        while place.states() != {"a": "unloading"}:  # busy until the load has ended, which is a moment after it is to be seen
            unloading = asyncio.create_task(place.registry.unload("a"))
            await asyncio.wait([unloading], timeout=0.01)
            assert not unloading.done() or isinstance(unloading.exception(), AdapterBusy)
        unloading.cancel()
        lease.release()
        await until(lambda: place.states() == {})
        assert place.store.cache.num_bytes == 0

    serve(base, tmp_path / "adapters", body)
