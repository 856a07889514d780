"""
The requests of OpenAI's protocol, completions and chat: which fields are honoured, and what they may hold.

Every field of the protocol is in one of three places: a field of `CompletionRequest` or `ChatRequest` (honoured),
`LABELS` (names of users and caches, which by the protocol change no answer) or `REFUSED` (answered with 400 and the
field's name, unless the value asks for what the server does anyway).
"""

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError, model_validator

from ..errors import one_line

MAX_ANSWERS = 128  # of one request: prompts times n
LABELS = {"prompt_cache_key", "safety_identifier", "user"}
# field: (what would be honoured, values that ask for nothing)
REFUSED: dict[str, tuple[str, tuple]] = {
    "audio": ("the model writes text only", ()),
    "best_of": ("ask for n answers and choose", (1,)),
    "function_call": ("use tool_choice", ("none",)),
    "functions": ("use tools", ([],)),
    "metadata": ("the server stores nothing", ({},)),
    "modalities": ("the model writes text only", (["text"],)),
    "moderation": ("the server moderates nothing", ()),
    "prediction": ("the server takes no predicted text", ()),
    "prompt_cache_options": ("the server keeps no cache between requests", ()),
    "prompt_cache_retention": ("the server keeps no cache between requests", ()),
    "reasoning_effort": ("use chat_template_kwargs if the template knows it", ()),
    "service_tier": ("there is one tier", ("auto", "default")),
    "store": ("the server stores nothing", (False,)),
    "suffix": ("the model continues text, it does not fill gaps", ("",)),
    "verbosity": ("ask for it in a message", ("medium",)),
    "web_search_options": ("the server does not search", ()),
}
# arguments of apply_chat_template itself that bring a template of one's own, or padding to any length
RESERVED = {"add_generation_prompt", "chat_template", "max_length", "padding", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation"}  # fmt: skip

Count, Share = Annotated[int, Field(ge=1, lt=1 << 31)], Annotated[float, Field(gt=0, le=1)]
Penalty, Seed = Annotated[float, Field(ge=-2, le=2)], Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class BadRequest(Exception):
    """The request cannot be answered as it is; `field` is the one to blame."""

    def __init__(self, field: str | None, reason: str, status: int = 400):
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field, self.status = field and field.partition(".")[0], status


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Named(_Strict):
    name: str


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationSettings(_Strict):
    """What a request's `generation_config` may hold."""

    do_sample: bool | None = None
    max_new_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    transformers_version: str | None = None


class _Request(_Strict):
    """Fields that both kinds of requests have."""

    model: Any = None
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Share | None = None
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] = {}
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    stream: bool = False
    stream_options: _StreamOptions | None = None
    generation_config: Json[GenerationSettings] | None = None  # `transformers chat` sends it

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.stream_options and not self.stream:
            raise BadRequest("stream_options", "only with stream.")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionRequest(_Request):
    prompt: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1, max_length=MAX_ANSWERS)]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @model_validator(mode="after")
    def check_length(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise BadRequest("max_tokens", "must be at least 1, or at least 0 with echo.")
        if self.n * len(self.prompts) > MAX_ANSWERS:
            raise BadRequest("n", f"{self.n} answers to {len(self.prompts)} prompts; at most {MAX_ANSWERS} in all.")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _FunctionCall(_Named):
    arguments: str | dict


class _ToolCall(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _FunctionCall


class _Message(_Strict):
    role: str
    content: str | list[_TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict:
        """As chat templates read it: content as one text, the arguments of calls as mappings."""
        message = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            message["content"] = " ".join(part.text for part in self.content)
        if self.role == "developer":  # OpenAI's later name of it
            message["role"] = "system"
        for call in message.get("tool_calls", []):
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        return {"content": "", **message}


class _Function(_Named):
    description: str | None = None
    parameters: dict | None = None
    strict: bool | None = None


class _Tool(_Strict):
    type: Literal["function"]
    function: _Function


class _Choice(_Strict):
    type: Literal["function"]
    function: _Named


class _Schema(_Named):
    description: str | None = None
    json_schema: dict = Field({"type": "object"}, alias="schema")
    strict: bool | None = None


class _Format(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None


class ChatRequest(_Request):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    response_format: _Format | None = None
    tools: list[_Tool] = []
    tool_choice: Literal["none", "auto", "required"] | _Choice | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict = {}

    @model_validator(mode="after")
    def check_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs", "only with logprobs.")
        if RESERVED & self.chat_template_kwargs.keys():
            raise BadRequest("chat_template_kwargs", f"cannot set {', '.join(sorted(RESERVED))}.")
        if self.response_format and (self.response_format.type == "json_schema") != bool(
            self.response_format.json_schema
        ):
            raise BadRequest("response_format", "json_schema belongs to the type json_schema.")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise BadRequest("tool_choice", "only with tools.")
        if isinstance(self.tool_choice, _Choice) and not self.callable_tools:
            raise BadRequest("tool_choice", f"there is no tool {self.tool_choice.function.name!r}.")
        if self.uses_tools and self.schema is not None and not self.must_call:
            raise BadRequest("response_format", "not together with tools.")
        if self.uses_tools and not self.must_call and any(tool.function.strict for tool in self.tools):
            raise BadRequest("tools", "strict is kept only where tool_choice demands a call.")
        return self

    @property
    def uses_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def must_call(self) -> bool:
        return self.uses_tools and self.tool_choice not in (None, "auto")

    @property
    def tools_for_template(self) -> list[dict] | None:
        return [tool.model_dump(exclude_none=True) for tool in self.tools] if self.uses_tools else None

    @property
    def callable_tools(self) -> list[_Tool]:
        if isinstance(self.tool_choice, _Choice):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools

    @property
    def schema(self) -> dict | None:
        """JSON schema that the answer must follow, or None."""
        if self.must_call:
            calls = [
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": tool.function.name},
                        "arguments": tool.function.parameters or {"type": "object"},
                    },
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
                for tool in self.callable_tools
            ]
            return calls[0] if len(calls) == 1 else {"anyOf": calls}
        if self.response_format is None or self.response_format.type == "text":
            return None
        return self.response_format.json_schema.json_schema if self.response_format.json_schema else {"type": "object"}


Kind = TypeVar("Kind", CompletionRequest, ChatRequest)


def parse(kind: type[Kind], body: dict) -> Kind:
    """
    The request in a body. A field that is null is as if it were absent.

    Raises:
        BadRequest: a field is unknown, not supported, or holds what it cannot hold.
    """
    body = {field: value for field, value in body.items() if value is not None}
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise BadRequest(None, f"the body cannot be read as text: {one_line(error)}") from error
    for field in list(body):
        if field in LABELS:
            if not isinstance(body.pop(field), str):
                raise BadRequest(field, "must be a string.")
        elif field in REFUSED and field not in kind.model_fields:
            reason, neutral = REFUSED[field]
            if body.pop(field) not in neutral:
                raise BadRequest(field, f"is not supported; {reason}.")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequest(".".join(map(str, first["loc"])), first["msg"]) from error
