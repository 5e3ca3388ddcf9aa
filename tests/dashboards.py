"""The dashboards and rules of docker/, as tests read them: their expressions, with variables put in as Grafana would."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DOCKER = Path(__file__).parents[1] / "docker"
BOARDS = sorted((DOCKER / "grafana" / "dashboards").glob("*.json"))
RULES = sorted((DOCKER / "prometheus" / "rules").glob("*.yml"))
EVERYTHING = ".*"
_SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^{}]*)\}")
_COMPARISON = re.compile(r" (==|!=|>=|<=|>|<) ")


@dataclass(frozen=True, slots=True)
class Target:
    """A query of a panel, or of a dashboard's annotations."""

    board: str
    panel: str
    expr: str
    is_instant: bool

    @property
    def name(self) -> str:
        return f"{self.board}: {self.panel}: {self.expr}"

    @property
    def selectors(self) -> list[tuple[str, str]]:
        """Each metric that it reads, with its matchers."""
        return _SELECTOR.findall(self.expr)

    def filled(self, values: Mapping[str, str]) -> str:
        """The expression for these values of variables; a value goes into a regular expression."""
        return re.sub(r"\$([a-z]\w*)", lambda found: values[found[1]], self.expr)


class Board:
    def __init__(self, file: Path) -> None:
        self.name, self.raw = file.stem, json.loads(file.read_text())

    @property
    def panels(self) -> list[dict[str, Any]]:
        return [panel for panel in self.raw["panels"] if panel["type"] != "row"]

    @property
    def variables(self) -> dict[str, dict[str, Any]]:
        return {variable["name"]: variable for variable in self.raw["templating"]["list"]}

    @property
    def targets(self) -> Iterator[Target]:
        for panel in self.panels:
            for target in panel["targets"]:
                yield Target(self.name, panel["title"], target["expr"], bool(target.get("instant")))
        for annotation in self.raw["annotations"]["list"]:
            yield Target(self.name, annotation["name"], annotation["expr"], False)

    def panel(self, title: str) -> Target:
        """The query of a panel that has one. Raises StopIteration: no panel is called so."""
        return next(target for target in self.targets if target.panel == title)


def rules(kind: str) -> list[dict[str, Any]]:
    """All rules that `record`, or that `alert`."""
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def without_comparison(expr: str) -> str:
    """An alert's expression that says 0 or 1 where it said nothing or something, so that it tells nothing only where it knows nothing."""
    return _COMPARISON.sub(r" \1 bool ", expr)
