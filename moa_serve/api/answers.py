"""What routes answer, for the document alone: handlers make their own dicts, and the fuzzers hold them to these shapes. Owns no state."""

from typing import Any, Literal

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length"] | None


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens that were not computed because they were cached.")


class MoaUsage(BaseModel):
    evaluations_done: int = Field(description="Experts that were computed, each for one token in one layer.")
    evaluations_skipped: int = Field(description="Those that the routers left out.")


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Of all prompts, each counted once.")
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    moa: MoaUsage | None = Field(
        None,
        description="With `moa.return_routing`: of all tokens that were computed for the request, cached ones of a prompt not among them.",
    )


class Timings(BaseModel):
    """Seconds; null for what did not happen."""

    queue: float | None = Field(description="From arrival to the first row.")
    prefill: float | None = Field(description="From there to the first token.")
    first_token: float | None = Field(description="From arrival to the first token (TTFT).")
    decode: float | None = Field(description="From the first token to the end.")
    tokens_per_second: float | None = Field(description="Of decoding, without the first tokens.")


class Auto(BaseModel):
    """How the adapter was picked."""

    scores: dict[str, float] = Field(
        description="Of each candidate, best first: mean log-probability of the prompt's tokens among those of its training prompts."
    )


class ResolvedOptions(BaseModel):
    """Routing options as they were understood; what was not given is left out."""

    mode: Literal["soft", "sparse"] = Field(description="That the options came to.")
    threshold: dict[Literal["scale", "constant"], float] | None = None
    top_k: int | None = None
    disable: list[str] | None = None
    force: list[str] | None = None


class MoaAnswer(BaseModel):
    """Our extension."""

    revision: str = Field(description="Of what has answered: the digest of the adapter, or of the base.")
    adapter: str | None = Field(description="null for the base alone.")
    variant: str | None
    timings: Timings
    options: ResolvedOptions | None = Field(None, description="Routing options of the request; only where it had some.")
    threshold_scale: float | None = Field(
        None, description="What the server, under pressure, multiplied the adapter's thresholds by; only where it did."
    )
    auto: Auto | None = Field(None, description="Where the model was `auto`.")
    defaults: dict[str, Any] | None = Field(None, description="Fields that the adapter gave, since the request left them out.")


class _Generated(BaseModel):
    id: str
    created: int = Field(description="Unix time, in seconds.")
    model: str
    system_fingerprint: str = Field(description="The first digits of the revision.")
    usage: Usage
    moa: MoaAnswer


class RoutedToken(BaseModel):
    """What the routers said: of an answer's token in the step that gave it, so of the token before it; of a prompt's token of itself. All
    lists have an entry for each layer; numbers have four digits, null where a router overflowed."""

    id: int
    token: str = Field(description="As text; U+FFFD for a part of a character.")
    weights: list[list[float | None]] = Field(description="The routers' outputs before selection; empty for a layer without experts.")
    selected: list[list[Literal[0, 1]]] = Field(description="Whether the expert was kept.")
    threshold: list[float | None] | None = Field(
        description="What a weight had to reach; null where nothing is compared with a threshold of the layer."
    )


class Routing(BaseModel):
    experts: list[list[str]] | None = Field(None, description="Their names, of each layer in order; in a stream with the first piece only.")
    tokens: list[RoutedToken] = Field(description="An entry for each generated token, those of a stop string or the end of text included.")


class ChoiceMoa(BaseModel):
    """Our extension."""

    routing: Routing


_ROUTING = "With `moa.return_routing`."


class PromptRouted(BaseModel):
    """Of the prompt under one adapter. Lists have an entry for each layer."""

    model: str = Field(description="As the request named it, or what was picked.")
    adapter: str = Field(description="The adapter's own name.")
    revision: str
    variant: str
    auto: Auto | None = Field(None, description="Where the model was `auto`.")
    options: dict[str, Any] | None = Field(None, description="How the routers chose, where the request said it.")
    prompt_tokens: int = Field(description="They may differ between adapters with chat templates of their own.")
    experts: list[list[str]]
    weights: list[list[float | None]] = Field(description="Mean weight of each expert, before selection; null where a router overflowed.")
    selected: list[list[float | None]] = Field(description="Share of the tokens that kept it.")
    threshold: list[float | None] | None = Field(
        description="Mean of what a weight had to reach; null where nothing is compared with a threshold of the layer."
    )
    evaluations_done: int = Field(description="Experts that were computed, each for one token in one layer.")
    evaluations_skipped: int = Field(description="Those that the routers left out.")
    tokens: list[RoutedToken] | None = Field(None, description="With detail 'tokens': what the routers said of each token of the prompt.")


class PromptRoutings(BaseModel):
    id: str
    object: Literal["moa.route"]
    data: list[PromptRouted] = Field(description="An entry for each model, in the request's order.")
    usage: Usage = Field(description="The prompt's tokens, once for each model.")


class PromptLogprob(BaseModel):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
_PROMPT_LOGPROBS = "Where they were asked for: at each place the token and the best ones, by id; null for the first."


class CompletionLogprobs(BaseModel):
    """Lists side by side, an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first token of an echoed prompt.")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where each token begins in `text`, in characters.")


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None = Field(description="The stop string or token that ended it.")
    prompt_logprobs: PromptLogprobs | None = Field(None, description=_PROMPT_LOGPROBS)
    moa: ChoiceMoa | None = Field(None, description=_ROUTING)


class Completion(_Generated):
    """In a stream, each event is such an object with what is new; `usage` and `moa` come with the last one."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ScoredToken]


class CalledFunction(BaseModel):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it.")


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = Field(None, description="Where tools were called; in a stream, pieces with an `index`.")


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage = Field(description="In a stream it is called `delta`, and holds what is new.")
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None = Field(description="The stop string or token that ended it.")
    moa: ChoiceMoa | None = Field(None, description=_ROUTING)


class ChatCompletion(_Generated):
    """In a stream, each event is such an object with what is new: a `chat.completion.chunk`; `usage` and `moa` come with the last one."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobs | None = Field(None, description=_PROMPT_LOGPROBS)


class Model(BaseModel):
    """vLLM's fields."""

    id: str = Field(description="What requests call it.")
    object: Literal["model"]
    created: int
    owned_by: str
    root: str = Field(description="The base's name, or the adapter's place below the adapters directory.")
    parent: str | None = Field(description="The base of an adapter; null for the base.")
    max_model_len: int | None
    permission: list[dict[str, Any]]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class OldRevision(BaseModel):
    revision: str
    variant: str
    leases: int


class Adapter(BaseModel):
    id: str = Field(description="What requests call it.")
    object: Literal["adapter"]
    state: Literal["available", "changing", "loading", "loaded", "broken", "unloading"]
    revision: str | None = Field(description="The digest of what is served; null where nothing was read yet.")
    variant: str | None
    tiers: list[Literal["disk", "host", "slot"]] = Field(description="Where that revision is.")
    bytes: int = Field(description="Host memory now.")
    leases: int = Field(description="Requests that hold it.")
    hits: int = Field(description="Requests that it was given to.")
    last_used: float | None = Field(description="Unix time, in seconds.")
    path: str = Field(description="Relative to the adapters directory.")
    error: str | None = Field(description="Why it is broken, or cannot be read again.")
    is_explicit: bool = Field(description="An operator loaded it.")
    is_pinned: bool = Field(description="It stays in host memory.")
    is_changed: bool = Field(description="Its folder holds other content than what is served.")
    warnings: list[str]
    old_revisions: list[OldRevision] = Field(description="Replaced, and still there for requests or aliases.")


class TrainedUse(BaseModel):
    """What the profile in the manifest says of an expert; null where it does not."""

    weight: float | None
    selected: float | None


class ExpertUse(BaseModel):
    """Of all tokens, 0 to 1; null before the first."""

    name: str
    weight: float | None = Field(description="The sum of its weights over the tokens that kept it, over all tokens.")
    selected: float | None = Field(description="Share of tokens that kept it.")
    computed: float | None = Field(description="Share of tokens that it was computed for.")
    bytes: int | None = Field(description="Of its tensors, as the adapter's file stores them; null while the adapter is not in memory.")
    profile: TrainedUse | None = Field(description="The same in training, where the adapter's manifest tells.")


class LayerUse(BaseModel):
    layer: int
    threshold: float | None = Field(description="Mean of what a score had to reach; null where nothing has to be reached.")
    experts: list[ExpertUse]


class DeadExpert(BaseModel):
    layer: int
    expert: str


class ExpertsBytes(BaseModel):
    """Of an adapter's tensors, as its file stores them."""

    total: int
    shared: int = Field(description="Of what belongs to no expert alone: routers, thresholds, HydraLoRA's shared first factor.")
    experts: dict[str, int] = Field(description="By kind of expert, over all layers; all experts at one linear are one kind.")


class Unused(BaseModel):
    expert: str
    layers: list[int]


class Suggestion(BaseModel):
    """Experts that live traffic hardly uses."""

    max_selected: float | None = Field(description="The bound: share of tokens that kept an expert; null where all are kept.")
    max_weight: float | None = Field(description="The bound where all are kept: an expert's mean weight.")
    experts: list[Unused]
    disable: list[str] = Field(description="The same as entries of `moa.disable` and of `moa-serve convert --prune`.")
    bytes: int = Field(description="That the adapter would lose.")
    left_out: int = Field(description="More experts within the bound, each layer's counted, than can go or than 64 entries can name.")


class ShadowUse(BaseModel):
    """What the shadow check has found of a revision."""

    tokens: int = Field(description="That were scored.")
    mean_gap: float = Field(description="Of their log-probabilities, as answered and with every expert kept; in nats.")
    mean_kl: float = Field(description="KL(as answered || every expert kept) at their places; in nats.")
    flip_rate: float = Field(description="Share of places at which the best token is another one.")


class ExpertsUse(BaseModel):
    """What an adapter's routers did with live tokens since its revision was loaded."""

    adapter: str
    revision: str
    tokens: int = Field(description="That went through every router.")
    layers: list[LayerUse]
    skipped: float | None = Field(description="Share of expert evaluations that were left out.")
    drift: float | None = Field(description="How far routing is from training, 0 to 1, as moa_router_drift; null with too few tokens.")
    dead: list[DeadExpert] | None = Field(description="Experts that no token has kept; null with fewer than 1,000 tokens.")
    bytes: ExpertsBytes | None = Field(description="Null while the adapter is not in memory.")
    prune: Suggestion | None = Field(description="What could go; null with fewer than 1,000 tokens, or while the adapter is not in memory.")
    shadow: ShadowUse | None = Field(description="What leaving experts out costs; null where nothing was scored.")


class AdapterList(BaseModel):
    object: Literal["list"]
    data: list[Adapter]


class AdapterDeleted(BaseModel):
    id: str
    object: Literal["adapter.deleted"]
    deleted: Literal[True]
    freed_bytes: int = Field(description="Of host memory; 0 where another name has the same content.")


class Alias(BaseModel):
    id: str
    object: Literal["alias"]
    targets: dict[str, int] = Field(description="Adapters, or `name@revision`, and their shares of the requests.")


class AliasList(BaseModel):
    object: Literal["list"]
    data: list[Alias]


class AliasDeleted(BaseModel):
    id: str
    object: Literal["alias.deleted"]
    deleted: Literal[True]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokenizerInfo(BaseModel):
    """vLLM's names."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    chat_template: str | None
    vocab_size: int
    model_max_length: int


class Text(BaseModel):
    prompt: str


class Healthy(BaseModel):
    status: Literal["ok"]


class Version(BaseModel):
    version: str
    base: str
    base_digest: str
    backend: str
    native: str | None = Field(description="The native library: what it computes with, or why it is not used.")
    cuda: str = Field(description="The GPU that there is, or why none can be used.")
    device: str
    dtype: str
    base_dtype: str
    max_model_len: int = Field(description="Tokens of context that are served.")


ANSWERS: dict[tuple[str, str], type[BaseModel]] = {
    ("post", "/v1/completions"): Completion,
    ("post", "/v1/chat/completions"): ChatCompletion,
    ("post", "/v1/moa/route"): PromptRoutings,
    ("get", "/v1/models"): ModelList,
    ("get", "/v1/models/{model}"): Model,
    ("post", "/tokenize"): Tokens,
    ("post", "/detokenize"): Text,
    ("get", "/tokenizer_info"): TokenizerInfo,
    ("get", "/v1/adapters"): AdapterList,
    ("post", "/v1/adapters"): Adapter,
    ("get", "/v1/adapters/{name}"): Adapter,
    ("get", "/v1/adapters/{name}/experts"): ExpertsUse,
    ("delete", "/v1/adapters/{name}"): AdapterDeleted,
    ("post", "/v1/adapters/{name}/reload"): Adapter,
    ("post", "/v1/adapters/{name}/pin"): Adapter,
    ("post", "/v1/adapters/{name}/unpin"): Adapter,
    ("get", "/v1/aliases"): AliasList,
    ("put", "/v1/aliases/{alias}"): Alias,
    ("delete", "/v1/aliases/{alias}"): AliasDeleted,
    ("get", "/health"): Healthy,
    ("get", "/health/live"): Healthy,
    ("get", "/health/ready"): Healthy,
    ("get", "/version"): Version,
}
"""By method and path; the body of a 200."""
