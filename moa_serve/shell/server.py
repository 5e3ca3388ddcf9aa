"""`moa-serve serve`: composes one server from its settings and runs it until it is told to stop.

    SIGTERM, SIGINT   no new work, running requests end within `drain_seconds`, exit 0; a second one: exit 143 at once
    SIGHUP            look at the adapters directory again, and at the TLS certificate
    SIGPIPE           ignored, as Python does: a reader that is gone is an error of its own write

An engine that is broken ends the process with 1, one that is stuck with 70.

Everything is refused before the port is told to anyone: a port in use, a base that cannot be served, a wrong setting or certificate.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path

import uvicorn

from moa_serve import faults
from moa_serve.adapter.adapter import AdapterSource
from moa_serve.adapter.fingerprint import read_fingerprints
from moa_serve.adapter.state import StateDirectory
from moa_serve.adapter.store import AdapterStore
from moa_serve.api.adapters import AdapterRegistry
from moa_serve.api.app import build_app
from moa_serve.api.auto import AutoPicker
from moa_serve.api.context import Server
from moa_serve.api.logs import configure_logs, log_event, log_settings
from moa_serve.api.protocol import uvicorn_config
from moa_serve.api.tls import Tls
from moa_serve.api.traces import Traces, open_traces
from moa_serve.engine.async_engine import AsyncEngine
from moa_serve.engine.engine import Engine, EngineOptions
from moa_serve.engine.pressure import MemoryWatch
from moa_serve.engine.watchdog import Watchdog
from moa_serve.errors import AdapterError, InvalidRequest
from moa_serve.llm import new_model, open_base
from moa_serve.metrics import Metrics
from moa_serve.model.devices import cuda_status
from moa_serve.model.weights import Base
from moa_serve.native.library import status
from moa_serve.settings import ServerSettings, strange_variables
from moa_serve.shell import terminal
from moa_serve.text import Tokenizer

FAILED, STOPPED_TWICE = 1, 143
_SWITCH_INTERVAL_SECONDS = 0.0005  # Python's 5 ms is most of a step: the engine thread would wait for the loop, and it for the engine
_LOOK_SECONDS = 0.1
_LAST_SECONDS = 2.0  # for what is not generation once that has ended: an operator's load, then threads that read files for it

logger = logging.getLogger(__name__)


def serve(settings: ServerSettings, tls: Tls | None = None) -> int:
    """Run a server; what comes back is the exit code.

    Raises:
        ModelError, InvalidRequest: it cannot start, and why.
    """
    signal.signal(signal.SIGTERM, _leave)  # the first process of a container has no default for it, and starting takes seconds
    _arm_faults(settings)
    configure_logs(settings.log_level, settings.secrets)
    log_settings(settings.explain())
    for warning in (*strange_variables(), *(tls.warnings if tls else ())):
        logger.warning("%s", warning)
    traces = open_traces(settings.otlp_endpoint, version_of("moa_serve"))
    listener = _bind(settings.host, settings.port)
    directory = None
    try:
        directory = StateDirectory(settings.state_dir, is_strict=settings.strict_state) if settings.state_dir else None
        started = time.monotonic()
        base, backend = open_base(
            settings.model, backend=settings.backend, device=settings.device, dtype=settings.dtype, base_dtype=settings.base_dtype
        )
        sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
        return asyncio.run(_run(settings, base, backend, listener, tls, started, directory, traces))
    finally:
        if directory is not None:
            directory.close()
        listener.close()


def _leave(*_: object) -> None:
    raise SystemExit(0)


def _leave_soon(code: int) -> None:
    """Nobody waits for a thread that reads a file from a disk that does not answer."""
    timer = threading.Timer(_LAST_SECONDS, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _arm_faults(settings: ServerSettings) -> None:
    """Raises InvalidRequest: faults are asked for without the flag that says that this is a test."""
    if file := os.environ.get(faults.VARIABLE):
        if not settings.unsafe_test_hooks:
            raise InvalidRequest(
                f"{faults.VARIABLE} is set, which injects faults into the server; unset it, or say --unsafe-test-hooks in a test",
                param="unsafe_test_hooks",
            )
        faults.activate(Path(file))


def _bind(host: str, port: int) -> socket.socket:
    """The port is taken first: one that is in use is known before a base is loaded for seconds."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise InvalidRequest(
            f"{host} port {port} cannot be bound ({error.strerror}); stop who uses it, or choose another", param="port"
        ) from None
    return listener


def compose(settings: ServerSettings, base: Base, backend: str, directory: StateDirectory | None = None) -> Server:
    """All parts of one server, not yet running. Called where the event loop runs."""
    name = settings.served_model_name or base.name
    options = EngineOptions(
        max_num_seqs=settings.max_num_seqs,
        max_batch_tokens=settings.max_batch_tokens,
        num_slots=settings.num_slots,
        kv_cache_bytes=settings.kv_cache_bytes,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        max_model_len=settings.max_model_len,
        adapter_cache_bytes=settings.adapter_cache_bytes,
        prefix_cache=settings.prefix_cache,
        max_num_seqs_per_adapter=settings.max_num_seqs_per_adapter,
        max_num_seqs_per_tenant=settings.max_num_seqs_per_key,
    )
    store = AdapterStore(
        base.config,
        base_name=name,
        base_digest=base.digest,
        adapters_dir=settings.adapters_dir,
        max_bytes=settings.adapter_cache_bytes,
        max_adapters=settings.max_adapters,
        isolate=True,
    )
    model = new_model(backend, base, settings.base_dtype, options=options, adapters=_known(store), may_fall_back=settings.backend == "auto")
    engine = AsyncEngine(lambda lease: Engine(model, options, lease=lease, base_digest=base.digest), max_waiting=settings.max_waiting)
    metrics = Metrics(
        name,
        max_model_len=engine.engine.max_model_len,
        grid_adapters=settings.grid_adapters,
        named_adapters=settings.named_adapters,
        has_vllm=settings.vllm_metrics,
    )
    registry = AdapterRegistry(store, engine, metrics=metrics, directory=directory)
    metrics.attach(engine, registry, store.cache)
    if settings.raises_thresholds and model.name != "native":
        logger.warning(
            "thresholds may be raised under pressure, but the %s backend hardly computes less for it: answers change and no time is "
            "saved; leave pressure_threshold_scale and pressure_adapters out",
            model.name,
        )

    def evict() -> None:
        engine.end_background()
        store.cache.evict_idle()
        engine.trim()

    fingerprints = read_fingerprints(settings.auto, base.digest) if settings.auto else None
    return Server(
        engine=engine,
        registry=registry,
        tokenizer=Tokenizer.from_folder(base.folder) if base.folder else None,
        metrics=metrics,
        settings=settings,
        base_name=name,
        base_digest=base.digest,
        version=version_of("moa_serve"),
        started=int(time.time()),
        auto=None if fingerprints is None else AutoPicker(fingerprints, registry.is_served),
        memory=MemoryWatch(settings.memory_limit_bytes, evict, is_idle=lambda: not engine.num_open),
    )


def _known(store: AdapterStore) -> list[AdapterSource]:
    """The adapters that lie in the folder now; who serves them tells what is wrong with it."""
    try:
        return [AdapterSource(store.adapters_dir / name) for name in store.scan()] if store.adapters_dir else []
    except AdapterError:
        return []


async def _run(
    settings: ServerSettings,
    base: Base,
    backend: str,
    listener: socket.socket,
    tls: Tls | None,
    started: float,
    directory: StateDirectory | None,
    traces: Traces | None,
) -> int:
    server = compose(settings, base, backend, directory)
    server.traces = traces
    server.engine.start()
    watchdog = Watchdog(server.engine, stuck_seconds=settings.watchdog_seconds)
    watchdog.start()
    server.metrics.watch(watchdog, server.memory, server.is_ready, server.threshold_scales)
    try:
        try:
            problem = await asyncio.to_thread(server.registry.scan)
        except AdapterError as error:
            raise InvalidRequest(str(error), param="adapters_dir") from None
        if problem is not None:
            logger.error("the registry begins anew, with what lies in the adapters directory: %s", problem)
        server.registry.start(look_seconds=settings.adapters_look_seconds)
        http = _Http(uvicorn_config(build_app(server), settings, tls.context if tls else None), server, tls)
        gc.freeze()  # what is there now stays: a full collection would stop everything for a tenth of a second to find that out
        gc.enable()
        log_event("starting", **_facts(server, listener), seconds=round(time.monotonic() - started, 2))
        if sys.stderr.isatty():  # a person, who wants less than the log says
            names = ", ".join(item.name for item in server.registry.items()) or "none"
            terminal.note(f"{server.base_name} is served at {_facts(server, listener)['url']}/v1; adapters: {names}. Ctrl-C ends it.")
        watching = [asyncio.create_task(server.memory.run())]
        if server.shadow is not None:
            watching.append(asyncio.create_task(server.shadow.run()))
        await http.serve(sockets=[listener])
        for task in watching:
            task.cancel()
        return FAILED if server.engine.failure is not None else 0
    finally:
        server.registry.stop()
        if server.sandbox is not None:
            server.sandbox.close()
        await server.engine.stop()
        watchdog.stop()
        _leave_soon(FAILED if server.engine.failure is not None else 0)
        if traces is not None:
            await asyncio.to_thread(traces.close)


def _facts(server: Server, listener: socket.socket) -> dict[str, object]:
    engine, settings = server.engine.engine, server.settings
    host, port = listener.getsockname()[:2]
    return {
        "url": f"{'https' if settings.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}",
        "base": server.base_name,
        "backend": engine.backend,
        "native": status(),
        "cuda": cuda_status(),
        "device": str(engine.model.device),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "base_dtype": engine.model.base_dtype,
        "adapters": len(server.registry.items()),
        "adapters_dir": str(settings.adapters_dir) if settings.adapters_dir else None,
        "context": engine.max_model_len,
        "registry": str(settings.state_dir) if settings.state_dir else "in memory: loads and unloads are forgotten when the server ends",
    }


class _Http(uvicorn.Server):
    """uvicorn with our way to stop: it goes on answering while it drains, so that health can say so."""

    def __init__(self, config: uvicorn.Config, server: Server, tls: Tls | None) -> None:
        super().__init__(config)
        self._server, self._tls = server, tls
        self._stopping: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        watching = loop.create_task(self._watch())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._look_again)
        try:
            yield
        finally:
            watching.cancel()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._tls is not None:  # asyncio gives a handshake a minute, in which a silent client holds a descriptor
            loop = asyncio.get_running_loop()
            timed = partial(loop.create_server, ssl_handshake_timeout=self._server.settings.header_timeout_seconds)
            loop.create_server = timed  # type: ignore[method-assign]
        await super().startup(sockets)

    def _look_again(self) -> None:
        self._server.registry.looks.begin()
        if self._tls is not None:
            try:
                self._tls.load()
                log_event("certificate loaded", warnings=self._tls.warnings)
            except InvalidRequest as error:
                logger.error("the certificate in use is kept: %s", error)

    def _stop(self) -> None:
        if self._stopping is not None:
            log_event("stopped at once")
            os._exit(STOPPED_TWICE)
        self._stopping = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        self._server.is_draining = True
        self._server.registry.stop()
        log_event("draining", requests=self._server.engine.num_open)
        deadline = time.monotonic() + self._server.settings.drain_seconds
        while (self._server.engine.num_open or self._server.num_preparing) and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
        if self._server.engine.num_open:
            await self._server.engine.stop()  # ends the streams that are left with an error, which their readers get
        self.config.timeout_graceful_shutdown = max(1, round(_LAST_SECONDS))
        self.should_exit = True

    async def _watch(self) -> None:
        """An engine that has given up ends the process; whoever supervises it starts a new one."""
        while self._server.engine.failure is None:
            await asyncio.sleep(_LOOK_SECONDS)
        logger.error("the engine has stopped: %s", self._server.engine.failure)
        self._server.is_draining = True
        await asyncio.sleep(1)  # for the errors to reach their readers
        self.should_exit = True
