"""docker/compose.yaml: what keeps its services from harming anybody, and what they need to start. Read as YAML, since Docker is not
everywhere."""

import re
from typing import Any

import pytest
import yaml
from dashboards import DOCKER

COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
services = pytest.mark.parametrize("name", sorted(SERVICES))
PRIVATE = {"/tmp", "/prometheus", "/var/lib/grafana"}  # what a service may write


def test_the_services() -> None:
    assert set(SERVICES) == {"moa", "prometheus", "grafana"}


@services
def test_ports_are_published_on_this_machine_only(name: str) -> None:
    assert SERVICES[name]["ports"]
    assert all(str(port).startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


@services
def test_nobody_gains_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & set(service)
    assert service.get("read_only") is (None if name == "prometheus" else True)  # a secret of a variable is written into its root
    assert service["restart"] == "unless-stopped"


@services
def test_what_is_mounted_is_there_and_cannot_be_changed(name: str) -> None:
    for volume in SERVICES[name]["volumes"]:
        source, target, *mode = volume.split(":")
        if source.startswith("."):
            assert (DOCKER / source).exists()
            assert mode == ["ro"]
        else:
            assert source in COMPOSE["volumes"]
            assert target in PRIVATE


@services
def test_images_are_pinned(name: str) -> None:
    service = SERVICES[name]
    assert "build" in service or re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])


def test_secrets_come_from_outside_and_nobody_gets_in_without_one() -> None:
    """`:?` ends the start where one is not set."""
    grafana, moa = SERVICES["grafana"]["environment"], SERVICES["moa"]["environment"]
    assert grafana["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_ADMIN_PASSWORD:?")
    assert moa["MOA_API_KEY"].startswith("${MOA_API_KEY:?")
    assert grafana["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert grafana["GF_USERS_ALLOW_SIGN_UP"] == "false"


def test_prometheus_reads_the_rules_that_are_mounted() -> None:
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    assert config["rule_files"] == ["rules/*.yml"]
    assert "./prometheus/rules:/etc/prometheus/rules:ro" in SERVICES["prometheus"]["volumes"]
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]
    assert [job["job_name"] for job in config["scrape_configs"]] == ["moa_serve"]
