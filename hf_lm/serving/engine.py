"""
Answers in the making, computed together: requests that wait join the batch that runs.

transformers' continuous batching is not used: its requests share one generation config, and it has no stop strings,
penalties, grammars, seeds or log-probabilities of one request. Here `generate()` runs a batch padded on the left, and
a logits processor chooses each row's token by that row's own settings.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..generation.decoding import generate_batch, pad_token, stop_tokens

MAX_ROWS = 64  # of a batch
MAX_BATCH_TOKENS = 1 << 17  # rows times the longest, the answer included; a single row may have more
MIN_STEPS = 8  # of a batch before others join it


@dataclass
class Scored:
    """A token with its log-probability (None: nothing stands before it) and the most likely tokens at its place."""

    token: int
    start: int  # character of the text at which it begins
    log_probability: float | None = None
    likeliest: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Piece:
    """What an answer has grown by. The last one says why it ended: `stop`, `length`, or the exception."""

    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    finish: str | Exception | None = None


class Text:
    """
    The text of tokens as they come. Characters that are not complete yet, or may be the start of a stop string, are
    held back; the text ends before the first stop string.
    """

    def __init__(self, tokenizer, stops: list[str] = (), skip_special_tokens: bool = True):
        self.tokenizer, self.stops, self.skip = tokenizer, stops, skip_special_tokens
        self.ids: list[int] = []
        self.start = self.read = 0  # tokens [start, read) are decoded; what comes next is decoded along with them
        self.length = self.released = 0  # characters
        self.held = ""
        self.stopped = False

    def _decode(self, end: int | None = None) -> str:
        return self.tokenizer.decode(self.ids[self.start : end], skip_special_tokens=self.skip)

    def add(self, token: int | None) -> str:
        """The text that is released by one more token; by None, at the end, all that is left."""
        if token is not None:
            self.ids.append(token)
        before, text = self._decode(self.read), self._decode()
        # a character has at most four bytes: after that the bytes are no text
        if token is None or not text.endswith("\ufffd") or len(self.ids) - self.read > 4:
            self.held += text[len(before) :]
            self.length += len(text) - len(before)
            self.start, self.read = self.read, len(self.ids)
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if found:
            self.stopped, end = True, min(found)
        else:
            lengths = (n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n]))
            end = len(self.held) - (0 if token is None else max(lengths, default=0))
        released, self.held = self.held[:end], "" if self.stopped else self.held[end:]
        self.released += end
        return released


class _Penalties(LogitsProcessor):
    """OpenAI's frequency and presence penalty: of the tokens of the answer so far."""

    def __init__(self, row: "Row", frequency: float, presence: float):
        self.row, self.frequency, self.presence = row, frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = Counter(self.row.new)
        cost = [self.frequency * count + self.presence for count in counts.values()]
        scores = scores.clone()
        scores[:, list(counts)] -= torch.tensor(cost, device=scores.device, dtype=scores.dtype)
        return scores


@dataclass(eq=False)
class Row:
    """
    One answer in the making.

    Args:
        prompt: tokens.
        config: how tokens are chosen.
        limit: new tokens at most.
        text: of the answer.
        emit: called with each `Piece`, from the engine's thread.
        seed: the same seed gives the same answer.
        top: number of the most likely tokens returned with each; None: no log-probabilities at all.
        prompt_text: where the prompt's log-probabilities are wanted, too: an empty `Text`.
        matcher: the grammar that the answer follows, an `LLMatcher`.
        penalties: of frequency and presence.
    """

    prompt: list[int]
    config: GenerationConfig
    limit: int
    text: Text
    emit: Callable[[Piece], None]
    seed: int | None = None
    top: int | None = None
    prompt_text: Text | None = None
    matcher: object = None
    penalties: tuple[float, float] = (0.0, 0.0)
    new: list[int] = field(default_factory=list)
    finished: bool = False
    processors: LogitsProcessorList | None = None

    def start(self, model: nn.Module) -> None:
        """What its first step needs. On the engine's thread: it may take as long as a forward."""
        self.generator = torch.Generator(model.device)
        self.generator.seed() if self.seed is None else self.generator.manual_seed(self.seed)
        self.ends = stop_tokens(self.config)
        self.processors = self._build_processors(model) if self.limit else LogitsProcessorList()
        if any(self.penalties):
            self.processors.insert(0, _Penalties(self, *self.penalties))
        self.waiting: list[Scored] = []  # until their text is released
        self.offset = 0  # of the answer in the text: characters of the prompt
        if self.prompt_text is not None:
            self.emit(Piece(scored=self._score_prompt(model)))
            self.offset = self.prompt_text.length
        if not self.limit:
            self.finish("length")

    def _build_processors(self, model: nn.Module) -> LogitsProcessorList:
        """Return the processors that `generate()` would use; its `custom_generate` is the public way to them."""
        self.config.max_new_tokens, self.config.max_length = self.limit, None
        if self.config.top_k is None:  # which `generate()` takes for its default of 50
            self.config.top_k = 0
        prompt = torch.tensor([self.prompt], device=model.device)
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=self.config,
            custom_generate=lambda model, input_ids, logits_processor, **others: logits_processor,
        )

    def _score(self, token: int, start: int, logits: torch.Tensor) -> Scored:
        scores = logits.float().log_softmax(dim=-1).nan_to_num(nan=-9999.0, neginf=-9999.0)  # as OpenAI's
        values, likeliest = scores.topk(self.top)
        return Scored(token, start, scores[token].item(), list(zip(likeliest.tolist(), values.tolist(), strict=True)))

    def _score_prompt(self, model: nn.Module) -> list[Scored]:
        logits = model(torch.tensor([self.prompt], device=model.device), use_cache=False).logits[0]
        scored = []
        for place, token in enumerate(self.prompt):
            start = self.prompt_text.length
            self.prompt_text.add(token)
            scored.append(self._score(token, start, logits[place - 1]) if place else Scored(token, start))
        return scored

    def step(self, input_ids: torch.Tensor, logits: torch.Tensor) -> int:
        """Choose the next token by the logits `(vocabulary,)` after `input_ids`, and hand on what it adds."""
        scores = logits[None]
        if self.matcher is not None:
            allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8) > 0
            allowed = nn.functional.pad(allowed[: len(logits)], (0, max(0, len(logits) - len(allowed))))
            scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        scores = self.processors(input_ids[None], scores)[0]
        if self.config.do_sample:
            token = torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator).item()
        else:
            token = scores.argmax().item()
        self.new.append(token)
        ended = token in self.ends
        if self.matcher is not None and not ended:
            self.matcher.consume_token(token)
        if self.top is not None and not ended:
            self.waiting.append(self._score(token, self.offset + self.text.length, logits))
        text = self.text.add(token)
        if ended or self.text.stopped or (self.matcher is not None and self.matcher.is_stopped()):
            self.finish("stop", text)
        elif len(self.new) >= self.limit:
            self.finish("length", text)
        elif text:
            self.emit(Piece(text, self._released()))
        return token

    def _released(self, to_the_end: bool = False) -> list[Scored]:
        ready = [scored for scored in self.waiting if to_the_end or scored.start < self.offset + self.text.released]
        self.waiting = self.waiting[len(ready) :]
        return ready

    def finish(self, reason: str | Exception, text: str = "") -> None:
        """The end, which is emitted once."""
        if self.finished:
            return
        self.finished = True
        if isinstance(reason, Exception):
            self.emit(Piece(finish=reason))
            return
        if not self.text.stopped:
            text += self.text.add(None)
            if self.text.stopped:  # the last characters were not complete before
                reason = "stop"
        self.emit(Piece(text, self._released(not self.text.stopped), reason))


class Engine:
    """The thread that computes all answers of a model. Rows are handed in by `submit` and answer by their `emit`."""

    def __init__(self, model: nn.Module):
        self.model = copy(model)  # the same weights, but of the settings that a model comes with each row has its own
        self.defaults = model.generation_config
        self.model.generation_config = GenerationConfig(pad_token_id=pad_token(model))
        self.waiting: deque[Row] = deque()
        self.changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, rows: list[Row]) -> None:
        with self.changed:
            self.waiting.extend(rows)
            self.changed.notify()

    def _admit(self, running: list[Row]) -> list[Row]:
        """The rows of the next batch: those that run, and as many that wait as there is room for."""
        with self.changed:
            while not running and not self.waiting:
                self.changed.wait()
            while self.waiting and len(running) < MAX_ROWS:
                longest = max(len(row.prompt) + row.limit for row in (*running, self.waiting[0]))
                if running and longest * (len(running) + 1) > MAX_BATCH_TOKENS:
                    break
                running = [*running, self.waiting.popleft()]
        return running

    def _run(self) -> None:
        running: list[Row] = []
        while True:
            running = self._admit(running)
            for row in running:
                if row.processors is None and not row.finished:
                    self._attempt([row], partial(row.start, self.model))
            running = [row for row in running if not row.finished]
            if running:
                self._attempt(running, partial(self._generate, running))
            running = [row for row in running if not row.finished]

    @staticmethod
    @torch.no_grad()
    def _attempt(rows: list[Row], work: Callable[[], None]) -> None:
        """Do some work for rows; an exception ends them, not the engine."""
        try:
            work()
        except Exception as error:
            for row in rows:
                row.finish(error)

    def _generate(self, rows: list[Row]) -> None:
        """Let the rows grow until all have ended, or until another batch is faster."""
        texts, engine = [row.prompt + row.new for row in rows], self
        width = max(map(len, texts))

        class Choose(LogitsProcessor):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                tokens = [0] * len(rows)
                for i, row in enumerate(rows):
                    if not row.finished:
                        try:
                            tokens[i] = row.step(input_ids[i, -len(row.prompt) - len(row.new) :], scores[i])
                        except Exception as error:
                            row.finish(error)
                chosen = torch.tensor(tokens, device=scores.device)[:, None]
                return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

        class End(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
                ended = [row.finished for row in rows]
                # another batch reads all texts again: not before the steps made are worth it
                worth_it = input_ids.shape[1] - width >= max(MIN_STEPS, width // 4)
                if worth_it and (2 * sum(ended) >= len(rows) or (engine.waiting and len(rows) < MAX_ROWS)):
                    ended = [True] * len(rows)
                return torch.tensor(ended, device=input_ids.device)

        generate_batch(
            self.model,
            texts,
            max_new_tokens=max(row.limit - len(row.new) for row in rows),
            logits_processor=LogitsProcessorList([Choose()]),
            stopping_criteria=StoppingCriteriaList([End()]),
            do_sample=False,
        )
