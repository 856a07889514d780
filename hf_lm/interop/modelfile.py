"""
A Modelfile, which tells Ollama how to run a GGUF file: chat template, where to stop, how to sample.

Ollama's templates are Go's. What a chat template does is found by rendering conversations with it: where it writes the same
around each message of a role, that is a Go template; where it does more, none is written, and Ollama looks at the template
in the GGUF file itself.
"""

from collections.abc import Iterable
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

Messages = list[tuple[str, str]]
# field of a generation config -> parameter of Ollama
PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}
USER, ASSISTANT, SYSTEM = ("user", "question-{}"), ("assistant", "answer-{}"), ("system", "instruction-{}")


class ChatFormat(NamedTuple):
    """
    What a template writes around messages.

    Args:
        around: role -> (what stands before, what stands behind a message).
        without_system: what stands in front of a conversation that has no system message.
        prompt: what stands in front of the next answer.
    """

    around: dict[str, tuple[str, str]]
    without_system: str
    prompt: str

    def render(self, messages: Messages) -> str:
        start = "" if any(role == "system" for role, _ in messages) else self.without_system
        return start + "".join(content.join(self.around[role]) for role, content in messages) + self.prompt

    def to_go(self) -> str:
        """The same as a template of Go, without a line's end that is not the chat template's."""
        start = f"{{{{ if not .System }}}}{literal(self.without_system)}{{{{ end }}}}" if self.without_system else ""
        branches = [
            f'if eq .Role "{role}" }}}}{literal(before)}{{{{ .Content }}}}{literal(behind)}'
            for role, (before, behind) in self.around.items()
        ]
        return f"{start}{{{{ range .Messages }}}}{{{{ {'{{ else '.join(branches)}{{{{ end }}}}{{{{ end }}}}{literal(self.prompt)}"


def literal(text: str) -> str:
    """Text as it stands in a template of Go."""
    return text.replace("{{", '{{ "{{" }}')


def numbered(roles: Iterable[tuple[str, str]]) -> Messages:
    return [(role, content.format(number)) for number, (role, content) in enumerate(roles)]


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    """The format of a tokenizer's chat template, without the token that begins a text; None if it is more than a format."""
    try:
        return _chat_format(tokenizer)
    except (
        TemplateError,
        ValueError,
        TypeError,
        KeyError,
    ):  # a template may raise for a role, or need tools or a date
        return None


def _chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    if "strftime_now" in tokenizer.get_chat_template():
        return None
    begins = tokenizer.bos_token if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else None

    def render(messages: Messages, prompt: bool = False) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        return text.removeprefix(begins) if begins else text  # llama.cpp adds it

    def between(roles: Iterable[tuple[str, str]], prompt: bool = False) -> list[str]:
        """What a template writes before, between and behind messages."""
        messages, parts = numbered(roles), []
        rest = render(messages, prompt)
        for _, content in messages:
            part, rest = rest.split(content)
            parts.append(part)
        return [*parts, rest]

    def without(text: str, start: str = "", end: str = "") -> str:
        if not (text.startswith(start) and text.endswith(end)):
            raise ValueError(text)
        return text[len(start) : len(text) - len(end)]

    first, to_answer, to_question, behind_user = between([USER, ASSISTANT, USER])
    behind_answer = between([USER, ASSISTANT])[-1]
    before_user, before_answer = without(to_question, start=behind_answer), without(to_answer, start=behind_user)
    before_system, behind_system, _ = between([SYSTEM, USER])
    found = ChatFormat(
        {
            "system": (before_system, without(behind_system, end=before_user)),
            "user": (before_user, behind_user),
            "assistant": (before_answer, behind_answer),
        },
        without(first, end=before_user),
        without(between([USER, ASSISTANT, USER], prompt=True)[-1], start=behind_user),
    )
    turns = [USER, ASSISTANT] * 3 + [USER]
    conversations = [numbered(start + turns[-length:]) for start in ([], [SYSTEM]) for length in (1, 3, 7)]
    fits = all(found.render(messages) == render(messages, prompt=True) for messages in conversations)
    return found if fits else None


def quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


def modelfile(
    own_name: str,
    file_name: str,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig,
    ends: list[int],
) -> str:
    """
    The content of a Modelfile.

    Args:
        own_name: of the file that is to hold it.
        file_name: of the GGUF file, which is to lie beside it.
        ends: the tokens at which generation ends.
    """
    lines = [f"# ollama create NAME -f {own_name}", f"FROM ./{file_name}"]
    if tokenizer.chat_template:
        found = chat_format(tokenizer)
        if found is None:
            lines.append(
                "# No TEMPLATE: the chat template does more than to mark messages. Ollama looks at that of the file."
            )
        else:
            lines.append(f"TEMPLATE {quoted(found.to_go())}")
    added = tokenizer.added_tokens_decoder  # at other tokens llama.cpp ends, too, but as words they would end too much
    lines += [f"PARAMETER stop {quoted(added[index].content)}" for index in ends if index in added]
    values = {name: getattr(generation_config, name, None) for name in PARAMETERS}
    if generation_config.do_sample is False:
        values |= {"temperature": 0, "top_k": None, "top_p": None, "min_p": None}
    lines += [f"PARAMETER {PARAMETERS[name]} {value}" for name, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"
