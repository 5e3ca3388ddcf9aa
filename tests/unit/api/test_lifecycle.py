"""What an operator can do with adapters, under traffic and across restarts."""

import asyncio
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from families import write_family
from registries import Place, SlowStore, refused, rest, serve, until

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.state import StateDirectory
from moa_serve.api import folders as folders_module
from moa_serve.errors import AdapterUnavailable, AdapterUnreadable, ModelNotListed, RegistryWriteFailed, RevisionNotFound

pytestmark = pytest.mark.usefixtures("looks_always")


def swap(place: Place, name: str, family: str, seed: int) -> None:
    """Other content in an adapter's folder, as a copy that takes its place."""
    write_family(place.folder.parent / "new", family, seed=seed)
    shutil.rmtree(place.folder / name, ignore_errors=True)
    os.rename(place.folder.parent / "new", place.folder / name)


# -- our own routes


def test_load_read_and_unload(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "sub" / "one", "soft")

    async def body(place: Place) -> None:
        done = await place.http.post("/v1/adapters", json={"name": "mine", "path": "sub/one", "pinned": True})
        item = done.json()
        assert (done.status_code, item["state"], item["is_explicit"], item["is_pinned"]) == (200, "loaded", True, True)
        assert item["tiers"][:2] == ["disk", "host"]
        assert (await place.http.get("/v1/adapters/mine")).json() == item
        refused(await place.http.post("/v1/adapters", json={"name": "mine", "path": "sub/one"}), 409, "adapter_exists")
        await place.tokens("mine")
        item = (await place.http.get("/v1/adapters/mine")).json()
        assert (item["hits"], item["leases"], item["tiers"]) == (2, 0, ["disk", "host", "slot"]), "the pin took one lease itself"
        assert item["last_used"] > 1.7e9
        gone = await place.http.delete("/v1/adapters/mine")
        assert (gone.status_code, gone.json()["deleted"], gone.json()["freed_bytes"]) == (200, True, item["bytes"])
        refused(await place.http.delete("/v1/adapters/mine"), 404, "adapter_not_found")
        assert len(place.store.cache) == 0

    serve(base, tmp_path / "adapters", body)


def test_a_path_may_be_left_out(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "a", "soft")

    async def body(place: Place) -> None:
        assert (await place.http.post("/v1/adapters", json={"name": "a"})).status_code == 200
        refused(await place.http.post("/v1/adapters", json={"name": "events"}), 400, "adapter_name_invalid", param="name")
        refused(await place.http.post("/v1/adapters", json={"name": "b"}), 404, "adapter_not_found")
        refused(await place.http.post("/v1/adapters", json={"path": "a"}), 400, "invalid_value", param="name")

    serve(base, tmp_path / "adapters", body)


@pytest.mark.case(78)
def test_reload_compares_and_sets(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "a", "soft", seed=1)

    async def body(place: Place) -> None:
        first = await place.use("a")
        swap(place, "a", "soft", 2)
        refused(await place.http.post("/v1/adapters/a/reload", json={"revision": "0" * 64}), 409, "revision_conflict", param="revision")
        assert await place.use("a") == first
        done = await place.http.post("/v1/adapters/a/reload", json={"revision": first})
        second = done.json()["revision"]
        assert (done.status_code, second != first) == (200, True)
        refused(await place.http.post("/v1/adapters/a/reload", json={"revision": first}), 409, "revision_conflict")
        assert (await place.http.post("/v1/adapters/a/reload", json={})).json()["revision"] == second, "the same content is no conflict"
        (place.folder / "a" / "adapter.safetensors").write_bytes(b"half a copy")
        refused(await place.http.post("/v1/adapters/a/reload", json={}), 400, "adapter_corrupt")
        assert await place.use("a") == second
        refused(await place.http.post("/v1/adapters/nobody/reload", json={}), 404, "adapter_not_found")

    serve(base, tmp_path / "adapters", body)


# -- pins


@pytest.mark.case(24)
def test_what_is_pinned_is_never_evicted_and_follows_its_name(base: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        write_family(tmp_path / "adapters" / name, "soft", seed=seed)

    async def body(place: Place) -> None:
        first = await place.use("a")
        one = place.store.cache.num_bytes
        place.store.cache.max_bytes = int(2.5 * one)
        assert (await place.http.post("/v1/adapters/a/pin")).json()["is_pinned"] is True
        assert (await place.http.post("/v1/adapters/a/pin")).status_code == 200
        for name in ("b", "c", "b", "c"):
            await place.use(name)
        assert first in place.store.cache
        swap(place, "a", "soft", 4)
        second = (await place.http.post("/v1/adapters/a/reload", json={})).json()["revision"]
        assert first not in place.store.cache, "nobody holds the old one"
        for name in ("b", "c"):
            await place.use(name)
        assert second in place.store.cache
        assert (await place.http.post("/v1/adapters/a/unpin")).json()["is_pinned"] is False
        for name in ("b", "c"):
            await place.use(name)
        assert second not in place.store.cache
        refused(await place.http.post("/v1/adapters/nobody/pin"), 404, "adapter_not_found")

    serve(base, tmp_path / "adapters", body)


def test_unloading_ends_a_pin(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "a", "soft")

    async def body(place: Place) -> None:
        await place.http.post("/v1/adapters/a/pin")
        assert (await place.http.delete("/v1/adapters/a")).json()["freed_bytes"] > 0
        assert len(place.store.cache) == 0
        await place.http.post("/v1/adapters", json={"name": "a"})
        assert place.registry.item("a").is_pinned is False

    serve(base, tmp_path / "adapters", body)


def test_a_disk_that_fails_for_a_moment_takes_no_adapter_away(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_family(tmp_path / "adapters" / name, "soft", seed=seed)

    async def body(place: Place) -> None:
        revision = await place.use("a")
        place.store.cache.max_bytes = int(1.5 * place.store.cache.num_bytes)
        await place.use("b")

        def fail(self: SlowStore, name: str, source: object) -> Adapter:
            raise AdapterUnreadable(f"{name}: Input/output error")

        with monkeypatch.context() as patched:
            patched.setattr(SlowStore, "read", fail)
            with pytest.raises(AdapterUnavailable, match="Input/output"):
                await place.registry.lease("a")
        assert place.registry.item("a").revision == revision
        assert await place.use("a") == revision

    serve(base, tmp_path / "adapters", body)


# -- aliases


async def _alias(place: Place, alias: str, **targets: int) -> None:
    done = await place.http.put(f"/v1/aliases/{alias}", json={"targets": targets})
    assert done.status_code == 200, done.text


def test_an_alias_deals_requests_to_its_targets(base: Path, tmp_path: Path) -> None:
    for name, seed in (("v1", 1), ("v2", 2)):
        write_family(tmp_path / "adapters" / name, "soft", seed=seed)

    async def body(place: Place) -> None:
        await _alias(place, "math", v1=80, v2=20)
        assert (await place.http.get("/v1/aliases")).json()["data"] == [{"id": "math", "object": "alias", "targets": {"v1": 80, "v2": 20}}]

        async def target(key: str | None) -> str:
            lease = await place.registry.lease("math", key=key)
            lease.release()
            return lease.name

        dealt = Counter([await target(f"user-{number}") for number in range(200)])
        assert 15 < dealt["v2"] < 70
        assert {await target("one") for _ in range(20)} == {await target("one")}
        await _alias(place, "math", v1=0, v2=1)
        assert {await target(None) for _ in range(20)} == {"v2"}
        assert (await place.http.delete("/v1/aliases/math")).json()["deleted"] is True
        refused(await place.http.delete("/v1/aliases/math"), 404, "alias_not_found")
        with pytest.raises(ModelNotListed):
            await place.registry.lease("math")

    serve(base, tmp_path / "adapters", body)


@pytest.mark.parametrize(
    ("alias", "targets", "status", "code"),
    [
        ("a", {"b": 1}, 409, "adapter_exists"),
        ("base", {"a": 1}, 400, "alias_invalid"),
        ("x" * 65, {"a": 1}, 400, "alias_invalid"),
        ("math", {}, 400, "alias_invalid"),
        ("math", {"a": 0}, 400, "alias_invalid"),
        ("math", {"a": -1}, 400, "invalid_value"),
        ("math", {"a": 1.5}, 400, "invalid_value"),
        ("math", {"nobody": 1}, 404, "adapter_not_found"),
        ("math", {"taken": 1}, 400, "alias_invalid"),
        ("math", {"a@zz": 1}, 400, "alias_invalid"),
        ("math", {"a@00000000": 1}, 404, "revision_not_found"),
    ],
)
def test_an_alias_that_cannot_be_is_refused(base: Path, tmp_path: Path, alias: str, targets: Any, status: int, code: str) -> None:
    for name in ("a", "b"):
        write_family(tmp_path / "adapters" / name, "soft")

    async def body(place: Place) -> None:
        await _alias(place, "taken", b=1)
        refused(await place.http.put(f"/v1/aliases/{alias}", json={"targets": targets}), status, code)
        assert [item.name for item in place.registry.aliases()] == ["taken"]
        refused(await place.load("taken", "a"), 400, "adapter_exists")

    serve(base, tmp_path / "adapters", body)


def test_an_old_revision_stays_while_it_is_leased_or_an_alias_names_it(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "a", "soft", seed=1)

    async def body(place: Place) -> None:
        first, tokens = await place.use("a"), await place.tokens("a")
        held = await place.registry.lease("a")
        swap(place, "a", "soft", 2)
        second = (await place.http.post("/v1/adapters/a/reload", json={})).json()["revision"]
        assert [old.revision for old in place.registry.item("a").old_revisions] == [first], "a request runs on it"
        lease = await place.registry.lease("a", revision=first[:8])
        assert lease.adapter.revision == first
        lease.release()
        held.release()
        assert place.registry.item("a").old_revisions == ()
        with pytest.raises(RevisionNotFound, match=first[:12]):
            await place.registry.lease("a", revision=first)
        # The same once more, with an alias.
        await _alias(place, "stable", **{f"a@{second[:12]}": 1})
        swap(place, "a", "soft", 1)
        assert (await place.http.post("/v1/adapters/a/reload", json={})).json()["revision"] == first
        assert await place.tokens("a") == tokens
        lease = await place.registry.lease("stable")
        assert (lease.name, lease.adapter.revision) == ("a", second)
        lease.release()
        assert await place.use("a") == first
        await place.http.delete("/v1/aliases/stable")
        assert place.registry.item("a").old_revisions == ()
        await place.settle()
        assert len(place.store.cache) == 1
        assert second not in place.engine.engine.slot_table.revisions

    serve(base, tmp_path / "adapters", body)


# -- events


def test_events_say_what_happens_and_go_on_from_an_id(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "a", "soft", seed=1)

    async def body(place: Place) -> None:
        seen: list[tuple[int, str, str]] = []

        async def listen(after: int | None) -> None:
            async for event in place.registry.events.listen(after, every=60):
                assert event is not None
                seen.append((event.id, event.kind, event.name))

        listening = asyncio.create_task(listen(None))
        await asyncio.sleep(0)
        await place.http.post("/v1/adapters", json={"name": "a"})
        swap(place, "a", "soft", 2)
        await place.http.post("/v1/adapters/a/reload", json={})
        await _alias(place, "math", a=1)
        await place.http.delete("/v1/adapters/a")
        await until(lambda: seen[-1:] != [] and seen[-1][1] == "unloaded")
        assert [(kind, name) for _, kind, name in seen] == [
            ("loading", "a"),
            ("loaded", "a"),
            ("loading", "a"),
            ("reloaded", "a"),
            ("alias_set", "math"),
            ("unloaded", "a"),
        ]
        listening.cancel()
        rest_of = list(seen[3:])
        seen.clear()
        again = asyncio.create_task(listen(rest_of[0][0] - 1))
        await until(lambda: len(seen) == len(rest_of))
        assert seen == rest_of
        place.registry.events.close()
        await again

    serve(base, tmp_path / "adapters", body)


def test_a_listener_that_falls_behind_is_ended(base: Path, tmp_path: Path) -> None:
    async def body(place: Place) -> None:
        events = place.registry.events.listen(None, every=60)
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        for number in range(300):
            place.registry.events.tell("pinned", f"a{number}")
        assert (await first) is not None
        assert len([event async for event in events]) == 255

    serve(base, tmp_path / "adapters", body)


# -- the watch


def test_the_directory_is_followed(base: Path, tmp_path: Path) -> None:
    """What requests loaded follows its folder; what an operator loaded stays, and says that its folder changed."""
    for name in ("lazy", "explicit"):
        write_family(tmp_path / "adapters" / name, "soft", seed=1)

    async def body(place: Place) -> None:
        first = await place.use("lazy")
        await place.load("explicit")
        write_family(place.folder / "late", "lora")
        await until(lambda: "late" in place.states())
        for name in ("lazy", "explicit"):
            swap(place, name, "soft", 2)
        await until(lambda: place.registry.item("lazy").revision not in (first, None))
        await until(lambda: place.registry.item("explicit").is_changed)
        assert place.registry.item("explicit").revision == first
        second = await place.use("lazy")
        (place.folder / "lazy" / "adapter.safetensors").write_bytes(b"broken")
        await until(lambda: place.registry.item("lazy").error is not None)
        assert await place.use("lazy") == second, "the old one serves on"
        for name in ("lazy", "explicit"):
            shutil.rmtree(place.folder / name)
        await until(lambda: "lazy" not in place.states())
        assert await place.use("explicit") == first
        with pytest.raises(ModelNotListed):
            await place.registry.lease("lazy")

    serve(base, tmp_path / "adapters", body, look_seconds=0.01)


@pytest.mark.case(20)
def test_a_folder_that_is_being_copied_waits(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders_module, "STEADY_SECONDS", 0.4)
    write_family(tmp_path / "whole", "soft")

    async def body(place: Place) -> None:
        target, source = place.folder / "a", tmp_path / "whole"
        target.mkdir()
        shutil.copy(source / "adapter.json", target)
        content = (source / "adapter.safetensors").read_bytes()
        with (target / "adapter.safetensors").open("wb") as file:
            for start in range(0, len(content), len(content) // 5 + 1):
                file.write(content[start : start + len(content) // 5 + 1])
                file.flush()
                await asyncio.sleep(0.1)
                assert place.states() in ({}, {"a": "changing"}), "never broken, never available"
        await until(lambda: place.states() == {"a": "available"})
        await place.use("a")

    serve(base, tmp_path / "adapters", body, look_seconds=0.02)


@pytest.mark.case(20)
def test_an_explicit_load_of_a_copy_in_progress_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders_module, "STEADY_SECONDS", 0.2)
    write_family(tmp_path / "adapters" / "a", "soft")

    async def body(place: Place) -> None:
        loading = asyncio.create_task(place.http.post("/v1/adapters", json={"name": "a"}))
        await asyncio.sleep(0.1)
        os.utime(place.folder / "a" / "adapter.safetensors")
        refused(await loading, 409, "adapter_changing")
        assert (await place.http.post("/v1/adapters", json={"name": "a"})).status_code == 200

    serve(base, tmp_path / "adapters", body)


# -- across restarts


def test_what_an_operator_did_outlives_the_process(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    for name, seed in (("sub/one", 1), ("lazy", 2), ("away", 3), ("pinned", 4)):
        write_family(folder / name, "soft", seed=seed)
    revisions: dict[str, str] = {}

    async def first(place: Place) -> None:
        await place.load("mine", "sub/one")
        revisions["mine"] = await place.use("mine")
        await place.use("lazy")
        await place.unload("away")
        await place.http.post("/v1/adapters/pinned/pin")
        await _alias(place, "math", mine=3, lazy=1)

    async def second(place: Place) -> None:
        assert place.states()["lazy"] == "available"
        assert place.states()["mine"] == "loaded"
        assert set(place.states()) == {"lazy", "mine", "pinned"}
        assert place.registry.item("mine").is_explicit
        assert place.registry.item("mine").bytes == 0, "it is read when it is asked for"
        assert [(alias.name, dict(alias.targets)) for alias in place.registry.aliases()] == [("math", {"mine": 3, "lazy": 1})]
        assert await place.use("mine") == revisions["mine"]
        with pytest.raises(ModelNotListed):
            await place.registry.lease("away")
        await until(lambda: place.registry.item("pinned").bytes > 0)
        assert place.registry.item("pinned").is_pinned
        await place.unload("mine")
        await place.http.delete("/v1/aliases/math")
        await place.load("away")

    async def third(place: Place) -> None:
        assert set(place.states()) == {"away", "lazy", "pinned"}
        assert place.registry.aliases() == []

    for run in (first, second, third):
        serve(base, folder, run, state_dir=tmp_path / "state")


@pytest.mark.case(80)
def test_a_restart_serves_the_content_that_was_loaded_or_none(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "a", "soft", seed=1)

    async def first(place: Place) -> None:
        await place.load("a")

    async def second(place: Place) -> None:
        swap(place, "a", "soft", 2)
        with pytest.raises(AdapterUnavailable, match="replaced"):
            await place.registry.lease("a")
        assert (await place.http.post("/v1/adapters/a/reload", json={})).status_code == 200

    async def third(place: Place) -> None:
        await place.use("a")

    for run in (first, second, third):
        serve(base, tmp_path / "adapters", run, state_dir=tmp_path / "state")


@pytest.mark.case(81)
def test_what_cannot_be_written_is_not_done(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_family(tmp_path / "adapters" / name, "soft", seed=seed)

    async def body(place: Place) -> None:
        await place.load("a")
        first = await place.use("a")

        def full(self: StateDirectory, state: object) -> None:
            raise RegistryWriteFailed("the state directory cannot be written (No space left on device)")

        with monkeypatch.context() as patched:
            patched.setattr(StateDirectory, "write", full)
            swap(place, "a", "soft", 3)
            refused(await place.http.post("/v1/adapters", json={"name": "mine", "path": "b"}), 507, "registry_write_failed")
            refused(await place.http.post("/v1/adapters/a/reload", json={}), 507, "registry_write_failed")
            refused(await place.http.delete("/v1/adapters/a"), 507, "registry_write_failed")
            refused(await place.http.put("/v1/aliases/math", json={"targets": {"a": 1}}), 507, "registry_write_failed")
            refused(await place.http.post("/v1/adapters/a/pin"), 507, "registry_write_failed")
            assert await place.use("a") == first
            assert await place.use("b"), "requests need no registry"
        assert b'moa_registry_trouble_total{kind="write_failed"} 5' in place.metrics.render()[0]
        assert place.states() == {"a": "loaded", "b": "loaded"}
        assert (place.registry.aliases(), place.registry.item("a").is_pinned) == ([], False)
        assert (await place.http.delete("/v1/adapters/a")).status_code == 200

    serve(base, tmp_path / "adapters", body, state_dir=tmp_path / "state")
    assert json.loads((tmp_path / "state" / "registry.json").read_text())["adapters"] == {}


def test_a_load_that_has_no_room_leaves_the_state_as_it_was(base: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_family(tmp_path / "adapters" / name, "soft", seed=seed)

    async def body(place: Place) -> None:
        await place.load("a")
        before = (tmp_path / "state" / "registry.json").read_text()
        lease = await place.registry.lease("a")
        place.store.cache.max_bytes = place.store.cache.num_bytes
        refused(await place.load("b"), 503, "adapter_memory")
        assert json.loads((tmp_path / "state" / "registry.json").read_text()) == json.loads(before)
        lease.release()

    serve(base, tmp_path / "adapters", body, state_dir=tmp_path / "state")


@pytest.mark.case(77)
def test_running_requests_keep_their_revision_through_a_reload_loop(base: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "adapters" / "a", "soft", seed=1)

    async def body(place: Place) -> None:
        wanted = {}
        for seed in (1, 2):
            swap(place, "a", "soft", seed)
            await place.http.post("/v1/adapters/a/reload", json={})
            wanted[place.registry.item("a").revision] = await place.tokens("a", 12)
        assert len(set(map(tuple, wanted.values()))) == 2
        is_over = False

        async def traffic() -> int:
            count = 0
            while not is_over:
                async with await place.open("a", 12) as stream:
                    assert stream.adapter is not None
                    assert await rest(stream) == wanted[stream.adapter.revision]
                count += 1
            return count

        running = [asyncio.create_task(traffic()) for _ in range(4)]
        for turn in range(12):
            swap(place, "a", "soft", 1 + turn % 2)
            assert (await place.http.post("/v1/adapters/a/reload", json={})).status_code == 200
        is_over = True
        assert sum(await asyncio.gather(*running)) > 12
        assert place.registry.item("a").old_revisions == ()

    serve(base, tmp_path / "adapters", body)
