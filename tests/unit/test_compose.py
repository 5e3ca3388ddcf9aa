"""docker/compose.yaml, and the image that it builds: what keeps its services from harming anybody, and what they need to start.

Read as text, since Docker is not everywhere.
"""

import re
from typing import Any

import pytest
import yaml
from dashboards import DOCKER

COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
services = pytest.mark.parametrize("name", sorted(SERVICES))
PROFILES = {"cpu": "moa", "gpu": "moa-gpu"}  # and the service that answers in it
PRIVATE = {"/tmp", "/prometheus", "/var/lib/grafana", "/opt/moa/share/moa_serve/triton"}  # what a service may write


@pytest.mark.parametrize(("profile", "server"), PROFILES.items())
def test_a_profile_starts_one_server_and_those_who_watch_it(profile: str, server: str) -> None:
    """A CPU server beside the one on the GPU would take its port, or its requests."""
    started = {name for name, service in SERVICES.items() if profile in service["profiles"]}
    assert started == {server, "prometheus", "grafana"}
    ports = [port for name in started for port in SERVICES[name]["ports"]]
    assert len(ports) == len(set(ports)) == 3
    names = {server, *SERVICES[server].get("networks", {"default": {"aliases": []}})["default"]["aliases"]}
    assert "moa" in names  # where Prometheus looks
    waits_for = SERVICES["prometheus"]["depends_on"]
    assert all(one == {"condition": "service_healthy", "required": False} for one in waits_for.values())
    assert server in waits_for


def test_without_a_profile_nothing_starts() -> None:
    """Dashboards without a server would look like a server that is down."""
    assert set(SERVICES) == {*PROFILES.values(), "prometheus", "grafana"}
    assert all(set(service["profiles"]) & set(PROFILES) for service in SERVICES.values())


def test_the_gpu_service_is_the_other_with_a_device() -> None:
    """What hardens one of them and not the other is forgotten some day."""
    cpu, gpu = SERVICES["moa"], SERVICES["moa-gpu"]
    own = {"profiles", "build", "volumes", "deploy", "healthcheck", "networks"}
    assert {name for name in cpu | gpu if cpu.get(name) != gpu.get(name)} == own
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert gpu["build"]["target"] in stages()
    assert "PIP_ARGS" not in gpu["build"]["args"]  # which may name torch's CPU wheels
    assert "target" not in cpu["build"]
    assert list(stages())[-1] == "cpu"  # what is built without a target


def stages() -> dict[str, list[str]]:
    """The Dockerfile's stages in their order, by name, with the instructions of each."""
    found: dict[str, list[str]] = {}
    text = (DOCKER.parent / "Dockerfile").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if start := re.fullmatch(r"FROM \S+ AS (\w+)", line):
            instructions = found[start[1]] = []
        if line and not line.startswith("#"):
            instructions.append(line)
    return found


def test_the_image_for_a_gpu_has_what_triton_needs_at_run_time() -> None:
    """Without a compiler or a folder to write, the first step on a GPU fails, and no build notices."""
    text = "\n".join(stages()["cuda"])
    assert re.search(r"apt-get install .* gcc libc6-dev ", text)
    (cache,) = re.findall(r"TRITON_CACHE_DIR=(\S+)", text)
    assert f"install -d -o 10001 {cache}" in text
    assert f"triton:{cache}" in SERVICES["moa-gpu"]["volumes"]  # no tmpfs, whose noexec would refuse what was compiled
    assert re.findall(r"^USER (\d+)$", text, re.MULTILINE)[-1] == "10001"
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in text


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
    grafana = SERVICES["grafana"]["environment"]
    assert grafana["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_ADMIN_PASSWORD:?")
    for server in PROFILES.values():
        assert SERVICES[server]["environment"]["MOA_API_KEY"].startswith("${MOA_API_KEY:?")
    assert grafana["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert grafana["GF_USERS_ALLOW_SIGN_UP"] == "false"


def test_prometheus_reads_the_rules_that_are_mounted() -> None:
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    assert config["rule_files"] == ["rules/*.yml"]
    assert "./prometheus/rules:/etc/prometheus/rules:ro" in SERVICES["prometheus"]["volumes"]
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]
    assert [job["job_name"] for job in config["scrape_configs"]] == ["moa_serve"]
