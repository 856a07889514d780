"""The recipe keys of conversations."""

from dataclasses import dataclass, field

from ..data.arguments import DataArguments


@dataclass
class ChatArguments(DataArguments):
    """How a conversation is written."""

    chat_template: str | None = field(
        default=None,
        metadata={"help": "file of a Jinja chat template with {% generation %} marks", "is_path": True},
    )
