"""Server: what the handlers of one process share. Made where the process is composed; belongs to the event loop."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

from moa_serve.adapter.adapter import Adapter
from moa_serve.api.adapters import AdapterRegistry
from moa_serve.api.auto import AUTO, AutoPicker
from moa_serve.api.errors import KeyOverloaded, NotReady
from moa_serve.api.overload import ReturnTimes
from moa_serve.api.shadow import ShadowCheck
from moa_serve.api.sparsity import SparsityPressure
from moa_serve.api.traces import Traces
from moa_serve.chat_template import ChatTemplate
from moa_serve.engine.async_engine import AsyncEngine
from moa_serve.engine.guide import GrammarCompiler
from moa_serve.engine.pressure import MemoryWatch
from moa_serve.errors import Draining, InvalidRequest, Overloaded
from moa_serve.metrics import Metrics
from moa_serve.sandbox import SandboxProcess
from moa_serve.settings import ServerSettings
from moa_serve.text import Tokenizer


@dataclass(slots=True)
class Server:
    """
    Args:
        tokenizer: None where the base has none; then prompts are token ids and answers have no text.
        base_name: what the base is served as.
        started: Unix time in seconds; the `created` of every model.
        memory: how much of its memory limit the process uses; refuses work before there is none left.
        traces: where the spans of requests go; None where nobody asks for them.
        auto: picks the adapter where the model is `auto`; None where that is off, and `auto` a name like any other.
        is_draining: SIGTERM has come: health answers 503, and new requests are refused.
    """

    engine: AsyncEngine
    registry: AdapterRegistry
    tokenizer: Tokenizer | None
    metrics: Metrics
    settings: ServerSettings
    base_name: str
    base_digest: str
    version: str
    started: int
    memory: MemoryWatch = field(default_factory=MemoryWatch)
    traces: Traces | None = None
    auto: AutoPicker | None = None
    is_draining: bool = False
    num_preparing: int = 0  # rows of requests that are not yet in the engine: their adapter is being read, or their text tokenised
    rows_of_keys: Counter[str] = field(default_factory=Counter)  # of requests that have not ended, by the key's id
    return_times: ReturnTimes = field(init=False)
    sparsity: SparsityPressure = field(init=False)
    chat_template: ChatTemplate | None = field(init=False)
    sandbox: SandboxProcess | None = field(init=False)  # where adapters' own templates are rendered
    grammars: GrammarCompiler | None = field(init=False)
    shadow: ShadowCheck | None = field(init=False)

    def __post_init__(self) -> None:
        config = self.engine.engine.model.config
        self.return_times = ReturnTimes(self.engine.engine.options.max_num_seqs)
        self.sparsity = SparsityPressure(
            self.settings.pressure_threshold_scale,
            self.settings.pressure_scales,
            first_waiting=self.settings.first_waiting,
            max_waiting=self.settings.max_waiting,
        )
        self.chat_template = ChatTemplate(self.tokenizer) if self.tokenizer else None
        self.sandbox = SandboxProcess() if self.settings.adapter_chat_templates else None
        self.grammars = GrammarCompiler(self.tokenizer, config.vocab_size, config.eos_token_ids) if self.tokenizer else None
        share = self.settings.shadow_share
        self.shadow = ShadowCheck(self.engine, self.registry, self.metrics, share, self._is_free) if share else None

    def _is_free(self) -> bool:
        """Nobody is about to wait for the engine, and nothing is short."""
        return self.is_ready() and not self.memory.is_short and not self.num_preparing

    def template_of(self, adapter: Adapter | None) -> ChatTemplate | None:
        """Of chats with an adapter: its own, where it has one and the operator lets it, else the base's."""
        source = adapter.manifest.defaults.chat_template if adapter is not None and adapter.manifest.defaults is not None else None
        if source is None or self.sandbox is None or self.tokenizer is None:
            return self.chat_template
        return ChatTemplate(self.tokenizer, source, render=self.sandbox.render)

    def picker(self, model: str | None) -> AutoPicker | None:
        """Where this model is to be picked. It goes before an adapter or alias of the same name."""
        return self.auto if model == AUTO else None

    @property
    def max_model_len(self) -> int:
        return self.engine.engine.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.engine.engine.model.config.vocab_size

    def check_ready(self) -> None:
        """Raises Draining, NotReady: no new request can be served, and why."""
        if self.is_draining:
            raise Draining("the server is shutting down; send the request to another one")
        if self.engine.failure is not None:
            raise NotReady("the engine has stopped; restart the server")
        if self.engine.is_rebuilding:
            raise NotReady("the engine is being built anew; try again in a moment")
        if self.memory.is_critical:
            raise NotReady("nearly all of the server's memory is in use; try again later")

    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        try:
            self.check_ready()
        except (Draining, NotReady):
            return False
        return True

    @property
    def max_rows(self) -> int:
        """That may run and wait."""
        return self.engine.engine.options.max_num_seqs + self.settings.max_waiting

    def num_waiting(self, num_more: int = 0) -> int:
        """Rows beyond those that can run, counted as `check_room` counts them, and with so many more."""
        return max(0, self.engine.num_open + self.num_preparing + num_more - self.engine.engine.options.max_num_seqs)

    def threshold_scales(self) -> dict[str, float]:
        """What the thresholds of a request that came now would be multiplied by, as `SparsityPressure.shown` has it."""
        return self.sparsity.shown(self.num_waiting(1))

    @contextmanager
    def claim(self, key_id: str | None, num_rows: int) -> Iterator[None]:
        """Rows of one API key, until their request ends. Of several API keys, each leaves a quarter of all places to the others.

        Raises:
            KeyOverloaded: this key has too many already; other keys can still be served.
        """
        if key_id is None:
            yield
            return
        is_shared = len(self.settings.api_key) > 1  # who has the admin key administers
        limit = self.max_rows - self.max_rows // 4 if is_shared else self.max_rows
        if self.rows_of_keys[key_id] and self.rows_of_keys[key_id] + num_rows > limit:
            raise KeyOverloaded(f"{limit} requests of this API key are running or waiting, which is its share; try again later")
        self.rows_of_keys[key_id] += num_rows
        try:
            yield
        finally:
            self.rows_of_keys[key_id] -= num_rows

    def check_room(self, num_rows: int = 1) -> None:
        """Raises Overloaded: so many rows more cannot wait now."""
        if self.engine.num_open + self.num_preparing + num_rows > self.max_rows:
            seconds = self.return_times.next_seconds()
            raise Overloaded(
                f"{self.max_rows} requests are running or waiting, which is the limit; try again in {seconds} s", retry_seconds=seconds
            )

    @contextmanager
    def admit(self, num_rows: int, *, what: str = "prompts times n", param: str = "n") -> Iterator[None]:
        """Room for a request, taken before anything is done for it that costs; inside, it counts as waiting.

        Args:
            what, param: that the rows are, for the message.

        Raises:
            InvalidRequest: it could never have room. Overloaded: it has none now. Draining, NotReady.
        """
        self.check_ready()
        if self.memory.is_short:
            raise Overloaded("the server is short of memory and takes no new work; try again later")
        limit = self.max_rows
        if num_rows > limit:
            raise InvalidRequest(f"{what} are {num_rows} rows, but at most {limit} can run and wait; send less at once", param=param)
        self.check_room(num_rows)
        self.engine.end_background()  # a few milliseconds before its first row comes
        self.num_preparing += num_rows
        try:
            yield
        finally:
            self.num_preparing -= num_rows


def server_of(connection: HTTPConnection) -> Server:
    """The server that a request came to."""
    server = connection.app.state.server
    assert isinstance(server, Server)
    return server
