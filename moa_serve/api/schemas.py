"""What clients may send: one schema for each route, and `read_json`, the only way in.

Strict: no string is taken for a number. A null is an absent field, at every depth. A name that nobody knows is `unknown_parameter`, one
that OpenAI or vLLM know and this server does not implement is `unsupported_parameter`; nothing is accepted and ignored but metadata that
changes no answer. Validation ends at the first finding of a list: a body of a million mistakes costs no more than one. Owns no state.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from starlette.requests import Request

from moa_serve.adapter.rules import MAX_NAMED, MAX_THRESHOLD_SCALE, RoutingOptions
from moa_serve.api.errors import InvalidJson, UnknownParameter, UnsupportedMediaType, UnsupportedParameter
from moa_serve.engine.guide import MAX_CHOICES, MAX_SOURCE_BYTES, Guide
from moa_serve.engine.request import MAX_TOKEN_LIST, SamplingParams
from moa_serve.errors import InvalidRequest
from moa_serve.settings import ServerSettings

MAX_NAME_CHARS = 256
MAX_PARAM_CHARS = 80
MAX_STOP_CHARS = 1024  # of one stop string: it is prepared once for every choice, in time that grows with its length
MAX_SALT_CHARS = 128
MAX_TOOLS = 128
DEFAULT_MAX_TOKENS = 16

_NAMES = """
    add_generation_prompt add_special_tokens allowed_token_ids annotations audio bad_words best_of chat_template chat_template_kwargs
    continue_final_message data_parallel_rank detokenize documents echo extra_args function_call functions guided_choice
    guided_decoding_backend guided_grammar guided_json guided_regex guided_whitespace_pattern include_obfuscation include_reasoning
    include_stop_str_in_output kv_transfer_params length_penalty logits_processors lora_path max_completion_tokens mm_processor_kwargs
    modalities moderation name parallel_tool_calls parse_special prediction priority prompt_embeds prompt_logprobs reasoning
    reasoning_content reasoning_effort refusal regex repetition_detection request_id return_routing return_token_ids
    return_tokens_as_token_ids skip_special_tokens spaces_between_special_tokens structural_tag structured_outputs suffix thinking
    tool_call_id tool_calls tool_choice tools top_logprobs truncate_prompt_tokens truncation_side typical_p use_beam_search verbosity
    vllm_xargs web_search_options whitespace_pattern
"""
UNSUPPORTED = frozenset(_NAMES.split())
"""Names that OpenAI's or vLLM's API give a meaning; where a schema below has the name, it is implemented there."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


MAX_MESSAGES = 1024  # and parts of one: each is an object to check and a piece to render, however little it holds
MAX_COUNT = 2**31 - 1  # of tokens and the like; a longer number is nobody's wish, and Python would not even print it
Bias = Annotated[float, Field(ge=-100, le=100)]


def _check_size(raw: Any) -> Any:
    """Before every entry is looked at."""
    if isinstance(raw, dict) and len(raw) > MAX_TOKEN_LIST:
        raise PydanticCustomError("refused", f"has {len(raw)} entries; at most {MAX_TOKEN_LIST} are allowed")
    return raw


class Schema(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)
    expected: ClassVar[Mapping[str, str]] = {}  # said of its fields in place of `_EXPECTED`

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        known = _names_of(cls)
        unknown = [name for name in raw if name not in known and raw[name] is not None][:1]  # one is enough to refuse
        return {name: value for name, value in raw.items() if value is not None and (name in known or name in unknown)}


@functools.cache
def _names_of(schema: type[Schema]) -> frozenset[str]:
    """Of its fields, as a client writes them."""
    return frozenset(field.alias or name for name, field in schema.model_fields.items())


class StreamOptions(Schema):
    include_usage: bool = Field(False, description="One last chunk with the usage and no choices.")
    continuous_usage_stats: bool = Field(False, description="Usage so far on every chunk.")
    include_obfuscation: Literal[False] = Field(False, description="Chunks are not padded.")


class Threshold(Schema):
    """Exactly one of the two."""

    scale: float | None = Field(None, ge=0, le=MAX_THRESHOLD_SCALE, description="A weight must reach this much of the adapter's threshold.")
    constant: float | None = Field(None, ge=0, le=1, description="A weight must reach this, whatever the token.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.scale is None) == (self.constant is None):
            _refuse("scale", "or constant: exactly one of the two must be given")
        return self


def _threshold_kind(raw: Any) -> str:
    return "(object)" if isinstance(raw, dict | Threshold) else "(number)"


_Constant = Annotated[float, Field(ge=0, le=1)]
AnyThreshold = Annotated[Annotated[_Constant, Tag("(number)")] | Annotated[Threshold, Tag("(object)")], Discriminator(_threshold_kind)]
Experts = Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=64)]], Field(max_length=MAX_NAMED, fail_fast=True)]


class RoutingChoice(Schema):
    """How an adapter's routers choose for this request. Left out, the adapter's own way."""

    mode: Literal["soft", "sparse"] | None = Field(
        None, description="`soft` keeps every expert, `sparse` those that a threshold or `top_k` lets through."
    )
    threshold: AnyThreshold | None = Field(
        None, description='What a weight must reach: a number, or `{"scale": f}` times the adapter\'s own threshold.'
    )
    top_k: int | None = Field(None, ge=1, le=MAX_COUNT, description="Of what is kept, the k experts with the largest weights.")
    disable: Experts = Field([], description="Experts that are not computed: `PROMPT`, `Q@3-9` (layers), `*@20`, `Q/0@5`.")
    force: Experts = Field([], description="Experts that are kept whatever they score, with their own weights.")

    def options(self) -> RoutingOptions | None:
        """Raises InvalidRequest: what the schema cannot tell."""
        threshold = self.threshold.model_dump(exclude_none=True) if isinstance(self.threshold, Threshold) else self.threshold
        return RoutingOptions.of(
            {"mode": self.mode, "threshold": threshold, "top_k": self.top_k, "disable": self.disable, "force": self.force}
        )


Revision = Annotated[str, StringConstraints(pattern="^[0-9a-f]{8,64}$")]


class Moa(RoutingChoice):
    """Our extension."""

    revision: Revision | None = Field(
        None, description="The revision that must answer, of the adapter or the base: its hex digits, all or the first 8 or more."
    )
    return_routing: bool = Field(
        False, description="What the routers said of each token that is generated, in `moa.routing` of its choice."
    )


ParseSpecial = Annotated[bool, Field(description="Control tokens written out in the prompt become those tokens; else they are text.")]


class CompletionMoa(Moa):
    parse_special: ParseSpecial = False


_SAME = {"max_tokens": {"max_tokens", "max_completion_tokens"}}  # fields that mean the same
JsonSchema = dict[str, Any]
GuideText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_SOURCE_BYTES)]
Choices = Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


class JsonSchemaFormat(Schema):
    name: Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = Field(None, description="Changes nothing; say it in the prompt.")
    schema_: JsonSchema = Field(alias="schema", description="What cannot be enforced is refused; oneOf is taken as anyOf.")
    strict: bool | None = Field(None, description="The schema is enforced in either case.")


class ResponseFormat(Schema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            _refuse("json_schema", "goes with type 'json_schema', and that with it")
        return self


class StructuredOutputs(Schema):
    """vLLM's way to say what the text must be: one of these."""

    json_: JsonSchema | GuideText | None = Field(None, alias="json", description="A JSON schema, or its text.")
    json_object: Literal[True] | None = Field(None, description="Any JSON object.")
    regex: GuideText | None = Field(None, description="The whole text matches it.")
    choice: Choices | None = Field(None, description="The text is one of these.")
    grammar: GuideText | None = Field(None, description="Lark as llguidance has it, or GBNF.")


_NO_MATTER = "Changes nothing."


class GenerationRequest(Schema):
    """What completions and chat have in common."""

    model: Name = Field(description="The base, or the name of an adapter.")
    n: int = Field(1, ge=1, le=MAX_COUNT, description="Answers to each prompt.")
    stream: bool = Field(False, description="Server-sent events as tokens come, the last one [DONE].")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")

    temperature: float = Field(1.0, ge=0, le=2, description="The logits are divided by it; 0 takes the best token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draws from the fewest best tokens whose probabilities reach it; 1 is off.")
    top_k: int = Field(0, ge=-1, le=MAX_COUNT, description="Draws from so many best tokens; 0 and -1 are off.")
    min_p: float = Field(0.0, ge=0, le=1, description="Draws from tokens with this share of the best one's probability; 0 is off.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Taken once from the logit of each generated token.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="Taken once for each time that a token was generated.")
    repetition_penalty: float = Field(
        1.0, ge=0.01, le=10, description="Divides positive and multiplies negative logits of tokens of prompt and answer; 1 is off."
    )
    logit_bias: Annotated[dict[str, Bias], BeforeValidator(_check_size)] = Field(
        default_factory=dict, max_length=MAX_TOKEN_LIST, description="Token id to what is added to its logit."
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1, description="Equal seeds give equal tokens, whatever else runs.")
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True)] = Field(
        default_factory=list, description="Texts at which the answer ends, which are not part of it."
    )
    stop_token_ids: list[TokenId] = Field(
        default_factory=list, max_length=MAX_TOKEN_LIST, fail_fast=True, description="Tokens at which it ends, besides the model's own end."
    )
    min_tokens: int = Field(0, ge=0, le=MAX_COUNT, description="Nothing ends the answer before so many.")
    ignore_eos: bool = Field(False, description="The model's own end of text does not end the answer.")

    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=MAX_SALT_CHARS)] | None = Field(
        None, description="Cached prompts are shared only with requests of the same salt; the API key's where omitted."
    )
    prompt_logprobs: int | None = Field(None, ge=0, le=20, description="Log-probabilities of the prompt's tokens, as vLLM gives them.")
    response_format: ResponseFormat | None = Field(None, description="What the answer must be, as OpenAI's API says it.")
    structured_outputs: StructuredOutputs | None = Field(None, description="What the answer must be, as vLLM's API says it.")
    guided_json: JsonSchema | GuideText | None = Field(None, description="Older name of structured_outputs.json; so are those below.")
    guided_regex: GuideText | None = Field(None, description="structured_outputs.regex.")
    guided_choice: Choices | None = Field(None, description="structured_outputs.choice.")
    guided_grammar: GuideText | None = Field(None, description="structured_outputs.grammar.")
    user: str | None = Field(None, description="Where `model` is an alias, the same user gets the same adapter each time.")
    store: bool | None = Field(None, description=_NO_MATTER)
    metadata: dict[str, Any] | None = Field(None, description=_NO_MATTER)
    service_tier: str | None = Field(None, description=_NO_MATTER)
    safety_identifier: str | None = Field(None, description=_NO_MATTER)
    prompt_cache_key: str | None = Field(None, description=_NO_MATTER)
    moa: Moa = Field(Moa(), description="What only this server has.")

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            _refuse("stream_options", "is only for stream: true")
        if self.prompt_logprobs is not None and self.stream:
            _refuse("prompt_logprobs", "is not for stream: true")
        wishes = self._wishes()
        if len(wishes) > 1:
            names = [name for name, _ in wishes]
            _refuse(names[1], f"and {names[0]} both say what the text must be; send one of them")
        return self

    def left_out(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Of an adapter's defaults those of fields that the client said nothing about; a null says nothing."""
        said = {name for name in self.model_fields_set if getattr(self, name) is not None}
        return {name: value for name, value in defaults.items() if not said & _SAME.get(name, {name})}

    def _wishes(self) -> list[tuple[str, Callable[[], Guide]]]:
        """Each field that says what the text must be, and what it says."""
        shape, outputs = self.response_format, self.structured_outputs or StructuredOutputs()
        wishes: list[tuple[str, Any, Callable[[Any], Guide]]] = [
            ("response_format", shape and shape.type == "json_object", lambda _: Guide.json({"type": "object"})),
            ("response_format.json_schema.schema", shape and shape.json_schema, lambda wish: Guide.json(wish.schema_)),
            ("structured_outputs.json", outputs.json_, Guide.json),
            ("structured_outputs.json_object", outputs.json_object, lambda _: Guide.json({"type": "object"})),
            ("structured_outputs.regex", outputs.regex, Guide.regex),
            ("structured_outputs.choice", outputs.choice, Guide.choice),
            ("structured_outputs.grammar", outputs.grammar, Guide.grammar),
            ("guided_json", self.guided_json, Guide.json),
            ("guided_regex", self.guided_regex, Guide.regex),
            ("guided_choice", self.guided_choice, Guide.choice),
            ("guided_grammar", self.guided_grammar, Guide.grammar),
        ]
        # An empty schema is a wish: any JSON.
        return [(name, partial(make, wish)) for name, wish, make in wishes if wish not in (None, False)]

    @property
    def guide_field(self) -> str:
        """The field that says what the text must be."""
        return next((name for name, _ in self._wishes()), "guide")

    def guide(self) -> Guide | None:
        """What the text must be. Raises InvalidRequest, whose `param` is the field that says so."""
        for name, make in self._wishes():
            with named(name):
                return make()
        return None

    def check_limits(self, settings: ServerSettings) -> None:
        """Raises InvalidRequest for what this server's operator does not allow."""
        _check_at_most("n", self.n, settings.max_n)
        _check_at_most("stop", len(self.stop_texts), settings.max_stop, "strings")
        _check_at_most("prompt_logprobs", self.prompt_logprobs or 0, settings.max_top_logprobs)
        _check_at_most("logit_bias", len(self.logit_bias), settings.max_logit_bias, "entries")

    @property
    def stop_texts(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises InvalidRequest where fields do not go together."""
        return SamplingParams(
            guide=self.guide(),
            max_tokens=max_tokens,
            logprobs=logprobs,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_bias(self.logit_bias),
            seed=self.seed,
            stop=self.stop_texts,
            stop_token_ids=self.stop_token_ids,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
        )


class CompletionRequest(GenerationRequest):
    prompt: str | TokenIds | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[TokenIds], Field(fail_fast=True)] = Field(
        description="One prompt or several, each a text or token ids."
    )
    max_tokens: int | None = Field(None, ge=0, description="16 if omitted; 0 only with echo.")
    logprobs: int | None = Field(None, ge=0, le=20, description="Of each token, and of so many best ones beside it.")
    echo: bool = Field(False, description="The prompt stands before the answer.")
    best_of: int | None = Field(None, ge=1, le=MAX_COUNT, description="Must equal n.")
    moa: CompletionMoa = Field(CompletionMoa(), description="What only this server has.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise PydanticCustomError("unsupported", "must equal n: answers are not ranked", {"param": "best_of"})
        if self.max_tokens == 0 and not self.echo:
            _refuse("max_tokens", "is 0, which is only for echo: true; use 1 or more")
        if not self.prompts:
            _refuse("prompt", "is an empty list; give at least one prompt")
        return self

    def check_limits(self, settings: ServerSettings) -> None:
        super().check_limits(settings)
        _check_at_most("prompt", len(self.prompts), settings.max_prompts, "prompts")
        _check_at_most("logprobs", self.logprobs or 0, settings.max_logprobs)

    @property
    def prompts(self) -> list[str | list[int]]:
        """`prompt` as a list of prompts, whichever of its four forms it has."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [[item for item in prompt if isinstance(item, int)]]
        return [item for item in prompt if not isinstance(item, int)]


class TextPart(Schema):
    type: Literal["text"]
    text: str


FunctionName = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_-]{1,64}$")]


class CalledFunction(Schema):
    name: FunctionName
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(Schema):
    id: Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Schema):
    """One message of a chat. Fields that OpenAI's own answers carry may come back with null in them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = Field(
        None, description="Text; only a message with tool calls can do without."
    )
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description="What the assistant called."
    )
    tool_call_id: Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)] | None = Field(
        None, description="The call that a tool's message answers."
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.content is None and not self.tool_calls:
            _refuse("content", "is missing")
        if self.tool_calls and self.role != "assistant":
            _refuse("tool_calls", "is only for messages of the assistant")
        if self.tool_call_id is not None and self.role != "tool":
            _refuse("tool_call_id", "is only for messages of a tool")
        return self

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])

    @property
    def more(self) -> dict[str, Any]:
        """As templates know them: arguments are an object there. Raises InvalidRequest: they are none."""
        more: dict[str, Any] = {} if self.tool_call_id is None else {"tool_call_id": self.tool_call_id}
        if self.tool_calls:
            more["tool_calls"] = [{"id": call.id, "type": call.type, "function": _called(call.function)} for call in self.tool_calls]
        return more

    @property
    def is_about_tools(self) -> bool:
        return self.role == "tool" or bool(self.tool_calls)


def _called(function: CalledFunction) -> dict[str, Any]:
    try:
        arguments = json.loads(function.arguments or "{}", parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"messages: the arguments of the call of {function.name!a} are no JSON object", param="messages")
    return {"name": function.name, "arguments": arguments}


class Function(Schema):
    name: FunctionName
    description: str | None = Field(None, description="What the model is told of it.")
    parameters: JsonSchema = Field(
        default_factory=lambda: {"type": "object", "properties": {}}, description="A JSON schema of its arguments; none if omitted."
    )
    strict: bool = Field(False, description="Calls fit `parameters`; with tool_choice 'required' or a name they do in any case.")


class Tool(Schema):
    type: Literal["function"]
    function: Function


class NamedFunction(Schema):
    name: FunctionName


class NamedTool(Schema):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True, description="The chat so far.")
    max_tokens: int | None = Field(None, ge=1, description="The rest of the context if omitted.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool = Field(False, description="Of each token.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Of so many best ones beside it; only with logprobs.")
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = Field(None, description="Answers are text.")
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True, description="For bases whose template has them.")
    tool_choice: Literal["none", "auto", "required"] | NamedTool = Field("auto", description="'none' shows the model no tools.")
    parallel_tool_calls: bool = Field(True, description="More than one call in an answer.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.tool_choice not in ("none", "auto") and not self.tools:
            _refuse("tool_choice", "is only for requests with tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in {tool.function.name for tool in self.tools}:
            _refuse("tool_choice", "names a function that is not among the tools")
        if len({tool.function.name for tool in self.tools}) < len(self.tools):
            _refuse("tools", "has two functions of one name")
        if self.shown_tools and self._wishes():
            _refuse("tools", "and a form of the answer cannot be had together; send tool_choice 'none', or leave the form out")
        if self.top_logprobs is not None and not self.logprobs:
            _refuse("top_logprobs", "is only for logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            _refuse("max_completion_tokens", "and max_tokens are two names of one limit, but differ; send one of them")
        return self

    @property
    def shown_tools(self) -> list[Tool]:
        """What the model may call."""
        return [] if self.tool_choice == "none" else self.tools

    def check_limits(self, settings: ServerSettings) -> None:
        super().check_limits(settings)
        _check_at_most("top_logprobs", self.top_logprobs or 0, settings.max_top_logprobs)


class TokenizeRequest(Schema):
    """Either a text or a chat. A text that is nothing but one control token is that token: how clients ask for its id."""

    expected: ClassVar[Mapping[str, str]] = {"prompt": "must be a string"}

    model: Name | None = Field(None, description="All have the base's tokenizer.")
    prompt: str | None = Field(None, description="A text.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = Field(
        None, description="A chat."
    )
    add_special_tokens: bool | None = Field(None, description="For a prompt: what the tokenizer puts around it (BOS); true if omitted.")
    add_generation_prompt: bool | None = Field(None, description="For a chat: what begins the answer; true if omitted.")
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True, description="For a chat.")
    return_token_strs: bool = Field(False, description="The tokens as text too.")
    moa: CompletionMoa = Field(CompletionMoa(), description="What only this server has.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            _refuse("prompt", "or messages must be given, one of the two")
        if self.prompt is not None and self.add_generation_prompt is not None:
            _refuse("add_generation_prompt", "is only for messages")
        if self.prompt is not None and self.tools:
            _refuse("tools", "is only for messages")
        if self.messages is not None and self.add_special_tokens is not None:
            _refuse("add_special_tokens", "is only for a prompt; a chat template writes its own")
        if self.messages is not None and self.moa.parse_special:
            _refuse("moa.parse_special", "is only for a prompt; in messages control tokens are always text")
        if self.moa.revision is not None:
            _refuse("moa.revision", "is not for this route: all adapters have the base's tokenizer")
        if self.moa.return_routing:
            _refuse("moa.return_routing", "is not for this route: nothing is computed here")
        for name in RoutingChoice.model_fields:
            if getattr(self.moa, name) not in (None, []):
                _refuse(f"moa.{name}", "is not for this route: nothing is computed here")
        return self


class PromptRoutingMoa(RoutingChoice):
    """Our extension."""

    revision: Revision | None = Field(None, description="The revision that must answer: its hex digits, all or the first 8 or more.")
    parse_special: ParseSpecial = False


MAX_MODELS = 16


class PromptRoutingRequest(Schema):
    """One prompt, a text, token ids or a chat, under one adapter or several."""

    expected: ClassVar[Mapping[str, str]] = {"prompt": "must be a string or a list of token ids (0 or more), which is not empty"}

    model: Name | None = Field(None, description="An adapter with a router.")
    models: Annotated[list[Name], Field(min_length=1, max_length=MAX_MODELS, fail_fast=True)] | None = Field(
        None, description="Several, each once; they share one batch."
    )
    prompt: str | TokenIds | None = Field(None, description="A text, or token ids.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = Field(
        None, description="A chat, by the template that the chat route takes for the adapter."
    )
    detail: Literal["summary", "tokens"] = Field("summary", description="What is told: means over the prompt, or each token as well.")
    user: str | None = Field(None, description="Where a model is an alias, the same user gets the same adapter each time.")
    moa: PromptRoutingMoa = Field(PromptRoutingMoa(), description="How the routers choose, for all the models.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.model is None) == (self.models is None):
            _refuse("model", "or models must be given, one of the two")
        if len(set(self.names)) < len(self.names):
            _refuse("models", "has one name twice")
        if (self.prompt is None) == (self.messages is None):
            _refuse("prompt", "or messages must be given, one of the two")
        if self.models is not None and self.moa.revision is not None:
            _refuse("moa.revision", "goes with model; models each answer with the revision that they have")
        if self.messages is not None and self.moa.parse_special:
            _refuse("moa.parse_special", "is only for a prompt; in messages control tokens are always text")
        return self

    @property
    def names(self) -> list[str]:
        return self.models or [self.model or ""]


class DetokenizeRequest(Schema):
    model: Name | None = Field(None, description="All have the base's tokenizer.")
    tokens: list[TokenId] = Field(max_length=2**20, fail_fast=True, description="Token ids.")


_Schema = TypeVar("_Schema", bound=BaseModel)


async def read_json(request: Request, schema: type[_Schema]) -> _Schema:
    """The body of a request.

    Only application/json: a web page of another origin may send any other type without being asked, and a server on loopback has no key.

    Raises:
        UnsupportedMediaType, InvalidJson, and what `parse` raises.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType("the body must be JSON and say so: Content-Type: application/json")
    return parse(schema, await request.body())


def parse(schema: type[_Schema], body: bytes) -> _Schema:
    """
    Raises:
        InvalidJson: not UTF-8, not JSON, NaN or infinity, nested too deep, a number too long, or no object.
        UnknownParameter, UnsupportedParameter, InvalidRequest: `param` names the field as `messages[0].content`.
    """
    try:
        # Decoded here, because json.loads would take UTF-16 and UTF-32 too.
        raw = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidJson(f"the body is not UTF-8: byte {error.start} cannot be decoded") from None
    except json.JSONDecodeError as error:
        raise InvalidJson(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, a constant, or a hundred thousand brackets
        raise InvalidJson("the body is not JSON that is served: NaN, infinity, a number too long, or nested too deep") from None
    if not isinstance(raw, dict):
        raise InvalidJson(f"the body must be a JSON object, not {_kind(raw)}")
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        expected = {**_EXPECTED, **(schema.expected if issubclass(schema, Schema) else {})}
        raise _as_error(error.errors(include_url=False), raw, expected) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


_EXPECTED = {
    "prompt": "must be a string, a list of strings, a list of token ids (0 or more), or a list of such lists; none of these lists empty",
    "stop": f"must be a string or a list of strings, each of 1 to {MAX_STOP_CHARS} characters",
    "content": "must be a string or a list of parts {'type': 'text', 'text': ...}; images, audio and files are not supported",
    "role": "must be 'system', 'user', 'assistant' or 'tool'",
    "include_obfuscation": "is not supported",
    "json": "must be a JSON schema, an object or its text",
    "guided_json": "must be a JSON schema, an object or its text",
    "tool_choice": "must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}",
    "modalities": "is not supported but for ['text']",
}
"""Said of fields where pydantic would list one finding for each form that a value may have."""

_PYDANTIC = re.compile("^(Input|String|List|Dictionary) should ")
_ONLY_NEUTRAL = frozenset({"include_obfuscation", "modalities"})


def _as_error(findings: list[ErrorDetails], raw: Mapping[str, Any], expected: Mapping[str, str]) -> InvalidRequest:
    """The first finding, in words that name the field as the client wrote it."""
    finding = findings[0]
    kind, place = finding["type"], finding["loc"]
    own = finding.get("ctx", {}).get("param")  # of several fields together, told by the object that they are in
    param = ".".join(filter(None, (_path(place, raw), own)))[:MAX_PARAM_CHARS] or None
    if any(item["type"] == "string_unicode" for item in findings):
        return InvalidRequest(f"{param or 'a name'} is not Unicode: it has a lone surrogate; send valid UTF-8", param=param)
    if kind == "extra_forbidden" and place[-1] not in _parts_of_content(place):
        if place[-1] in UNSUPPORTED:
            return UnsupportedParameter(f"{param} is not supported here", param=param)
        return UnknownParameter(f"{param!a} is not a parameter of this route", param=param)
    if kind == "unsupported":
        return UnsupportedParameter(f"{param} {finding['msg']}", param=param)
    if kind == "missing":
        return InvalidRequest(f"{param} is missing", param=param)
    for depth, name in enumerate(place):
        if name in expected:
            param = _path(place[: depth + 1], raw)
            error = UnsupportedParameter if name in _ONLY_NEUTRAL else InvalidRequest
            return error(f"{param} {expected[str(name)]}", param=param)
    if kind == "refused":
        return InvalidRequest(f"{param} {finding['msg']}", param=param)
    if kind in ("model_type", "dict_type"):
        return InvalidRequest(f"{param} must be an object", param=param)
    return InvalidRequest(f"{param} {_PYDANTIC.sub('must ', finding['msg'])}", param=param)


def _parts_of_content(place: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Inside `content` every finding is of the form of a part, an unknown name as well."""
    return place if "content" in place[:-1] else ()


def _path(place: tuple[int | str, ...], raw: Any) -> str:
    """`messages[0].content`; the names that pydantic gives to the branches of a union are in no request, and left out."""
    path = ""
    for part in place:
        if isinstance(part, int):
            path += f"[{part}]"
            raw = raw[part] if isinstance(raw, list) and part < len(raw) else None
        elif not isinstance(raw, dict) or (part not in raw and any(mark in part for mark in "[(")):
            continue
        else:
            path += f".{part}" if path else part
            raw = raw.get(part)
    return path


def _refuse(param: str, message: str) -> NoReturn:
    """From inside a schema: a finding of several fields together."""
    raise PydanticCustomError("refused", "{message}", {"param": param, "message": message})


def _check_at_most(param: str, value: int, limit: int, unit: str = "") -> None:
    if value > limit:
        raise InvalidRequest(f"{param} {'has' if unit else 'is'} {value}{unit and ' ' + unit}; at most {limit} are allowed", param=param)


@contextmanager
def named(param: str) -> Iterator[None]:
    """What is wrong with a guide is said of the field that it came from."""
    try:
        yield
    except InvalidRequest as error:
        error.param = param
        raise


def _bias(raw: Mapping[str, float]) -> dict[int, float]:
    """JSON's keys are strings."""
    for key in raw:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest(f"logit_bias has {key[:40]!a}, but its names are token ids", param="logit_bias")
    return {int(key): value for key, value in raw.items()}
