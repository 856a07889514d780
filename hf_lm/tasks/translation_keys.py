"""The recipe keys of translation."""

from dataclasses import dataclass, field

from ..data.arguments import DataArguments


@dataclass
class TranslationArguments(DataArguments):
    """Which languages are translated into which."""

    language_pairs: list[str] | None = field(
        default=None, metadata={"help": "what translation learns, as en-de de-en: each language is a column"}
    )
