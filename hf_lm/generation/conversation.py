"""Answers in a conversation: one, streamed; or many at once, to see how often the model ends by itself."""

import contextlib
import math
import threading
from collections.abc import Iterable

from ..errors import InputError, explained
from .decoding import GREEDY, evaluating, generate_batch, stop_tokens
from .prompts import context_limit


def check_template(tokenizer, seconds: float = 5.0) -> None:
    """
    Raises:
        InputError: the chat template, which is a program that came with the model, does not end.
    """
    messages = [{"role": "user", "content": "Hello."}]

    def render() -> None:
        with contextlib.suppress(Exception):  # what is wrong with it is said when it is used
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    thread = threading.Thread(target=render, daemon=True)
    if tokenizer.chat_template:
        thread.start()
        thread.join(seconds)
    if thread.is_alive():
        raise InputError(f"chat template: has not made a prompt of one message in {seconds:.0f} seconds.")


def prompt_ids(tokenizer, messages: list[dict]) -> list[int]:
    """
    The tokens of a conversation up to where the answer starts.

    Raises:
        InputError: there is no chat template, or it fails.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template: train with task: chat, or use hf-lm generate.")
    with explained("chat template"):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def fit_conversation(
    tokenizer, messages: list[dict], limit: int | None, max_new_tokens: int
) -> tuple[list[dict], list[int], int]:
    """
    The turns that the model can read, their tokens, and how long the answer may be.

    The oldest turns (not a system message) are left out until there is room for `max_new_tokens`, or for half of what
    the model takes where that is less. A last turn that leaves less room than that gets the answer that fits.

    Args:
        messages: `role` and `content` of each turn, the user's last.
        limit: tokens that the model takes, the answer included; None: any number.

    Raises:
        InputError: there is no chat template, or the last turn alone leaves no room at all.
    """
    start = 1 if messages[0]["role"] == "system" else 0
    while True:
        ids = prompt_ids(tokenizer, messages)
        if limit is None or len(ids) + min(max_new_tokens, limit // 2) <= limit:
            break
        if len(messages) - start <= 1:
            if len(ids) >= limit:
                raise InputError(f"the message has {len(ids)} tokens; the model takes {limit}, the answer included.")
            break
        messages = messages[:start] + messages[start + 2 :]
    return messages, ids, max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids))


def first_answers(
    model, tokenizer, conversations: Iterable[dict], max_new_tokens: int = 128, batch_size: int = 16
) -> list[dict]:
    """
    Answer the opening of each conversation by greedy decoding.

    Args:
        conversations: rows with `messages`; what comes before the first message of the assistant is the prompt. One
            that leaves no room for an answer is passed over.
        max_new_tokens: length of an answer at most; not more than half of what the model takes.

    Returns:
        `prompt` (messages), `answer`, and `ended`: whether it ended by itself within `max_new_tokens`.
    """
    limit, stops = context_limit(model), stop_tokens(model.generation_config)
    room = min(max_new_tokens, (limit or 2 * max_new_tokens) // 2)
    prompts = []
    for row in conversations:
        turns = row["messages"]
        answer = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        ids = prompt_ids(tokenizer, turns[:answer]) if answer else []
        if ids and len(ids) + room <= (limit or math.inf):
            prompts.append((turns[:answer], ids))
    answers = []
    with evaluating(model):
        for start in range(0, len(prompts), batch_size):
            turns, batch = zip(*prompts[start : start + batch_size], strict=True)
            for prompt, ids in zip(turns, generate_batch(model, list(batch), room, **GREEDY), strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                answers.append({"prompt": prompt, "answer": text, "ended": not stops.isdisjoint(ids)})
    return answers
