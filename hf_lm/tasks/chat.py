"""Fine-tuning on conversations: the assistant's words are learned, and that it stops after them."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, Json
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from ..data.documents import cells_as_text, column_names, load_rows, task_hint
from ..data.examples import Example, Say, build_examples
from ..errors import InputError
from ..generation.conversation import first_answers
from .base import PreparedData, Task

logger = logging.get_logger(__name__)
TURN = "<|im_start|>"
# ChatML, each turn ended by the tokenizer's own eos: what generation already stops at.
CHAT_TEMPLATE = (
    "{%- if bos_token and bos_token != '<|im_start|>' %}{{ bos_token }}{% endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{%- else -%}{{ message['content'] + eos_token }}{%- endif -%}"
    "{{ '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"
)
MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def use_chat_template(tokenizer) -> None:
    """Give the tokenizer our template, with the token that starts a turn, unless its own marks what is learned."""
    if not MARK.search(str(tokenizer.chat_template)):
        if tokenizer.chat_template:
            logger.warning(
                "chat_template: the checkpoint's own does not mark the assistant's words with {% generation %}; "
                "ours is used instead, and saved with the model."
            )
        tokenizer.chat_template = CHAT_TEMPLATE
        if TURN not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [TURN]})


def _of_pair(row: dict) -> dict:
    """A prompt and its completion, texts or (as TRL has them) lists of messages, as one conversation."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return {"messages": prompt + completion}
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}


def _has_parts(turn) -> bool:
    """Whether a message has its content in parts, `[{"type": "text", "text": "..."}]`."""
    parts = turn.get("content") if isinstance(turn, dict) else None
    return isinstance(parts, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
    )


def _join_parts(row: dict) -> dict:
    turns = row["messages"] if isinstance(row["messages"], list) else []
    return {
        "messages": [
            {**turn, "content": "".join(part["text"] for part in turn["content"])} if _has_parts(turn) else turn
            for turn in turns
        ]
    }


def _is_message(turn) -> bool:
    content = turn.get("content") if isinstance(turn, dict) else None
    return isinstance(content, str) and bool(content.strip()) and isinstance(turn.get("role"), str)


def check_conversation(turns, where: str) -> None:
    """
    Raises:
        InputError: these are no messages, or none is the assistant's.
    """
    if not turns or not isinstance(turns, list) or not all(map(_is_message, turns)):
        raise InputError(
            f"{where} is not a list of messages with role and content (texts), none empty: {turns!r:.100}"
        )
    if not any(turn["role"] == "assistant" for turn in turns):
        raise InputError(f"{where} has no message of the assistant, so nothing to learn.")


def _check(rows, where: str, is_read: bool):
    """
    Rows with `messages` (or `prompt` and `completion`, which are made into some).

    Args:
        is_read: look at all rows now.

    Raises:
        InputError: no such column, or a row in it is not a conversation with an answer.
    """
    names, features = column_names(rows), Features({"messages": Json()})
    if "messages" not in names and {"prompt", "completion"} <= set(names):
        if isinstance(next(iter(rows), {}).get("prompt"), list):
            for number, row in enumerate(rows if is_read else (), 1):
                if any(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in row["prompt"] or ()):
                    raise InputError(
                        f"{where}: row {number}: prompt has a message of the assistant, which would be learned; "
                        "write messages."
                    )
        else:
            rows = cells_as_text(rows, ("prompt", "completion"), where)
        rows = rows.map(_of_pair, remove_columns=names, features=features)
    elif "messages" not in names:
        raise InputError(
            f"{where}: needs a column messages (or prompt and completion); it has {', '.join(names)}.{task_hint(names)}"
        )
    turns = next(iter(rows), {}).get("messages")
    if isinstance(turns, list) and any(map(_has_parts, turns)):
        rows = rows.map(_join_parts, features=features, remove_columns=column_names(rows))
    for number, row in enumerate(rows if is_read else (), 1):
        check_conversation(row["messages"], f"{where}: row {number}")
    return rows


def mark_assistant(tokenizer, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """
    The tokens of a conversation, and which of them hold the assistant's words.

    By the tokens' offsets: the mask of `apply_chat_template` covers the words that follow a turn which is the first token
    (transformers#47325), and only the first token of a turn's last character.
    """
    (text,), (spans,) = render_jinja_template(
        [messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    marks = bytearray(len(text))
    for start, end in spans:
        marks[start:end] = b"\1" * (end - start)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], [any(marks[start:end]) for start, end in encoded["offset_mapping"]]


def encode_conversations(rows: Iterator[dict], tokenizer, say: Say) -> Iterator[Example]:
    """Examples of which the assistant's words are learned."""
    for row in rows:
        turns = row["messages"]
        check_conversation(turns, "train: a row")  # of a stream it has not been read before
        input_ids, learned = mark_assistant(tokenizer, turns)
        size = sum(len(turn["content"].encode()) for turn in turns if turn["role"] == "assistant")
        yield Example(input_ids, learned, size)


class Chat(Task):
    """Conversations (`messages` of `role` and `content`), several in one block."""

    result_names = Task.result_names | {"self_ended": "share of answers that end by themselves"}

    def load(self) -> dict[str, Dataset | IterableDataset]:
        # What is wrong is said now, not in the middle of a run; but a stream of the Hub is not downloaded for that.
        is_read = not (self.data_arguments.streaming and self.data_arguments.dataset_name)
        return load_rows(self.data_arguments, partial(_check, is_read=is_read))

    def texts(self, rows) -> Iterator[str]:
        return (turn["content"] for row in rows for turn in row["messages"])

    def complete_tokenizer(self, tokenizer) -> None:
        """
        Give it a chat template: the named one, the checkpoint's if it marks the assistant's words, or ours.

        Raises:
            InputError: the named template cannot be read or marks nothing.
        """
        path = self.data_arguments.chat_template
        if path:
            if not Path(path).is_file():
                raise InputError(f"chat_template: {path} does not exist.")
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
            if not MARK.search(tokenizer.chat_template):
                raise InputError(f"chat_template: {path} has no {{% generation %}} around the assistant's words.")
        else:
            use_chat_template(tokenizer)
            if tokenizer.eos_token is None and tokenizer.chat_template == CHAT_TEMPLATE:
                raise InputError("tokenizer_name: the tokenizer has no eos token to end an answer with.")

    def encode(self, rows, tokenizer, split: str) -> Dataset | IterableDataset:
        data = self.data_arguments
        options = {"packing": data.packing, "policy": data.long_examples, "where": split}
        return build_examples(
            rows, encode_conversations, tokenizer, data.block_size, **options, readers=self.readers(split)
        )

    def scores(self, trainer, data: PreparedData, before: dict) -> dict:
        scores = super().scores(trainer, data, before)
        rows = data.rows.get("test", data.rows.get("validation"))
        if rows is not None:
            answers = first_answers(trainer.model, trainer.processing_class, rows)
            if answers:
                scores |= {"self_ended": sum(row["ended"] for row in answers) / len(answers), "answers": len(answers)}
        return scores

    def summary(self, metrics: dict) -> str:
        summary = super().summary(metrics)
        if "self_ended" not in metrics:
            return summary
        ended = f"{metrics['self_ended']:.0%} of {metrics['answers']} answers end by themselves"
        return f"{summary}, {ended}" if summary else ended
