"""
Upstream's OpenAI-compatible server (`transformers serve`) for one model that is loaded already.

Upstream loads any model a request names, hands the client's settings to the library as they come, and answers what
they break with a bare 500. Here a request is checked first: what cannot be answered is refused with a reason, as far
as possible before it costs anything, and nothing but the one model can be reached. Answers are made one after the
other; the text of all streams goes out as it comes.
"""

import json
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.responses import Response
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from .evaluation.conversation import context_limit

MAX_BODY = 4 << 20  # bytes of a request: 128k tokens of most texts
PATHS = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"}
# arguments of apply_chat_template itself that bring a template of one's own, or padding to any length
RESERVED = {"chat_template", "max_length", "padding", "tokenizer_kwargs", "truncation"}
Count, Share = Annotated[int, Field(ge=1, lt=1 << 31)] | None, Annotated[float, Field(gt=0, le=1)] | None
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class _Settings(BaseModel):
    """Settings of a request, and all that its `generation_config` may hold."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    do_sample: bool | None = None
    max_tokens: Count = None
    max_completion_tokens: Count = None
    max_new_tokens: Count = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Share = None
    min_p: Share = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    suffix: str | None = None
    n: Literal[1] | None = None  # upstream would ignore these two
    logprobs: Literal[False] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    transformers_version: str | None = None


class _Request(_Settings):
    model_config = ConfigDict(extra="allow")
    generation_config: Json[_Settings] | None = None  # `transformers chat` sends it


class _Checked:
    """What stands in front of upstream's handlers. `prompt` is the field that holds the prompt."""

    prompt = "prompt"

    async def handle_request(self, body: dict, request_id: str) -> Response:
        try:
            return await super().handle_request(body, request_id)
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError, TemplateError) as error:
            raise HTTPException(400, f"{type(error).__name__}: {error}") from error

    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)
        try:
            _Request.model_validate(body)
        except ValidationError as error:
            raise HTTPException(422, _first(error)) from error
        manager, prompt = self.model_manager, body.get(self.prompt)
        if body.get("model") is not None:
            manager.process_model_name(body["model"])
        if not isinstance(prompt, list if self.prompt == "messages" else str):
            raise HTTPException(422, f"{self.prompt}: is missing, or not of the right kind.")
        if self.prompt == "messages" and not manager.tokenizer.chat_template:
            raise HTTPException(400, "messages: the model has no chat template; use /v1/completions.")
        if RESERVED & dict(body.get("chat_template_kwargs") or {}).keys():
            raise HTTPException(400, f"chat_template_kwargs: cannot set {', '.join(sorted(RESERVED))}.")
        if (length := _characters(prompt)) > manager.limit * manager.longest_token:
            raise HTTPException(400, f"{self.prompt}: {length} characters; the model takes {manager.limit} tokens.")

    def _build_generation_config(self, body: dict, *args, **kwargs):
        config = super()._build_generation_config(body, *args, **kwargs)
        if body.get("temperature"):
            config.do_sample = True
        if config.temperature is not None and config.temperature < 1e-3:  # logits would leave the range of a float
            config.do_sample = False
        bias = {(int(token),): float(value) for token, value in (body.get("logit_bias") or {}).items()}
        if any(not 0 <= token < self.model_manager.vocab_size for (token,) in bias):
            raise HTTPException(400, f"logit_bias: token ids go from 0 to {self.model_manager.vocab_size - 1}.")
        config.sequence_bias = bias or None
        return config

    def _fit(self, request_id, model, processor, model_id, inputs, config, *args, **kwargs) -> None:
        count, limit = inputs["input_ids"].shape[-1], self.model_manager.limit
        if not 0 < count < limit:
            raise HTTPException(400, f"{self.prompt}: {count} tokens; the model takes from 1 to {limit - 1}.")
        config.max_new_tokens = min(config.max_new_tokens or 1024, limit - count)

    def _streaming(self, *args, **kwargs):
        self._fit(*args, **kwargs)
        return super()._streaming(*args, **kwargs)

    async def _non_streaming(self, *args, **kwargs):
        self._fit(*args, **kwargs)
        return await super()._non_streaming(*args, **kwargs)


class _Completion(_Checked, CompletionHandler):
    pass


class _Chat(_Checked, ChatCompletionHandler):
    prompt = "messages"


class _OneModel(ModelManager):
    """Whatever is asked for, this model is what there is."""

    def __init__(self, name: str, model, tokenizer):
        super().__init__()
        self.force_model, self.model, self.tokenizer = name, model, tokenizer
        self.vocab_size = model.config.get_text_config().vocab_size
        self.limit = context_limit(model) or MAX_BODY  # tokens
        self.longest_token = max(map(len, tokenizer.get_vocab()))  # characters

    def process_model_name(self, name: str) -> str:
        if name != self.force_model:
            raise HTTPException(404, f"model: only {self.force_model!r} is served.")
        return name

    def load_model_and_processor(self, *args, **kwargs) -> tuple:
        return self.model, self.tokenizer

    def get_gen_models(self) -> list[dict]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "hf-lm"}]


class _BodyLimit(RequestBodyLimitMiddleware):
    """As the library's, but the answer names the limit."""

    async def __call__(self, scope, receive, send):
        size = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if not (size.isdigit() and int(size) > self.max_body_size):
            return await super().__call__(scope, receive, send)
        return await _refusal(413, f"{size} bytes; a request has at most {self.max_body_size}.")(scope, receive, send)


def _characters(value: Any) -> int:
    """Length of all strings in a JSON value."""
    if isinstance(value, dict | list):
        return sum(map(_characters, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 0


def _first(error: ValidationError | RequestValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _refusal(status: int, message: str) -> Response:
    """An error as OpenAI's clients read it; in ASCII, for the message may quote what cannot be encoded."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return Response(json.dumps({"error": error}), status, media_type="application/json")


def build_app(name: str, model, tokenizer) -> FastAPI:
    """
    The server of one model: `/v1/chat/completions`, `/v1/completions`, `/v1/models` and `/health`.

    Args:
        name: the model's name in requests.
    """
    manager, state = _OneModel(name, model, tokenizer), GenerationState()
    handlers = (handler(manager, state) for handler in (_Chat, _Completion))
    app = build_server(manager, *handlers, None, None, None, generation_state=state)
    app.router.routes = [route for route in app.routes if getattr(route, "path", None) in PATHS]

    @app.post("/load_model")
    def load_model(body: dict) -> Response:  # `transformers chat` asks for it first
        manager.process_model_name(body.get("model"))
        return Response('data: {"status": "ready", "cached": true}\n\n', media_type="text/event-stream")

    app.add_middleware(_BodyLimit, max_body_size=MAX_BODY)

    @app.exception_handler(AnyHTTPException)
    async def refuse(request, error: AnyHTTPException) -> Response:
        return _refusal(error.status_code, error.detail)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request, error: RequestValidationError) -> Response:
        return _refusal(422, _first(error))

    return app
