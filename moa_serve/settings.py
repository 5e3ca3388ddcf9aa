"""ServerSettings: every setting of `moa-serve serve`, read once, at start, by `load_settings`.

A setting is a flag (`--max-waiting`), an environment variable (`MOA_MAX_WAITING`) and a key of a TOML file (`max_waiting`), in this
order of precedence. Plain values: nothing below reads settings or the environment itself. Immutable; shared freely.
"""

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from moa_serve.errors import InvalidRequest

ENV_PREFIX = "MOA_"
# That this package, or its tests, read besides.
OTHER_VARIABLES = frozenset({"MOA_CONFIG", "MOA_CACHE_DIR", "MOA_GOLDEN_DIR", "MOA_SERVE_FAULTS"})
HIDDEN, DEFAULT = "(hidden)", "default"
WITHOUT_FLAG = frozenset({"tls_key_password"})  # the list of processes would show them
KEY_LIMITS = ("key_requests_per_minute", "key_tokens_per_minute", "key_concurrent_requests")
_KEY = re.compile(r"[\x21-\x7e]{1,512}")  # what fits an Authorization header
_FROM_KUBERNETES = re.compile(r"MOA_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP)\w*)")  # beside a service called moa
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_FACTOR = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})=(\d{1,3}(?:\.\d{1,9})?)")

Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Texts = Annotated[tuple[str, ...], NoDecode]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode]


def _factor(item: str) -> tuple[str, float]:
    """Of `NAME=FACTOR`. Raises ValueError: it is something else."""
    if not (found := _FACTOR.fullmatch(item)) or not 1 <= float(found[2]) <= 100:
        raise ValueError(f"{item!a} is no NAME=FACTOR with an adapter's name and a number from 1 to 100")
    return found[1], float(found[2])


def _default_adapters_dir() -> Path | None:
    place = Path("adapters")
    return place if place.is_dir() else None


@dataclass(frozen=True, slots=True)
class Explained:
    """One setting.

    Args:
        value: as JSON and TOML have it; HIDDEN for a secret.
        source: "flag", the name of a variable, the path of the file, or DEFAULT.
    """

    name: str
    value: Any
    source: str


class ServerSettings(BaseSettings):
    """What one server is told. Made by `load_settings`, which also says which name was wrong."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, hide_input_in_errors=True)

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)  # of the settings that somebody has given

    # -- what is served
    model: str | None = Field(None, min_length=1, description="Base: a folder, a GGUF file or a hub id; the default base if omitted.")
    served_model_name: str | None = Field(None, description="Name of the base in requests; the last part of the model's name if omitted.")
    adapters_dir: Path | None = Field(
        default_factory=_default_adapters_dir,
        description="Folder of adapter folders; none outside it is ever read. ./adapters where it exists.",
    )
    adapters_look_seconds: float = Field(
        2.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        description="Between two looks at that folder for what came, changed or went; 0 is never by itself.",
    )
    state_dir: Path | None = Field(
        None, description="Folder in which loads, unloads, aliases and pins outlive the process; without one they are forgotten."
    )
    adapter_chat_templates: bool = Field(
        False,
        description="Chats with an adapter use the template in its defaults, rendered in a child process with limits; else the base's.",
    )
    auto: Path | None = Field(
        None, description="File of `moa-serve fingerprint`: the model `auto` is then the adapter in it that a prompt is most like."
    )
    strict_state: bool = Field(False, description="Exit with 2 where the file in state_dir cannot be understood, rather than begin anew.")
    backend: Literal["auto", "torch", "native", "triton"] = Field(
        "auto", description="What computes; auto is native on a CPU, triton on a GPU, and torch where that cannot be had."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is CUDA where there is a device.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto is bfloat16 on CUDA and on the native backend, else float32."
    )

    base_dtype: Literal["auto", "int8"] = Field(
        "auto", description="auto keeps the base in dtype; int8 halves its memory and what a step reads (native backend, bfloat16)."
    )

    # -- where, and who may
    host: str = Field("127.0.0.1", min_length=1, description="Address to bind. One that is not loopback needs a key.")
    port: int = Field(8000, ge=0, le=65535, description="Port to bind; 0 takes a free one.")
    api_key: Secrets = Field((), description="Keys that requests may carry as a bearer token; several are separated by commas.")
    admin_key: SecretStr | None = Field(None, description="Key that may change adapters; with API keys but without it, nobody may.")
    allow_unauthenticated: bool = Field(False, description="Serve without keys on an address that others reach.")
    allowed_hosts: Texts = Field(
        (), description="Host headers to answer besides localhost on a loopback bind, the only ones on another; against DNS rebinding."
    )
    cors_origin: Texts = Field((), description="Origins whose web pages may call the API from a browser, as scheme://host:port.")
    tls_cert: Path | None = Field(
        None, description="PEM file of the server's certificate and those above it; with it HTTPS is served, and nothing else."
    )
    tls_key: Path | None = Field(None, description="PEM file of its private key; the certificate's file holds it if omitted.")
    tls_key_password: SecretStr | None = Field(None, description="Password of an encrypted key. Variable or file only: others see flags.")

    # -- what one API key may do; the admin key is not limited
    key_requests_per_minute: int | None = Field(
        None, ge=1, le=10**9, description="Requests of one API key a minute that make work; more get 429. Not limited if omitted."
    )
    key_tokens_per_minute: int | None = Field(
        None, ge=1, le=10**12, description="Tokens of one API key a minute, read and generated; more get 429. Not limited if omitted."
    )
    key_concurrent_requests: int | None = Field(
        None, ge=1, le=100_000, description="Requests of one API key at the same time; more get 429. Not limited if omitted."
    )

    # -- the engine
    max_num_seqs: int = Field(32, ge=1, le=4096, description="Sequences in one step; more wait.")
    max_waiting: int = Field(64, ge=0, le=100_000, description="Requests that may wait for a row; more get 503 at once.")
    max_batch_tokens: int = Field(256, ge=1, le=2**20, description="Tokens in one step; longer prompts are prefilled in chunks.")
    num_slots: int = Field(8, ge=1, le=1024, description="Adapters that one batch can mix; more of them queue.")
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="Memory for the KV cache; if omitted a quarter of what is free, on CUDA what gpu_memory_utilization leaves."
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Share of a GPU's memory that all may hold together; the KV cache gets what is left. 0.9 if omitted; CUDA only.",
    )
    max_model_len: int | None = Field(None, ge=1, description="Tokens of prompt and completion together; the base's own if omitted.")
    adapter_cache_bytes: int = Field(8 * 2**30, gt=0, description="Host memory for adapters; the least recently used leave first.")
    max_adapters: int = Field(10_000, ge=0, description="Adapters that may be found or loaded, so that a scan stays short.")
    prefix_cache: bool = Field(True, description="Keep the KV cache of prompts for requests of the same key that begin the same.")
    max_num_seqs_per_adapter: int | None = Field(None, ge=1, description="Sequences of one adapter in one step; no limit if omitted.")
    max_num_seqs_per_key: int | None = Field(None, ge=1, description="Sequences of one API key in one step; no limit if omitted.")

    # -- sparsity under pressure
    pressure_threshold_scale: float = Field(
        1.0,
        ge=1,
        le=100,
        allow_inf_nan=False,
        description="Highest factor on thresholds of requests that come while others wait: fewer experts, faster, less right. 1 is off.",
    )
    pressure_adapters: Texts = Field(
        (), description="Adapters with a factor of their own, as NAME=FACTOR with commas between; 1 leaves an adapter as it is."
    )
    pressure_waiting: int | None = Field(
        None, ge=1, description="Waiting requests from which on thresholds are raised; a quarter of max_waiting if omitted."
    )

    # -- what a request may be
    max_body_bytes: int = Field(4 * 2**20, ge=1024, le=2**30, description="Bytes of a request body; more get 413 before they are read.")
    max_body_chunks: int = Field(8192, ge=1, description="Pieces of a chunked body: one costs more than the bytes in it.")
    max_header_bytes: int = Field(16 * 2**10, ge=1024, le=2**20, description="Bytes of all headers of a request.")
    max_headers: int = Field(100, ge=10, le=10_000, description="Headers of a request.")
    max_url_bytes: int = Field(8 * 2**10, ge=256, le=2**16, description="Bytes of a path with its query.")
    max_connections: int = Field(
        1024,
        ge=1,
        le=100_000,
        description="Connections at once, fewer with few file descriptors; the longest silent one makes room.",
    )
    max_n: int = Field(8, ge=1, le=128, description="Completions of one prompt (`n`); each takes a row.")
    max_prompts: int = Field(64, ge=1, le=4096, description="Prompts in one request; each takes a row.")
    max_logprobs: int = Field(5, ge=0, le=20, description="`logprobs` of a completion: best tokens at each place.")
    max_top_logprobs: int = Field(20, ge=0, le=20, description="`top_logprobs` of a chat completion: best tokens at each place.")
    max_stop: int = Field(16, ge=1, le=16, description="Stop strings of a request; each is looked for at every token.")
    max_logit_bias: int = Field(1024, ge=0, le=1024, description="Entries of `logit_bias`.")

    # -- how long things may take, in seconds
    header_timeout_seconds: Seconds = Field(10.0, description="From the first byte until the headers are there; a slow sender is cut then.")
    body_timeout_seconds: Seconds = Field(30.0, description="From the first byte until the whole request is there.")
    keep_alive_seconds: int = Field(5, ge=1, le=3600, description="An idle connection is kept open for its next request.")
    write_timeout_seconds: Seconds = Field(60.0, description="A reader that takes nothing for this long is cut.")
    queue_timeout_seconds: Seconds = Field(30.0, description="A request that waited this long for a row gets 503.")
    request_timeout_seconds: Seconds = Field(600.0, description="A request that took this long in all gets 504, or an error event.")
    drain_seconds: Seconds = Field(30.0, description="After SIGTERM, running requests may end within this time.")

    # -- what sparsity costs
    shadow_share: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of answers whose adapter left experts out that are scored again, with every expert, to see what that costs in "
        "quality; at 0 none. Only while nobody waits: it takes idle time, and some 64 MiB while it computes.",
    )

    # -- when something is wrong
    memory_limit_bytes: int | None = Field(
        None,
        ge=2**20,
        description="Memory the process may use, beside its control groups' limits; at 90 % new work is refused, at 95 % it is not ready.",
    )
    watchdog_seconds: Seconds = Field(30.0, description="An engine with work that gets nowhere for this long ends the process: exit 70.")

    # -- what is told
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe lines of the log.")
    named_adapters: int = Field(
        64, ge=0, le=10_000, description="Adapters with latency and token metrics of their own, the first loaded; the rest are `other`."
    )
    grid_adapters: int = Field(
        8, ge=0, le=1000, description="Busiest adapters whose expert metrics have a series per layer and expert; the rest are `other`."
    )
    vllm_metrics: bool = Field(True, description="Show the `vllm:*` names that load balancers and stock dashboards read, too.")
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s/]",
        description="Collector of OpenTelemetry traces, a span for each request, as http://127.0.0.1:4318; needs the extra otel.",
    )

    # -- for tests of the server itself
    unsafe_test_hooks: bool = Field(False, description="Let MOA_SERVE_FAULTS inject faults. Never where anybody is served.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment. The file comes last, in `load_settings`; there are no other places to look."""
        return init_settings, env_settings

    @field_validator("api_key", "allowed_hosts", "cors_origin", "pressure_adapters", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """A variable, a key of the file and a flag hold several values with commas between them; a flag can be repeated, too."""
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return [part for item in items for part in (part.strip() for part in item.split(",")) if part]
        return value

    @field_validator("api_key")
    @classmethod
    def _check_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not all(_KEY.fullmatch(key.get_secret_value()) for key in keys):
            raise ValueError("a key must be 1 to 512 visible ASCII characters without spaces")
        return keys

    @field_validator("admin_key")
    @classmethod
    def _check_admin_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not _KEY.fullmatch(key.get_secret_value()):
            raise ValueError("a key must be 1 to 512 visible ASCII characters without spaces")
        return key

    @field_validator("served_model_name")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name is not None and not _NAME.fullmatch(name):
            raise ValueError("must be 1 to 128 of the characters A-Z a-z 0-9 . _ - / and begin with a letter or digit")
        return name

    @field_validator("adapters_dir")
    @classmethod
    def _check_folder(cls, place: Path | None) -> Path | None:
        if place is not None and not place.is_dir():
            raise ValueError(f"{place} is not a folder; make it, or leave the setting out")
        return place

    @field_validator("cors_origin")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#]+", origin):
                raise ValueError(f"{origin!a} is no origin; write scheme://host or scheme://host:port, one by one, without a path")
        return origins

    @field_validator("pressure_adapters")
    @classmethod
    def _check_factors(cls, items: tuple[str, ...]) -> tuple[str, ...]:
        names = [_factor(item)[0] for item in items]
        if len(set(names)) < len(names):
            raise ValueError(f"names an adapter twice: {', '.join(names)}")
        return items

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.admin_key is not None and any(key.get_secret_value() == self.admin_key.get_secret_value() for key in self.api_key):
            raise ValueError("admin_key: is one of the API keys too, so every user could change adapters; use another one")
        if not (self.api_key or self.allow_unauthenticated or self.is_loopback):
            raise ValueError(
                f"host: {self.host} can be reached by others, and there is no API key; set MOA_API_KEY, bind 127.0.0.1, "
                f"or say --allow-unauthenticated"
            )
        if self.tls_cert is None and self.tls_key is not None:
            raise ValueError("tls_key: there is no certificate for it; set MOA_TLS_CERT, or leave it out")
        if not self.api_key and (limited := [name for name in KEY_LIMITS if getattr(self, name) is not None]):
            raise ValueError(f"{limited[0]}: there is no API key that it could limit; set MOA_API_KEY, or leave it out")
        if self.max_batch_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batch_tokens: {self.max_batch_tokens} is less than max_num_seqs {self.max_num_seqs}, so a step could not give each "
                f"row one token; raise it"
            )
        self._check_pressure()
        return self

    def _check_pressure(self) -> None:
        is_on = self.raises_thresholds
        if not is_on and (given := [name for name in ("pressure_adapters", "pressure_waiting") if getattr(self, name)]):
            raise ValueError(f"{given[0]}: no threshold would be raised; set pressure_threshold_scale above 1, or leave it out")
        if is_on and self.first_waiting > self.max_waiting:
            raise ValueError(
                f"pressure_waiting: {self.first_waiting} is more than may wait (max_waiting {self.max_waiting}), so no threshold would "
                f"ever be raised; lower it, or raise max_waiting"
            )

    @property
    def pressure_scales(self) -> dict[str, float]:
        """`pressure_adapters`, by name."""
        return dict(map(_factor, self.pressure_adapters))

    @property
    def raises_thresholds(self) -> bool:
        """Whether there is any pressure that raises thresholds."""
        return max([self.pressure_threshold_scale, *self.pressure_scales.values()]) > 1

    @property
    def first_waiting(self) -> int:
        """`pressure_waiting`, or what it is if omitted."""
        return max(1, self.max_waiting // 4) if self.pressure_waiting is None else self.pressure_waiting

    @property
    def tls(self) -> tuple[Path, Path | None, str | None] | None:
        """Certificate, key and password; None is plain HTTP."""
        password = self.tls_key_password.get_secret_value() if self.tls_key_password else None
        return None if self.tls_cert is None else (self.tls_cert, self.tls_key, password)

    @property
    def secrets(self) -> list[str]:
        """What no log may hold."""
        found = [*self.api_key, self.admin_key, self.tls_key_password]
        return [secret.get_secret_value() for secret in found if secret is not None]

    def explain(self) -> list["Explained"]:
        """Every setting as it counts, and where it comes from."""
        return [Explained(name, _shown(getattr(self, name)), self._sources.get(name, DEFAULT)) for name in type(self).model_fields]

    @property
    def is_loopback(self) -> bool:
        """Only this machine can reach the server. A name other than localhost is not trusted to stay here."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def load_settings(overrides: Mapping[str, Any], config_file: Path | None = None) -> ServerSettings:
    """Settings from flags, the environment and a TOML file; the first that has a value counts.

    Args:
        overrides: flags by their setting's name; None, and an empty list of a flag that repeats, mean that it was not given.
    Raises:
        InvalidRequest: a setting is unknown, of the wrong kind or out of bounds, or the file cannot be read. `problems` has all findings;
            no message holds a key.
    """
    given = {name: value for name, value in overrides.items() if value is not None and value != [] and value != ()}
    from_file = {} if config_file is None else _read(config_file)
    for names, where in ((given, "flags"), (from_file, str(config_file))):
        unknown = sorted(set(names) - set(ServerSettings.model_fields))
        if unknown:
            named = ", ".join(f"{name!r}{_meant(name, ServerSettings.model_fields)}" for name in unknown)
            raise InvalidRequest(f"{where}: unknown setting {named}", param=unknown[0])

    class WithFile(ServerSettings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *args: Any, **sources: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return sources["init_settings"], sources["env_settings"], InitSettingsSource(settings_cls, from_file)

    try:
        settings = WithFile(**given)
        settings._sources.update({name: source for name in settings.model_fields_set if (source := _source(name, given, str(config_file)))})
        return settings
    except ValidationError as error:
        problems = [_line(item["loc"], item["msg"], given, from_file) for item in error.errors(include_url=False, include_input=False)]
        raise InvalidRequest("; ".join(problems), param=problems[0].partition(":")[0].partition(" ")[0], problems=problems) from None


def _read(config_file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(config_file.read_text("utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{config_file}: cannot be read ({error.strerror})", param="config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{config_file}: is not TOML ({error})", param="config") from None


def _source(name: str, given: Mapping[str, Any], config_file: str) -> str:
    variable = (ENV_PREFIX + name).upper()
    is_variable = any(key.upper() == variable and value for key, value in os.environ.items())
    return "flag" if name in given else variable if is_variable else config_file


def strange_variables() -> list[str]:
    """Variables that look like settings and are none: what is mistyped would silently be the default."""
    known = {(ENV_PREFIX + name).upper() for name in ServerSettings.model_fields}
    found = sorted(key for key in map(str.upper, os.environ) if key.startswith(ENV_PREFIX) and key not in known | OTHER_VARIABLES)
    return [f"{key} is no setting{_meant(key, known)}; it counts for nothing" for key in found if not _FROM_KUBERNETES.fullmatch(key)]


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _shown(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_shown(item) for item in value]
    if isinstance(value, SecretStr):
        return HIDDEN
    return str(value) if isinstance(value, Path) else value


def _line(place: tuple[int | str, ...], message: str, given: Mapping[str, Any], from_file: Mapping[str, Any]) -> str:
    """One finding, with where the value came from: a variable set by a container's host is easily overlooked."""
    text = message.removeprefix("Value error, ")
    if not place:
        return text  # of several settings together; it names them
    name = str(place[0])
    source = _source(name, given, "the file" if name in from_file else "")
    return f"{name} (from {source}): {text}" if source not in ("flag", "") else f"{name}: {text}"
