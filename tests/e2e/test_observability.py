"""The real server under a real Prometheus: what every panel, rule and alert asks for is there, and is what the clients saw.

The server has more adapters than it has room for; clients are right and wrong, stay and leave, while one adapter is loaded anew again and
again and another one is broken. The stories of docs/observability.md are test_stories.py.
"""

import asyncio
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
from agreement import Scrape, reconcile
from dashboards import BOARDS, EVERYTHING, Board, Target, rules, without_comparison
from families import write_family
from hostile import wait_until
from openai import OpenAI
from profiles import write_profile
from prometheus_server import JOB, Prometheus, Series, needs_prometheus, prometheus
from servers import TALKING, Running, running, write_adapters, write_talking_base
from traffic import WORDS, Client, Job, Ledger, Mix, Outcome, bad_jobs, canary, last_leaver

pytestmark = needs_prometheus

BASE, OTHER = "base", "other"
SPARSE = "sparse_fn"  # whom panels are asked about: the busiest adapter, loaded first, with a profile
FAMILIES = (SPARSE, "mola_layerwise", "soft", "sparse_const", "instance", "lora")
OPENAIS, SWAPPED, BROKEN = "of-openai", "swapped", "broken"  # whom the openai client asks, who is loaded anew, who cannot be
SECONDS, STREAMS, NUM_OPENAI = 8.0, 6, 8
# Of the agreement of client and server what does not hold here: Prometheus reads too, and routers' counters begin anew with each load.
UNFIT = ("responses by status", "router: sums over experts are the totals", "router: tokens cover those of finished requests")

boards = pytest.mark.parametrize("board", [Board(file) for file in BOARDS], ids=lambda board: board.name)


@dataclass(slots=True)
class World:
    server: Running
    prometheus: Prometheus
    ledger: Ledger = field(default_factory=Ledger)
    models: list[str] = field(default_factory=list)
    openai: Counter[str] = field(default_factory=Counter)  # what that client saw: finish reasons, prompt and completion tokens
    num_reloads: int = 0

    @property
    def instance(self) -> str:
        return self.server.url.removeprefix("http://")

    @property
    def values(self) -> tuple[dict[str, str], dict[str, str]]:
        """Of the variables: All, and one each. A chosen value is a regular expression in a string by then."""
        every = dict.fromkeys(("job", "instance", "adapter", "layer"), EVERYTHING) | {"interval": "1m"}
        one = {"job": JOB, "instance": re.escape(self.instance).replace("\\", "\\\\"), "adapter": SPARSE, "layer": "0", "interval": "5m"}
        return every, one

    def asked(self, target: Target, values: dict[str, str]) -> list[Series]:
        """What Grafana would get."""
        expr = target.filled(values)
        return self.prometheus.query(expr) if target.is_instant else self.prometheus.query_range(expr)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    write_talking_base(folder / "base")
    write_adapters(folder / "adapters", *FAMILIES)
    write_family(folder / "adapters" / OPENAIS, "lora", 21, TALKING)
    write_family(folder / "adapters" / SWAPPED, "soft_softmax", 22, TALKING)
    write_profile(folder / "adapters" / SPARSE, folder / "base", [" ".join(WORDS)])
    shutil.copytree(folder / "adapters" / SPARSE, folder / "adapters" / BROKEN)
    (folder / "adapters" / BROKEN / "adapter.json").write_text('{"format": "moa-adapter/1"}')
    room = 5 * (folder / "adapters" / SPARSE / "adapter.safetensors").stat().st_size
    flags = ["--served-model-name", BASE, "--grid-adapters", "3", "--num-slots", "3", "--adapter-cache-bytes", str(room)]
    flags += ["--memory-limit-bytes", str(2**34), "--max-num-seqs", "16", "--max-waiting", "16", "--shadow-share", "1"]
    flags += ["--pressure-threshold-scale", "1.2", "--pressure-waiting", "2"]
    with running(folder, *flags) as server, prometheus(folder / "prometheus", server.url) as started:
        found = World(server, started)
        asyncio.run(live(found))
        wait_until(lambda: has_scored_all(server.url))
        told = httpx.get(f"{server.url}/metrics").text
        wait_until(lambda: counted(started.page(found.instance)) == counted(Scrape(told)))
        wait_until(lambda: bool(started.query('ALERTS{alertname="MoaAdapterBroken"}')))  # the rules have seen it too
        yield found


def has_scored_all(url: str) -> bool:
    """The shadow check has nothing left to do, and so holds nothing."""
    before = Scrape(httpx.get(f"{url}/metrics").text)
    time.sleep(1.0)  # it begins when it was quiet for half as long
    after = Scrape(httpx.get(f"{url}/metrics").text)
    is_done = after.total("moa_shadow_requests_total") == before.total("moa_shadow_requests_total") > 0
    return is_done and after.total("moa_kv_usage_ratio") == 0


def counted(page: Scrape) -> tuple[float, ...]:
    names = ("moa_requests_total", "moa_generated_tokens_total", "moa_expert_evaluations_total", "moa_adapter_load_seconds_count")
    return tuple(page.total(name) for name in names)


async def live(world: World) -> None:
    """Traffic, until everybody has left."""
    async with Client(world.server.url, world.ledger, "world") as client, httpx.AsyncClient(base_url=world.server.url) as operator:
        assert (await operator.post("/v1/adapters", json={"name": SPARSE})).is_success
        refused = await operator.post("/v1/adapters", json={"name": BROKEN})
        assert refused.status_code == 400
        world.models = [BASE, *FAMILIES, SWAPPED]
        await asyncio.gather(*(client.send(canary(BASE, None)) for _ in range(80)))  # more than it has places for
        longer = json.dumps({"model": SPARSE, "prompt": "wait", "max_tokens": 400, "ignore_eos": True}).encode()
        crowd = replace(canary(SPARSE, SPARSE), content=longer, max_tokens=400)
        await asyncio.gather(*(client.send(crowd) for _ in range(28)))  # some of which wait, and find thresholds raised
        for job in what_panels_need():
            await client.send(job)
        stop = asyncio.Event()
        deadline = asyncio.get_running_loop().time() + SECONDS
        async with asyncio.TaskGroup() as tasks:
            works = [tasks.create_task(work(client, Mix(world.models, seed, max_words=30), deadline)) for seed in range(STREAMS)]
            tasks.create_task(reload(world, operator, stop))
            others = tasks.create_task(asyncio.to_thread(ask_by_openai, world))
            await asyncio.wait([*works, others])
            stop.set()
        await client.send(canary(SPARSE, SPARSE))  # it stands in a slot now, so that its answers can be scored
        deadline = asyncio.get_running_loop().time() + 20
        while not Scrape((await operator.get("/metrics")).text).is_at_rest:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.05)


def what_panels_need() -> Iterator[Job]:
    """What random traffic may leave out on a slow machine: an adapter's errors, a client that leaves, and tokens enough to judge by."""
    yield from bad_jobs(SPARSE, SPARSE)
    yield replace(last_leaver(SPARSE), adapter=SPARSE)
    for number in range(6):
        body = {"model": SPARSE, "prompt": f"{number} " * 150, "max_tokens": 1}
        yield replace(canary(SPARSE, SPARSE), content=json.dumps(body).encode(), max_tokens=1, max_prompt_tokens=308)


async def work(client: Client, mix: Mix, deadline: float) -> None:
    while asyncio.get_running_loop().time() < deadline:
        await client.send(mix.draw())


async def reload(world: World, operator: httpx.AsyncClient, stop: asyncio.Event) -> None:
    while not stop.is_set():
        answer = await operator.post("/v1/load_lora_adapter", json={"lora_name": SWAPPED, "lora_path": SWAPPED, "load_inplace": True})
        world.num_reloads += answer.is_success
        await asyncio.sleep(0.5)


def ask_by_openai(world: World) -> None:
    with OpenAI(base_url=f"{world.server.url}/v1", api_key="any", max_retries=5) as client:
        for number in range(NUM_OPENAI):
            stream = client.completions.create(
                model=OPENAIS, prompt=f"{number} ships", max_tokens=5 + number, stream=True, stream_options={"include_usage": True}
            )
            chunks = list(stream)
            reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
            assert len(reasons) == 1
            usage = chunks[-1].usage
            assert usage is not None
            world.openai.update({reasons[0]: 1, "prompt": usage.prompt_tokens, "completion": usage.completion_tokens})


# -- what was counted


def test_targets_are_up_and_rules_are_whole(world: World) -> None:
    assert [series.values[-1] for series in world.prometheus.query(f'up{{job="{JOB}"}}')] == [1.0]
    assert not [series for series in world.prometheus.query_range(f'up{{job="{JOB}"}}') if 0.0 in series.values]
    groups = world.prometheus.get("rules")["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert [(rule["name"], rule.get("lastError")) for rule in found if rule["health"] != "ok"] == []
    assert len(found) == len(rules("alert")) + len(rules("record"))


def test_the_world_had_all_that_it_is_meant_to_have(world: World) -> None:
    """Counters agree easily where nothing happens."""
    outcomes = world.ledger.outcomes
    assert min(outcomes[kind] for kind in (Outcome.OK, Outcome.REFUSED, Outcome.CANCELLED)) >= 5
    assert world.num_reloads >= 3
    assert {200, 400, 404, 503} <= set(world.ledger.statuses)
    assert world.prometheus.value('sum(moa_adapter_evictions_total{reason="capacity"})') >= 3
    assert world.prometheus.value(f'sum(moa_router_tokens_total{{adapter="{OTHER}"}})') > 0


def test_prometheus_has_what_the_clients_counted(world: World) -> None:
    """By adapter and finish reason, tokens read and generated; a panel that is wrong by a little is believed."""
    page = world.prometheus.page(world.instance)
    own = page.without(lambda _, labels: OPENAIS in (labels.get("adapter"), labels.get("model_name")))
    checks = [check for check in reconcile(world.ledger, Scrape(""), own, world.models) if check.name not in UNFIT]
    assert not [f"{check.name}: {check.detail}" for check in checks if not check.is_met]
    for reason in ("stop", "length"):
        assert page.total("moa_requests_total", adapter=OPENAIS, finish_reason=reason) == world.openai[reason]
    assert page.total("moa_prompt_tokens_total", adapter=OPENAIS) == world.openai["prompt"]
    assert page.total("moa_generated_tokens_total", adapter=OPENAIS) == world.openai["completion"]


def test_promtool_finds_nothing_wrong_with_the_page(world: World) -> None:
    """But that a name of vLLM's has a colon, which it must have."""
    page = httpx.get(f"{world.server.url}/metrics").text
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, timeout=60)
    assert [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("vllm:")] == []


# -- what panels, rules and alerts ask for


@boards
def test_every_expression_of_every_panel_has_data(world: World, board: Board) -> None:
    every, one = world.values
    empty = [target.name for values in (every, one) for target in board.targets if not world.asked(target, values)]
    assert empty == []


@boards
def test_every_variable_has_its_values(world: World, board: Board) -> None:
    one = world.values[1]
    found = {}
    for name, variable in board.variables.items():
        if variable["type"] != "query":
            continue
        selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
        selector = re.sub(r"\$(\w+)", lambda part: one[part[1]], selector)
        found[name] = world.prometheus.get(f"label/{label}/values", **{"match[]": selector})
    assert found["job"] == [JOB]
    assert found["instance"] == [world.instance]
    if board.name == "adapters":
        assert {*world.models, OPENAIS, OTHER} == set(found["adapter"])
    if board.name == "experts":
        assert {SPARSE, OTHER} <= set(found["adapter"])
        assert found["layer"] == ["0", "1", "2"]


@boards
def test_a_panel_follows_the_adapter_and_the_layer(world: World, board: Board) -> None:
    """What a metric is split by and a dashboard has a variable for, its panels must ask for: else they show all while one is chosen."""
    labels: dict[str, set[str]] = {}
    for target in board.targets:
        for metric, matchers in target.selectors:
            if target.panel == "Alerts":
                continue
            if metric not in labels:
                labels[metric] = {label for series in world.prometheus.query(metric) for label in series.labels}
            for variable in ("adapter", "layer"):
                if variable in board.variables and variable in labels[metric] and not _is_total(board, target):
                    assert f'{variable}=~"${variable}"' in matchers, target.name
    for target in board.targets:
        for series in world.asked(target, world.values[1]):
            assert series.labels.get("adapter", SPARSE) in (SPARSE, "") or "$adapter" not in target.expr


@pytest.mark.parametrize("title", ["Weight", "Selection", "Activation by kind", "Threshold by layer", "Experts per token"])
def test_adapters_beyond_the_grid_are_shown_as_one(world: World, title: str) -> None:
    target = next(target for file in BOARDS for target in Board(file).targets if (target.board, target.panel) == ("experts", title))
    assert world.asked(target, world.values[0] | {"adapter": OTHER})


def _is_total(board: Board, target: Target) -> bool:
    """Of all layers: what an adapter does as a whole."""
    return board.name == "experts" and target.panel == "Tokens routed"


@pytest.mark.parametrize("rule", rules("record"), ids=lambda rule: str(rule["record"]))
def test_every_recording_rule_has_data(world: World, rule: dict[str, Any]) -> None:
    assert world.prometheus.query(rule["expr"])
    assert world.prometheus.query_range(rule["record"])


@pytest.mark.parametrize("rule", rules("alert"), ids=lambda rule: str(rule["alert"]))
def test_every_alert_knows_what_it_asks_for(world: World, rule: dict[str, Any]) -> None:
    """Its expression without its comparison: an alert on a name that nobody writes never fires."""
    if 'backend="native"' in rule["expr"] and not world.prometheus.query('moa_base_info{backend="native"}'):
        pytest.skip("the native backend is not built here")
    assert world.prometheus.query(without_comparison(rule["expr"]))


def test_what_fires_is_what_is_wrong_and_says_so(world: World) -> None:
    firing = {alert["labels"]["alertname"]: alert["annotations"] for alert in world.prometheus.firing()}
    assert {"MoaAdapterBroken", "MoaAdapterNotLoadable"} <= set(firing)
    assert not {"MoaServerDown", "MoaServerMissing", "MoaServerNotReady", "MoaEngineFailed", "MoaEngineRebuilt"} & set(firing)
    assert firing["MoaAdapterBroken"]["summary"] == f"adapter {BROKEN} cannot be used on {world.instance}"
    assert not [text for texts in firing.values() for text in texts.values() if "error" in text or "{{" in text]
