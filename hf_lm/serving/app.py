"""
The server of one model that is loaded already, by OpenAI's protocol.

A request is checked before it costs anything; what cannot be answered is refused with the field's name and a reason,
and nothing but the one model can be reached. How a conversation's answer is read (reasoning, tool calls) is
`transformers serve`'s.
"""

import asyncio
import hmac
import json
import uuid
from collections.abc import AsyncIterator
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.responses import JSONResponse, Response, StreamingResponse
from transformers import GenerationConfig
from transformers.cli.serving.utils import build_response_parser, get_response_template

from ..errors import one_line
from ..generation.prompts import context_limit, encode_prompt
from .answers import Answer, AnswerError, Chat, Completion
from .engine import Engine, Piece, Row, Text
from .protocol import BadRequest, ChatRequest, CompletionRequest, parse

MAX_BODY = 4 << 20  # bytes of a request: 128k tokens of most texts
DEFAULT_TOKENS = 1024  # of an answer, where the request names no number


def _characters(value) -> int:
    """Length of all strings in a JSON value."""
    if isinstance(value, dict | list):
        return sum(map(_characters, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 0


def refusal(status: int, message: str, field: str | None = None, headers: dict | None = None) -> Response:
    """An error as OpenAI's clients read it; in ASCII, because the message may quote what cannot be encoded."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": field, "code": status}
    return Response(json.dumps({"error": error}), status, headers, media_type="application/json")


class _BodyLimit(RequestBodyLimitMiddleware):
    """As starlette's, but the answer names the limit."""

    async def __call__(self, scope, receive, send):
        size = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if not (size.isdigit() and int(size) > self.max_body_size):
            return await super().__call__(scope, receive, send)
        return await refusal(413, f"{size} bytes; a request has at most {self.max_body_size}.")(scope, receive, send)


class _ApiKey:
    """Let requests through that carry the key; `/health` needs none."""

    def __init__(self, app, key: str):
        self.app, self.expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["path"] != "/health":
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self.expected):
                answer = refusal(401, "the API key is missing or wrong.", headers={"WWW-Authenticate": "Bearer"})
                return await answer(scope, receive, send)
        return await self.app(scope, receive, send)


class _Server:
    """Requests made into rows of the engine, and their pieces into answers."""

    def __init__(self, name: str, model, tokenizer):
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.engine = Engine(model)
        self.vocab_size = model.config.get_text_config().vocab_size
        self.limit = context_limit(model) or MAX_BODY  # tokens
        self.longest_token = max(map(len, tokenizer.get_vocab()))  # characters
        self.grammar_tokenizer = None
        # the parser goes by the model's family; a model of another family may use the same template (Qwen's, Hermes')
        self.family = model
        if get_response_template(tokenizer, model) is None and "<tool_call>" in str(tokenizer.chat_template):
            self.family = SimpleNamespace(config=SimpleNamespace(model_type="qwen2"))

    def check_model(self, name) -> None:
        if name != self.name:
            raise BadRequest("model", f"only {self.name!r} is served.", 404)

    # ----- prompts -----

    def check_length(self, field: str, characters: int) -> None:
        """Before the text is made into tokens, which takes time."""
        if characters > self.limit * self.longest_token:
            raise BadRequest(field, f"{characters} characters; the model takes {self.limit} tokens.")

    def encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self.check_length("prompt", len(prompt))
            return encode_prompt(self.tokenizer, prompt)
        if max(prompt) >= self.vocab_size:
            raise BadRequest("prompt", f"token ids go from 0 to {self.vocab_size - 1}.")
        return prompt

    def render(self, request: ChatRequest) -> list[int]:
        if not self.tokenizer.chat_template:
            raise BadRequest("messages", "the model has no chat template; use /v1/completions.")
        self.check_length("messages", _characters(request.model_dump(include={"messages"})))
        tools, field = request.tools_for_template, "messages"
        try:
            messages = [message.for_template() for message in request.messages]
            render = partial(
                self.tokenizer.apply_chat_template,
                messages,
                add_generation_prompt=True,
                tokenize=False,
                **request.chat_template_kwargs,
            )
            text = render()
            if tools:
                field = "tools"
                without, text = text, render(tools=tools)
                if text == without:
                    raise BadRequest("tools", "the model's chat template does not take tools.")
                if not request.must_call and get_response_template(self.tokenizer, self.family) is None:
                    raise BadRequest("tools", "calls of this model can only be read with tool_choice required.")
            self.check_length("messages", len(text))
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except BadRequest:
            raise
        except Exception as error:  # the template is a program that came with the model
            raise BadRequest(field, one_line(error)) from error

    # ----- settings -----

    def config(self, request: CompletionRequest | ChatRequest) -> GenerationConfig:
        config = deepcopy(self.engine.defaults)
        given = request.generation_config.model_dump(exclude_none=True) if request.generation_config else {}
        given |= request.model_dump(include={"temperature", "top_p"}, exclude_none=True)
        config.update(**given)
        if request.temperature or (request.temperature is None and request.top_p is not None):
            config.do_sample = True
        if config.temperature is not None and config.temperature < 1e-3:  # logits would leave the range of a float
            config.do_sample = False
        if not config.do_sample:
            config.temperature = config.top_p = config.min_p = config.top_k = None
        bias = request.logit_bias
        if any(not (token.isascii() and token.isdigit() and int(token) < self.vocab_size) for token in bias):
            raise BadRequest("logit_bias", f"token ids go from 0 to {self.vocab_size - 1}.")
        config.sequence_bias = {(int(token),): value for token, value in bias.items()} or None
        config.pad_token_id = config.pad_token_id or 0
        return config

    def matcher(self, schema: dict | None, field: str):
        """The grammar that keeps an answer to a JSON schema."""
        if schema is None:
            return None
        import llguidance.hf

        try:
            if self.grammar_tokenizer is None:
                ends = self.model.generation_config.eos_token_id
                size = max(self.vocab_size, len(self.tokenizer))
                self.grammar_tokenizer = llguidance.hf.from_tokenizer(self.tokenizer, size, ends)
            space = {"whitespace_pattern": r"[ \n\t]{1,20}"}  # without an end a model might write nothing else
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=space)
        except Exception as error:
            raise BadRequest(field, one_line(error)) from error
        matcher = llguidance.LLMatcher(self.grammar_tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise BadRequest(field, f"the JSON schema cannot be followed: {reason}")
        return matcher

    # ----- answers -----

    def answer(
        self, kind: str, request, prompts: list[list[int]], field: str, limit: int | None, choices: list, **settings
    ) -> tuple[Answer, bool]:
        """
        Hand rows to the engine, `n` for each prompt; return the answer that their pieces make, and whether to stream it.

        Args:
            field: where the prompts come from, for the error.
            limit: new tokens of a row; None: as many as the request's `generation_config` says, or `DEFAULT_TOKENS`.
            choices: one for each row.
            settings: of each `Row`; and `skip_special_tokens`, `echo`.
        """
        for ids in prompts:
            if not ids or self.limit - len(ids) < (limit != 0):
                raise BadRequest(field, f"{len(ids)} tokens; the model takes from 1 to {self.limit - 1}.")
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def emit(index: int, piece: Piece) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (index, piece))

        config = self.config(request)
        if limit is None:
            limit = config.max_new_tokens if request.generation_config and config.max_new_tokens else DEFAULT_TOKENS
        skip, echo = settings.pop("skip_special_tokens", True), settings.pop("echo", False)
        matcher = settings.pop("matcher", None)
        rows = [
            Row(
                ids,
                deepcopy(config),
                min(limit, self.limit - len(ids)),
                Text(self.tokenizer, request.stops, skip),
                partial(emit, number * request.n + copy),
                seed=None if request.seed is None else (request.seed + copy) % (1 << 63),
                penalties=(request.frequency_penalty, request.presence_penalty),
                prompt_text=Text(self.tokenizer) if echo and settings["top"] is not None else None,
                matcher=matcher and matcher.deep_copy(),
                **settings,
            )
            for number, ids in enumerate(prompts)
            for copy in range(request.n)
        ]
        usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": 0, "total_tokens": 0}
        include_usage = bool(request.stream_options and request.stream_options.include_usage)
        name = f"{'cmpl' if kind == 'text_completion' else 'chatcmpl'}-{uuid.uuid4().hex}"
        pieces = self.pieces(rows, queue, usage)
        return Answer(name, self.name, kind, choices, pieces, usage, include_usage), request.stream

    async def pieces(self, rows: list[Row], queue: asyncio.Queue, usage: dict) -> AsyncIterator[tuple[int, Piece]]:
        """What the engine's thread hands in. Answers nobody waits for any more are given up."""
        try:
            self.engine.submit(rows)
            left = len(rows)
            while left:
                index, piece = await queue.get()
                left -= piece.finish is not None
                if isinstance(piece.finish, Exception):
                    raise AnswerError(f"{type(piece.finish).__name__}: {one_line(piece.finish)}") from piece.finish
                usage["completion_tokens"] = sum(len(row.new) for row in rows)
                usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
                yield index, piece
        finally:
            for row in rows:
                row.finished = True

    def complete(self, body: dict) -> tuple[Answer, bool]:
        request = parse(CompletionRequest, body)
        if request.model is not None:
            self.check_model(request.model)
        prompts = [self.encode(prompt) for prompt in request.prompts]
        texts = [one if isinstance(one, str) else self.tokenizer.decode(one) for one in request.prompts]
        scores, echo = request.logprobs is not None, request.echo
        choices = [
            Completion(self.tokenizer, i, scores, echo=texts[i // request.n] if echo else "")
            for i in range(len(prompts) * request.n)
        ]
        settings = {"top": request.logprobs, "echo": echo}
        return self.answer("text_completion", request, prompts, "prompt", request.max_tokens, choices, **settings)

    def chat(self, body: dict) -> tuple[Answer, bool]:
        request = parse(ChatRequest, body)
        if request.model is not None:
            self.check_model(request.model)
        ids, tools, call = self.render(request), request.tools_for_template, uuid.uuid4().hex[:12]
        reads_text = request.schema is None and get_response_template(self.tokenizer, self.family) is not None
        choices = []
        for index in range(request.n):
            parser = build_response_parser(self.tokenizer, self.family, ids, tools=tools) if reads_text else None
            calls = {"must_call": request.must_call, "parallel": request.parallel_tool_calls}
            choices.append(Chat(self.tokenizer, index, request.logprobs, f"call-{call}-{index}", parser, **calls))
        settings = {
            "top": request.top_logprobs if request.logprobs else None,
            "matcher": self.matcher(request.schema, "tools" if request.must_call else "response_format"),
            "skip_special_tokens": not reads_text,
        }
        limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        return self.answer("chat.completion", request, [ids], "messages", limit, choices, **settings)


async def _until_gone(request: Request, work: asyncio.Task) -> None:
    """Cancel the work when the client has gone."""
    while not work.done():
        if (await request.receive())["type"] == "http.disconnect":
            work.cancel()
            return


async def respond(answer: Answer, stream: bool, request: Request) -> Response:
    if stream:
        return StreamingResponse(answer.stream(), media_type="text/event-stream")
    work = asyncio.ensure_future(answer.whole())
    watch = asyncio.ensure_future(_until_gone(request, work))
    try:
        return JSONResponse(await work)
    except AnswerError as error:
        return refusal(500, str(error))
    except asyncio.CancelledError:
        return refusal(499, "the client has gone.")
    finally:
        watch.cancel()
        work.cancel()


def build_app(name: str, model, tokenizer, api_key: str | None = None) -> FastAPI:
    """
    The server of one model: `/v1/chat/completions`, `/v1/completions`, `/v1/models` and `/health`.

    Args:
        name: the model's name in requests.
        api_key: what clients must send; None: everybody is answered.
    """
    server = _Server(name, model, tokenizer)
    app = FastAPI(openapi_url=None)

    @app.post("/v1/completions")
    async def complete(request: Request, body: dict) -> Response:
        return await respond(*server.complete(body), request)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: dict) -> Response:
        return await respond(*server.chat(body), request)

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "hf-lm"}]}

    @app.get("/health")
    def health() -> dict:
        return {"status": "ok"}

    @app.post("/load_model")
    def load_model(body: dict) -> Response:  # `transformers chat` asks for it first
        server.check_model(body.get("model"))
        return Response('data: {"status": "ready", "cached": true}\n\n', media_type="text/event-stream")

    app.add_middleware(_BodyLimit, max_body_size=MAX_BODY)
    if api_key:
        app.add_middleware(_ApiKey, key=api_key)

    @app.exception_handler(BadRequest)
    async def refuse_request(request, error: BadRequest) -> Response:
        return refusal(error.status, str(error), error.field)

    @app.exception_handler(AnyHTTPException)
    async def refuse(request, error: AnyHTTPException) -> Response:
        return refusal(error.status_code, error.detail)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return refusal(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    return app
