"""The rules of docker/prometheus by Prometheus' own promtool: they can be read, every alert fires when it should and not else, and each
leads to a section that says what to do."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboards import BOARDS, DOCKER, RULES, Board, rules
from prometheus_server import needs_prometheus

DOCS = Path(__file__).parents[2] / "docs"
FOLDER = DOCKER / "prometheus"
ALERTS = {rule["alert"]: rule for rule in rules("alert")}
CASES = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_prometheus
def test_prometheus_reads_its_configuration(tmp_path: Path) -> None:
    """With the key's file beside it, which only the container has; the rules come with it."""
    config = (FOLDER / "prometheus.yml").read_text().replace("/run/secrets/moa_api_key", str(tmp_path / "key"))
    (tmp_path / "key").write_text("key")
    (tmp_path / "prometheus.yml").write_text(config.replace("rules/*.yml", f"{FOLDER}/rules/*.yml"))
    shown = promtool("check", "config", str(tmp_path / "prometheus.yml"))
    assert f"{len(rules('alert')) + len(rules('record'))} rules found" in shown or shown.count("rules found") == len(RULES)


@needs_prometheus
def test_rules_are_whole_and_none_comes_twice() -> None:
    promtool("check", "rules", "--lint-fatal", *(str(file) for file in RULES))


@needs_prometheus
def test_every_alert_fires_when_it_should_and_not_else() -> None:
    promtool("test", "rules", "alerts_test.yml")


def fired(case: dict[str, Any]) -> set[str]:
    samples = [sample["labels"] for test in case["promql_expr_test"] for sample in test["exp_samples"]]
    return {name for labels in samples for name in re.findall(r'alertname="(\w+)"', labels)}


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    """A case is of all alerts at once; one without any is the healthy server's. A rule without a case may say anything."""
    assert {name for case in CASES for name in fired(case)} == set(ALERTS)
    quiet = [case for case in CASES for test in case["promql_expr_test"] if not test["exp_samples"]]
    assert len(quiet) >= len(ALERTS) - 2


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_an_alert_says_how_bad_it_is_what_it_is_and_what_to_do(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].removeprefix("docs/").partition("#")
    titles = re.findall(r"^#+ (.*)$", (DOCS / page).read_text(), re.MULTILINE)
    assert anchor == name.lower()
    assert name in titles


def test_recorded_names_say_level_metric_and_operation() -> None:
    """By Prometheus' convention, which is how one sees in a dashboard what is recorded and over which labels."""
    for rule in rules("record"):
        assert re.fullmatch(r"(job|instance|adapter|tier):moa_\w+:(rate|ratio_rate|p\d\d_rate)\d+[mhd]", rule["record"])


def test_everything_that_is_recorded_is_used() -> None:
    used = " ".join(
        [target.expr for file in BOARDS for target in Board(file).targets] + [rule["expr"] for rule in [*rules("alert"), *rules("record")]]
    )
    assert [rule["record"] for rule in rules("record") if rule["record"] not in used] == []
