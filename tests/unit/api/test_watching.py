"""Routes that look at a running server: its metrics, and what the experts of an adapter did."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import write_family
from prometheus_client.parser import text_string_to_metric_families
from serving import CONFIG, Serving, start_serving

COMPLETIONS = "/v1/completions"


def samples(serving: Serving, query: str = "") -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    response = serving.get(f"/metrics{query}")
    assert response.status_code == 200, response.text
    return {
        family.name: {tuple(sorted(sample.labels.items())): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(response.text)
    }


def total(serving: Serving, name: str, **labels: str) -> float:
    found = samples(serving, f"?name[]={name}").get(name.removesuffix("_total"), {})
    return sum(number for key, number in found.items() if set(labels.items()) <= set(key))


def test_a_scrape_asks_for_names(serving: Serving) -> None:
    assert set(samples(serving, "?name[]=moa_requests_waiting&name[]=vllm:kv_cache_usage_perc")) == {
        "moa_requests_waiting", "vllm:kv_cache_usage_perc",
    }  # fmt: skip
    assert samples(serving, "?name[]=") == {}
    assert len(samples(serving)) > 80


def test_requests_are_counted_by_the_template_of_their_route(serving: Serving) -> None:
    """A path that a client invents, or an adapter's name in it, must not become a label."""
    for path in ("/v1/adapters/soft", "/v1/adapters/nobody", "/nothing/at/all", "/v1/models/tiny"):
        serving.get(path)
    serving.post(COMPLETIONS, model="tiny", prompt=[5], max_tokens=1)
    serving.run(serving.send("DELETE", "/v1/models"))
    found = samples(serving, "?name[]=http_requests_total")["http_requests"]
    handlers = {dict(key)["handler"] for key in found}
    assert {"/v1/adapters/{name}", "none", COMPLETIONS, "/metrics"} <= handlers
    assert not [handler for handler in handlers if "soft" in handler or "nobody" in handler or "nothing" in handler]
    assert total(serving, "http_requests_total", handler="/v1/adapters/{name}", status="4xx") >= 1
    assert total(serving, "http_requests_total", handler="/v1/models", method="DELETE", status="4xx") >= 1
    assert total(serving, "http_response_size_bytes", handler=COMPLETIONS) > 1


def test_the_cache_counts_a_request_once(start: Callable[..., Serving]) -> None:
    """The request that reads an adapter looks for it twice: before, and when it is there."""
    serving = start()

    def counts() -> list[float]:
        return [total(serving, f"moa_adapter_cache_{kind}_total", tier="host") for kind in ("hits", "misses")]

    assert counts() == [0, 0]
    serving.ok(COMPLETIONS, model="soft", prompt=[5], max_tokens=1)
    assert counts() == [0, 1]
    serving.ok(COMPLETIONS, model="soft", prompt=[5], max_tokens=1)
    assert counts() == [1, 1]
    serving.server.registry.store.cache.evict_idle()
    serving.ok(COMPLETIONS, model="soft", prompt=[5], max_tokens=1)
    assert counts() == [1, 2]
    assert total(serving, "moa_adapter_evictions_total", tier="host", reason="pressure") == 1
    assert total(serving, "moa_adapter_cache_bytes") > 0
    serving.run(serving.send("DELETE", "/v1/adapters/soft"))
    assert total(serving, "moa_adapter_evictions_total", tier="host", reason="unloaded") == 1
    assert total(serving, "moa_adapter_cache_bytes") == 0
    serving.ok(COMPLETIONS, model="tiny", prompt=[5], max_tokens=1)  # behind the command that empties the slot
    assert total(serving, "moa_adapter_evictions_total", tier="slot", reason="unloaded") == 1


def test_a_reload_replaces_and_a_failed_self_test_fails(talker: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "one", "sparse_fn", config=CONFIG)
    serving = start_serving(talker, tmp_path)
    try:
        serving.ok(COMPLETIONS, model="one", prompt=[5], max_tokens=1)
        write_family(tmp_path / "one", "sparse_fn", seed=2, config=CONFIG)
        assert serving.post("/v1/adapters/one/reload").status_code == 200
        serving.ok(COMPLETIONS, model="tiny", prompt=[5], max_tokens=1)
        for tier in ("host", "slot"):
            assert total(serving, "moa_adapter_evictions_total", tier=tier, reason="replaced") == 1
        serving.server.registry._trial.run = _refuse  # type: ignore[method-assign]
        write_family(tmp_path / "one", "sparse_fn", seed=3, config=CONFIG)
        assert serving.post("/v1/adapters/one/reload").status_code == 400
        assert total(serving, "moa_adapter_evictions_total", reason="replaced") == 2
        assert samples(serving, "?name[]=moa_adapter_info")["moa_adapter_info"], "what was served is served on"
    finally:
        serving.stop()


async def _refuse(name: str, *_: Any, **__: Any) -> Any:
    from moa_serve.errors import AdapterIneffective

    raise AdapterIneffective(f"adapter {name!r} does nothing")


# -- experts


def test_the_experts_of_an_adapter_are_told(start: Callable[..., Serving]) -> None:
    serving = start()
    serving.ok(COMPLETIONS, model="soft", prompt=[5, 17, 80], max_tokens=4)
    response = serving.get("/v1/adapters/soft/experts")
    assert response.status_code == 200, response.text
    found = response.json()
    assert set(found) == {"adapter", "revision", "tokens", "layers", "skipped", "drift", "dead", "bytes", "prune", "shadow"}
    assert (found["adapter"], found["tokens"], found["dead"], found["drift"], found["shadow"]) == ("soft", 6, None, None, None)
    assert found["revision"] == serving.server.registry.item("soft").revision
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2]
    for layer in found["layers"]:
        assert layer["threshold"] is None, "a Soft MoA keeps everything"
        assert len(layer["experts"]) == 9
        for expert in layer["experts"]:
            assert expert["selected"] == expert["computed"] == 1.0
            assert 0 < expert["weight"] < 1
            assert expert["profile"] is None
    assert found["prune"] is None, "six tokens say nothing"
    told = sum(expert["bytes"] for layer in found["layers"] for expert in layer["experts"])
    assert told == sum(found["bytes"]["experts"].values())
    assert told + found["bytes"]["shared"] == found["bytes"]["total"] == serving.server.registry.item("soft").bytes
    assert list(found["bytes"]["experts"]) == ["Q", "K", "V", "PROMPT", "O", "UP", "GATE", "DOWN", "P_ADAPTER"]


def test_what_could_go_is_suggested_and_can_be_tried_at_once(start: Callable[..., Serving]) -> None:
    serving = start()
    for first in (1, 2):
        serving.ok(COMPLETIONS, model="soft", prompt=[first, 5, 17, 80] * 128, max_tokens=1)
    found = serving.get("/v1/adapters/soft/experts").json()
    assert found["tokens"] >= 1000
    assert (found["prune"]["max_selected"], found["prune"]["max_weight"], found["prune"]["disable"]) == (None, 0.02, [])
    weights = sorted(expert["weight"] for layer in found["layers"] for expert in layer["experts"])
    prune = serving.get(f"/v1/adapters/soft/experts?max_weight={weights[5] + 1e-6}").json()["prune"]
    assert sum(len(one["layers"]) for one in prune["experts"]) == 6
    assert prune["bytes"] > 0
    tried = serving.ok(COMPLETIONS, model="soft", prompt=[5], max_tokens=1, moa={"disable": prune["disable"]})
    assert tried["choices"]
    again = serving.get("/v1/adapters/soft/experts").json()
    assert again["tokens"] == found["tokens"], "what is tried does not count as the adapter's own way"


def test_a_bound_that_is_none_is_refused(start: Callable[..., Serving]) -> None:
    serving = start()
    serving.ok(COMPLETIONS, model="soft", prompt=[5], max_tokens=1)
    for param, text in (
        ("max_weight", "1.5"),
        ("max_weight", "nan"),
        ("max_weight", "few"),
        ("max_selected", "-0.1"),
        ("max_selected", "0.1"),
    ):
        response = serving.get(f"/v1/adapters/soft/experts?{param}={text}")
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert "must be a number from 0 to 1" in serving.get("/v1/adapters/soft/experts?max_weight=2").json()["error"]["message"]


def test_what_left_memory_tells_no_sizes(talker: Path, tmp_path: Path) -> None:
    """A look must not read it again, nor push another one out."""
    write_family(tmp_path / "one", "sparse_fn", config=CONFIG)
    serving = start_serving(talker, tmp_path)
    try:
        serving.ok(COMPLETIONS, model="one", prompt=[5], max_tokens=1)
        assert serving.get("/v1/adapters/one/experts").json()["bytes"]["total"] > 0
        serving.server.registry.store.cache.evict_idle()
        found = serving.get("/v1/adapters/one/experts").json()
        assert (found["bytes"], found["prune"], found["layers"][0]["experts"][0]["bytes"]) == (None, None, None)
        assert serving.server.registry.item("one").bytes == 0
    finally:
        serving.stop()


def test_without_a_router_or_an_adapter_there_is_nothing_to_tell(talker: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "plain", "lora", config=CONFIG)
    write_family(tmp_path / "unread", "soft", config=CONFIG)
    serving = start_serving(talker, tmp_path)
    try:
        serving.ok(COMPLETIONS, model="plain", prompt=[5], max_tokens=1)
        for name, status, code in (
            ("plain", 400, "invalid_value"),
            ("unread", 404, "adapter_not_found"),
            ("nobody", 404, "adapter_not_found"),
        ):
            response = serving.get(f"/v1/adapters/{name}/experts")
            assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
            assert name in response.json()["error"]["message"]
    finally:
        serving.stop()


def test_experts_need_a_key_where_one_is_set(start: Callable[..., Serving]) -> None:
    serving = start(api_key=["k"])
    assert serving.get("/v1/adapters/soft/experts").status_code == 401
    headers = {"authorization": "Bearer k"}
    assert serving.run(serving.send("GET", "/v1/adapters/soft/experts", headers=headers)).status_code == 404


@pytest.mark.parametrize("is_on", [True, False])
def test_vllms_names_are_a_setting(start: Callable[..., Serving], is_on: bool) -> None:
    assert ("vllm:num_requests_running" in samples(start(vllm_metrics=is_on))) is is_on


def test_a_stream_that_fails_after_its_first_byte_is_counted_as_the_error_that_it_is(start: Callable[..., Serving]) -> None:
    """Its status was sent as 200: an alert on the share of errors would never see a server whose every answer breaks off."""
    serving = start(request_timeout_seconds=0.5)
    long = {"model": "tiny", "prompt": [5], "max_tokens": 4000, "ignore_eos": True, "stream": True}
    response = serving.post(COMPLETIONS, **long)
    assert (response.status_code, "request_timeout" in response.text) == (200, True)
    counts = [total(serving, "http_requests_total", handler=COMPLETIONS, status=status) for status in ("2xx", "5xx")]
    assert counts == [0, 1]
