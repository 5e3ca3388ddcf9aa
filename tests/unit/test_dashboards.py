"""The dashboards: made from their code, valid by Grafana's own schema, and of a shape that people can use. That every expression has data
is tests/e2e/test_observability.py."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from dashboards import BOARDS, DOCKER, Board

SCHEMAS = Path(__file__).parents[1] / "grafana_schema"
UIDS = {json.loads(file.read_text())["uid"] for file in BOARDS}
boards = pytest.mark.parametrize("board", [Board(file) for file in BOARDS], ids=lambda board: board.name)


def schema(kind: str, definition: str) -> jsonschema_rs.Draft7Validator:
    """Grafana's JSON Schema of one thing. Two things that are lost where it is made from CUE are put back: what may be anything says
    `object`, and of alternatives that differ in a constant only one is said to hold."""

    def mended(part: Any) -> Any:
        if isinstance(part, list):
            return [mended(item) for item in part]
        if not isinstance(part, dict):
            return part
        if part.get("type") == "object" and part.get("additionalProperties") == {}:
            return {}
        return {"anyOf" if key == "oneOf" else key: mended(value) for key, value in part.items()}

    whole = json.loads((SCHEMAS / f"{kind}.json").read_text())
    return jsonschema_rs.Draft7Validator({**mended(whole), "$ref": f"#/definitions/{definition}"})


def errors(kind: str, definition: str, found: Any) -> list[str]:
    return [f"{list(error.instance_path)}: {error.message}" for error in schema(kind, definition).iter_errors(found)]


def test_the_files_are_as_the_code_makes_them() -> None:
    done = subprocess.run([sys.executable, str(DOCKER / "grafana" / "make.py"), "--check"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert [board.stem for board in BOARDS] == ["adapters", "experts", "service"]


@boards
def test_they_hold_to_grafanas_schema(board: Board) -> None:
    """Grafana shows what it does not understand as an empty panel, without a word. The whole by the dashboard's schema; options and own
    fields of each panel by that of its kind; queries by that of the data source."""
    assert errors("dashboard", "Dashboard", board.raw) == []
    for panel in board.panels:
        kind, own = panel["type"], panel["fieldConfig"]["defaults"].get("custom")
        assert errors("dashboard", "Panel", panel) == []
        assert errors(kind, "Options", panel["options"]) == []
        assert own is None or errors(kind, "FieldConfig", own) == []
        assert [problem for target in panel["targets"] for problem in errors("prometheus", "Dataquery", target)] == []


def test_the_schema_finds_what_is_wrong() -> None:
    panel = Board(BOARDS[0]).panels[-1]
    assert errors("dashboard", "Panel", panel | {"titel": "x"})
    assert errors("dashboard", "Panel", panel | {"gridPos": {"x": "left"}})
    assert errors("timeseries", "Options", panel["options"] | {"legend": {"showLegend": 1}})
    assert errors("prometheus", "Dataquery", panel["targets"][0] | {"expression": "up"})


@boards
def test_every_panel_says_what_it_shows_in_which_unit_and_lies_beside_the_others(board: Board) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in board.raw["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for cell in ((x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])):
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]
    for panel in board.panels:
        assert len(panel["description"]) > 10 or panel["title"] == "CPU"
        is_table = panel["type"] == "table"
        assert panel["fieldConfig"]["defaults"].get("unit") or is_table
        assert all(target["datasource"]["uid"] == "${datasource}" for target in [panel, *panel["targets"]] if "datasource" in target)
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for name in ("id", "title"):
        found = [panel[name] for panel in board.raw["panels"]]
        assert len(found) == len(set(found))


@boards
def test_links_lead_somewhere(board: Board) -> None:
    (link,) = board.raw["links"]
    assert (link["type"], link["tags"], link["includeVars"], link["keepTime"]) == ("dashboards", ["moa_serve"], True, True)
    assert board.raw["tags"] == ["moa_serve"]
    for panel in board.panels:
        for to in panel["fieldConfig"]["defaults"].get("links", []):
            (uid,) = re.findall(r"^/d/([\w-]+)\?", to["url"])
            assert uid in UIDS


@boards
def test_every_variable_is_used_and_every_one_that_is_used_is_there(board: Board) -> None:
    text = " ".join(target.expr for target in board.targets) + " ".join(str(v.get("definition", "")) for v in board.variables.values())
    assert set(re.findall(r"\$([a-z]\w*)", text)) | {"datasource"} == set(board.variables)
    for name in ("job", "instance", "adapter", "layer"):
        if name in board.variables:
            variable = board.variables[name]
            assert (variable["includeAll"], variable["allValue"], variable["multi"]) == (True, ".*", True)


@boards
def test_every_expression_follows_job_and_instance(board: Board) -> None:
    """Whoever looks at one server would else see all of them. A job's objective is no instance's."""
    for target in board.targets:
        assert target.selectors, target.name
        for metric, matchers in target.selectors:
            assert 'job=~"$job"' in matchers, target.name
            assert 'instance=~"$instance"' in matchers or metric.startswith("job:") or target.panel == "Alerts", target.name


def test_grafana_finds_its_files_and_prometheus() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["grafana"]
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in compose["volumes"] if volume.endswith(":ro"))
    folders = {target: (DOCKER / source).resolve() for source, target in mounts.items()}
    (provider,) = yaml.safe_load((folders["/etc/grafana/provisioning"] / "dashboards" / "moa_serve.yaml").read_text())["providers"]
    assert folders[provider["options"]["path"]] == BOARDS[0].parent
    (source,) = yaml.safe_load((folders["/etc/grafana/provisioning"] / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "${PROMETHEUS_URL}", True)
    assert compose["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"
