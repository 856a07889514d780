"""Answers as OpenAI's clients read them, streamed or whole."""

import contextlib
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks
from transformers.utils.chat_parsing import ResponseParser

from ..evaluation.sentences import token_texts
from .engine import Piece, Scored


class AnswerError(Exception):
    """The model failed while it answered."""


def _bytes_of(text: str) -> list[int]:
    """The bytes of a token as `token_texts` writes it: part of a character as `<0xE6><0x96>`."""
    if re.fullmatch(r"(<0x[0-9A-F]{2}>)+", text):
        return list(bytes.fromhex(re.sub("<0x|>", "", text)))
    return list(text.encode())


@dataclass
class Choice:
    """One of a request's answers, as chunks of a stream and as a whole. `scores`: log-probabilities are wanted."""

    tokenizer: object
    index: int
    scores: bool = False
    scored: list[Scored] = field(default_factory=list, init=False)
    finish: str | None = field(default=None, init=False)

    def token_texts(self, scored: list[Scored]) -> dict[int, str]:
        ids = list({token for one in scored for token in (one.token, *(other for other, _ in one.likeliest))})
        return dict(zip(ids, token_texts(self.tokenizer, ids), strict=True))


@dataclass
class Completion(Choice):
    """One choice of a text completion. `echo` is the prompt where it is wanted in front of the answer."""

    echo: str = ""
    text: str = field(default="", init=False)

    def logprobs(self, scored: list[Scored]) -> dict | None:
        if not self.scores:
            return None
        texts = self.token_texts(scored)
        return {
            "tokens": [texts[one.token] for one in scored],
            "token_logprobs": [one.log_probability for one in scored],
            "text_offset": [one.start for one in scored],
            "top_logprobs": [
                None
                if one.log_probability is None
                else {texts[token]: value for token, value in [*one.likeliest, (one.token, one.log_probability)]}
                for one in scored
            ],
        }

    def chunk(self, text: str, scored: list[Scored], finish: str | None = None) -> dict:
        return {"index": self.index, "text": text, "logprobs": self.logprobs(scored), "finish_reason": finish}

    def begin(self) -> list[dict]:
        return [self.chunk(self.echo, [])] if self.echo else []

    def add(self, piece: Piece) -> list[dict]:
        """The stream's next choices."""
        self.text += piece.text
        self.scored += piece.scored
        self.finish = piece.finish
        return [self.chunk(piece.text, piece.scored, piece.finish)]

    def whole(self) -> dict:
        return self.chunk(self.echo + self.text, self.scored, self.finish)


@dataclass
class Chat(Choice):
    """
    One choice of a chat completion.

    Args:
        parser: of the text of the model's family, where there is one: reasoning and tool calls apart from the content.
        must_call: the whole answer is one tool call in JSON.
        parallel: more than one tool call may be answered.
    """

    call_id: str = "call"
    parser: ResponseParser | None = None
    must_call: bool = False
    parallel: bool = True
    content: str = field(default="", init=False)
    reasoning: str = field(default="", init=False)
    calls: list[dict] = field(default_factory=list, init=False)
    raw: str = field(default="", init=False)

    def logprobs(self, scored: list[Scored]) -> dict | None:
        if not self.scores:
            return None
        texts = self.token_texts(scored)

        def entry(token: int, value: float) -> dict:
            return {"token": texts[token], "logprob": value, "bytes": _bytes_of(texts[token])}

        content = [
            {**entry(one.token, one.log_probability), "top_logprobs": [entry(*other) for other in one.likeliest]}
            for one in scored
        ]
        return {"content": content, "refusal": None}

    def chunk(self, delta: dict, finish: str | None = None) -> dict:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def begin(self) -> list[dict]:
        events = response_events_to_chunks(self.parser.initial_events) if self.parser else []
        return [self.chunk({"role": "assistant", "content": ""}), *map(self.chunk, self._deltas(events))]

    def _deltas(self, parts: list[str | ToolCall]) -> list[dict]:
        deltas = []
        for part in parts:
            if isinstance(part, ToolCall):
                if self.calls and not self.parallel:
                    continue
                number = len(self.calls)
                function = {"name": part.name, "arguments": part.arguments}
                self.calls.append({"id": f"{self.call_id}-{number}", "type": "function", "function": function})
                deltas.append({"tool_calls": [{"index": number, **self.calls[-1]}]})
            elif isinstance(part, ReasoningText):
                self.reasoning += part
                deltas.append({"reasoning_content": str(part)})
            elif part:
                self.content += part
                deltas.append({"content": part})
        return deltas

    def _parts(self, piece: Piece) -> list[str | ToolCall]:
        """Text, reasoning and tool calls that a piece completes."""
        if self.must_call:
            self.raw += piece.text
            return [self._call()] if piece.finish else []
        if self.parser is None:
            return [piece.text]
        events = self.parser.feed(piece.text)
        if piece.finish:
            with contextlib.suppress(ValueError, RuntimeError):  # it ends within a tool call
                events += self.parser.finalize()[1]
        return response_events_to_chunks(events)

    def add(self, piece: Piece) -> list[dict]:
        """The stream's next choices."""
        chunks = [self.chunk(delta) for delta in self._deltas(self._parts(piece))]
        if piece.scored:
            self.scored += piece.scored
            chunks = chunks or [self.chunk({})]
            chunks[-1]["logprobs"] = self.logprobs(piece.scored)
        if piece.finish:
            self.finish = "tool_calls" if self.calls else piece.finish
            chunks.append(self.chunk({}, self.finish))
        return chunks

    def _call(self) -> str | ToolCall:
        """The tool call that the answer is; its text where it is not complete."""
        try:
            call = json.loads(self.raw)
        except ValueError:
            return self.raw
        return ToolCall(call["name"], json.dumps(call["arguments"], ensure_ascii=False))

    def whole(self) -> dict:
        message = {"role": "assistant", "content": self.content if self.content or not self.calls else None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        logprobs = self.logprobs(self.scored)
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish}


@dataclass
class Answer:
    """All choices of a request, as their pieces come."""

    id: str
    model: str
    kind: str
    choices: list[Completion] | list[Chat]
    pieces: AsyncIterator[tuple[int, Piece]]
    usage: dict
    include_usage: bool = False

    def body(self, kind: str, choices: list[dict], **fields) -> dict:
        return {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "choices": choices,
            **fields,
        }

    async def whole(self) -> dict:
        for choice in self.choices:
            choice.begin()
        async for index, piece in self.pieces:
            self.choices[index].add(piece)
        return self.body(self.kind, [choice.whole() for choice in self.choices], usage=self.usage)

    async def stream(self) -> AsyncIterator[str]:
        kind = self.kind if self.kind == "text_completion" else f"{self.kind}.chunk"
        usage = {"usage": None} if self.include_usage else {}

        def event(choices: list[dict], **fields) -> str:
            return f"data: {json.dumps(self.body(kind, choices, **(usage | fields)))}\n\n"

        for choice in self.choices:
            for chunk in choice.begin():
                yield event([chunk])
        try:
            async for index, piece in self.pieces:
                for chunk in self.choices[index].add(piece):
                    yield event([chunk])
        except AnswerError as error:
            refusal = {"message": str(error), "type": "server_error", "param": None, "code": 500}
            yield f"data: {json.dumps({'error': refusal})}\n\n"
            return
        if self.include_usage:
            yield event([], usage=self.usage)
        yield "data: [DONE]\n\n"
