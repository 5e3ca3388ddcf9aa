"""Settings: where they come from, which one counts, what is refused."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from moa_serve.errors import InvalidRequest
from moa_serve.settings import DEFAULT, HIDDEN, ServerSettings, load_settings, strange_variables

DOCKER = Path(__file__).parents[2] / "docker"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable and no folder of whoever runs the tests."""
    for name in ServerSettings.model_fields:
        monkeypatch.delenv(f"MOA_{name.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)


def write(text: str) -> Path:
    Path("moa.toml").write_text(text)
    return Path("moa.toml")


def test_flag_beats_variable_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("max_waiting = 1\nport = 1\nhost = '127.0.0.2'\n")
    monkeypatch.setenv("MOA_MAX_WAITING", "2")
    monkeypatch.setenv("MOA_PORT", "2")
    found = load_settings({"max_waiting": 3, "port": None, "api_key": []}, file)
    assert (found.max_waiting, found.port, found.host, found.max_num_seqs) == (3, 2, "127.0.0.2", 32)


def test_every_setting_says_what_it_is_for() -> None:
    """`--help` and the docs are made of these."""
    for name, field in ServerSettings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_keys_come_from_flags_variables_and_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(found: ServerSettings) -> list[str]:
        return [key.get_secret_value() for key in found.api_key]

    file = write("api_key = ['f1', 'f2']\nadmin_key = 'a'\n")
    assert keys(load_settings({}, file)) == ["f1", "f2"]
    monkeypatch.setenv("MOA_API_KEY", "e1, e2")
    assert keys(load_settings({}, file)) == ["e1", "e2"]
    found = load_settings({"api_key": ["k1"], "admin_key": "b"}, file)
    assert keys(found) == ["k1"]
    assert found.admin_key == SecretStr("b")
    assert "k1" not in repr(found)
    assert "k1" not in str(found.model_dump())


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files pass variables on that nobody has set; an empty key must not become a key."""
    monkeypatch.setenv("MOA_API_KEY", "")
    monkeypatch.setenv("MOA_ADMIN_KEY", "")
    monkeypatch.setenv("MOA_PORT", "")
    found = load_settings({})
    assert (found.api_key, found.admin_key, found.port) == ((), None, 8000)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "moa.example", "example.localhost"])
def test_an_address_that_others_reach_needs_a_key(host: str) -> None:
    """A server without keys, open to a network, is everybody's."""
    with pytest.raises(InvalidRequest, match="--allow-unauthenticated") as error:
        load_settings({"host": host})
    assert error.value.param == "host"
    with pytest.raises(InvalidRequest):
        load_settings({"host": host, "admin_key": "a"})
    assert load_settings({"host": host, "api_key": ["k"]}).host == host
    assert load_settings({"host": host, "allow_unauthenticated": True}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert load_settings({"host": host}).is_loopback


def test_unknown_names_are_refused_by_name() -> None:
    """A mistyped limit that is ignored is no limit."""
    with pytest.raises(InvalidRequest, match=r"moa\.toml: unknown setting 'max_wating'"):
        load_settings({}, write("max_wating = 1"))
    with pytest.raises(InvalidRequest, match="unknown setting 'nonsense'"):
        load_settings({"nonsense": 1})


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"port": 65536}, "port"),
        ({"port": "eighty"}, "port"),
        ({"max_waiting": -1}, "max_waiting"),
        ({"max_body_bytes": 1}, "max_body_bytes"),
        ({"queue_timeout_seconds": 0}, "queue_timeout_seconds"),
        ({"queue_timeout_seconds": float("nan")}, "queue_timeout_seconds"),
        ({"request_timeout_seconds": float("inf")}, "request_timeout_seconds"),
        ({"dtype": "float16"}, "dtype"),
        ({"backend": "fast"}, "backend"),
        ({"log_level": "loud"}, "log_level"),
        ({"adapters_dir": "nowhere"}, "adapters_dir"),
        ({"served_model_name": "a b"}, "served_model_name"),
        ({"max_num_seqs": 300}, "max_batch_tokens"),
        ({"cors_origin": ["https://a.example/path"]}, "cors_origin"),
        ({"cors_origin": ["*"]}, "cors_origin"),
        ({"pressure_threshold_scale": 0.9}, "pressure_threshold_scale"),
        ({"pressure_threshold_scale": 101}, "pressure_threshold_scale"),
        ({"pressure_threshold_scale": float("nan")}, "pressure_threshold_scale"),
        ({"pressure_threshold_scale": 2, "pressure_adapters": ["math"]}, "pressure_adapters"),
        ({"pressure_threshold_scale": 2, "pressure_adapters": ["math=0.5"]}, "pressure_adapters"),
        ({"pressure_threshold_scale": 2, "pressure_adapters": ["math=inf"]}, "pressure_adapters"),
        ({"pressure_threshold_scale": 2, "pressure_adapters": ["a/b=1"]}, "pressure_adapters"),
        ({"pressure_threshold_scale": 2, "pressure_adapters": ["a=1,b=2", "a=3"]}, "pressure_adapters"),
        ({"pressure_adapters": ["math=1"]}, "pressure_adapters"),
        ({"pressure_waiting": 8}, "pressure_waiting"),
        ({"pressure_threshold_scale": 2, "pressure_waiting": 65}, "pressure_waiting"),
        ({"pressure_threshold_scale": 2, "max_waiting": 0}, "pressure_waiting"),
    ],
)  # fmt: skip
def test_what_is_out_of_bounds_is_refused_by_name(given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        load_settings(given)
    assert error.value.param == param
    assert param in str(error.value)


@pytest.mark.parametrize("key", ["a b", "a\nb", "\u00e9", "x" * 513])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        load_settings({"api_key": ["good", key]})
    assert key not in str(error.value)


def test_where_a_wrong_value_came_from_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets MOA_PORT=tcp://10.0.0.1:8000 beside a service called moa."""
    monkeypatch.setenv("MOA_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(InvalidRequest, match="MOA_PORT"):
        load_settings({})


@pytest.mark.parametrize("content", [b"port = ", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_refused(content: bytes) -> None:
    Path("moa.toml").write_bytes(content)
    with pytest.raises(InvalidRequest, match="is not TOML"):
        load_settings({}, Path("moa.toml"))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_settings({}, Path("missing.toml"))


def test_adapters_lie_beside_the_server_by_default() -> None:
    assert load_settings({}).adapters_dir is None
    Path("adapters").mkdir()
    assert load_settings({}).adapters_dir == Path("adapters")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError):
        load_settings({}).port = 1  # type: ignore[misc]


def test_the_compose_file_sets_what_there_is() -> None:
    """A variable that no setting reads is silently nothing."""
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    variables = compose["services"]["moa"]["environment"]
    assert {name.removeprefix("MOA_").lower() for name in variables} <= set(ServerSettings.model_fields)
    (job,) = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert secret in compose["secrets"]
    assert job["static_configs"][0]["targets"] == ["moa:8000"]


def test_a_flag_holds_several_keys_with_commas_and_can_be_repeated() -> None:
    """One key called "a,b" would lock both of its users out."""
    settings = load_settings({"api_key": ["first,second", "third"]})
    assert [key.get_secret_value() for key in settings.api_key] == ["first", "second", "third"]


def test_every_setting_tells_its_value_and_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator who cannot see which of three places counts changes the other two."""
    file = write("max_waiting = 1\nport = 1\nadmin_key = 'file-secret'\n")
    monkeypatch.setenv("MOA_PORT", "2")
    monkeypatch.setenv("moa_max_stop", "3")
    monkeypatch.setenv("MOA_HOST", "")
    monkeypatch.setenv("MOA_API_KEY", "first-secret,second-secret")
    found = {item.name: (item.value, item.source) for item in load_settings({"max_n": 2}, file).explain()}
    assert set(found) == set(ServerSettings.model_fields)
    assert {name: pair for name, pair in found.items() if pair[1] != DEFAULT} == {
        "max_n": (2, "flag"),
        "port": (2, "MOA_PORT"),
        "max_stop": (3, "MOA_MAX_STOP"),
        "api_key": ([HIDDEN, HIDDEN], "MOA_API_KEY"),
        "max_waiting": (1, "moa.toml"),
        "admin_key": (HIDDEN, "moa.toml"),
    }
    assert found["host"] == ("127.0.0.1", DEFAULT)
    assert found["adapters_dir"] == (None, DEFAULT)


def test_every_secret_is_known_to_the_log() -> None:
    """A setting that holds one is of a type that hides it, and is taken out of every line."""
    cert = Path("cert.pem")
    given: dict[str, Any] = {"api_key": ["one", "two"], "admin_key": "three", "tls_cert": cert, "tls_key_password": "four"}
    settings = load_settings(given)
    assert settings.secrets == ["one", "two", "three", "four"]
    shown = str(settings.explain())
    assert not [secret for secret in settings.secrets if f"'{secret}'" in shown]
    kinds = {name for name, field in ServerSettings.model_fields.items() if "SecretStr" in str(field.annotation)}
    assert kinds == {"api_key", "admin_key", "tls_key_password"}


def test_a_variable_that_is_no_setting_is_told_with_what_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that is mistyped is no limit."""
    for name in [name for name in os.environ if name.startswith("MOA_")]:
        monkeypatch.delenv(name)
    for name in ("MOA_MAX_WAITNG", "MOA_XYZ", "MOA_PORT", "MOA_CONFIG", "MOA_CACHE_DIR"):
        monkeypatch.setenv(name, "1")
    # what Kubernetes puts beside services that are called moa and moa-serve
    for name in ("MOA_SERVICE_HOST", "MOA_SERVICE_PORT", "MOA_SERVICE_PORT_HTTP", "MOA_PORT_8000_TCP", "MOA_PORT_8000_TCP_ADDR",
                 "MOA_SERVE_SERVICE_HOST", "MOA_SERVE_PORT_80_TCP_PROTO"):  # fmt: skip
        monkeypatch.setenv(name, "tcp://10.0.0.1:8000")
    first, second = strange_variables()
    assert first == "MOA_MAX_WAITNG is no setting (did you mean MOA_MAX_WAITING?); it counts for nothing"
    assert second.startswith("MOA_XYZ is no setting")


def test_a_mistyped_key_of_the_file_is_told_what_was_meant() -> None:
    with pytest.raises(InvalidRequest, match=r"'max_wating' \(did you mean max_waiting\?\)"):
        load_settings({}, write("max_wating = 1"))


def test_pressure_has_a_factor_for_all_and_one_for_each_that_is_named() -> None:
    settings = load_settings({"pressure_adapters": ["math=2.5,law=1"], "max_waiting": 40})
    assert (settings.pressure_threshold_scale, settings.pressure_scales) == (1.0, {"math": 2.5, "law": 1.0})
    assert settings.first_waiting == 10, "a quarter"
    assert load_settings({"pressure_threshold_scale": 2, "pressure_waiting": 64}).first_waiting == 64
    assert load_settings({"pressure_threshold_scale": 2, "max_waiting": 1}).first_waiting == 1
