"""The data keys of a recipe that all tasks share, named as in transformers' language-modelling example."""

from dataclasses import dataclass, field

from ..errors import InputError


def as_list(value: str | list[str] | None) -> list[str] | None:
    """One text as a list of it."""
    return [value] if isinstance(value, str) else value


@dataclass
class DataArguments:
    """
    Where the text comes from, what of it is held out, and how it is cut. A task's own keys stand in a subclass beside it.
    """

    task: str = field(default="causal-lm", metadata={"help": "what is trained: see hf_lm/tasks"})
    dataset_name: str | None = field(
        default=None, metadata={"help": "dataset of the Hub, or a local dataset folder", "is_path": True}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "its configuration"})
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "files or globs: .txt (one document each), .jsonl, .json, .csv (also .gz), .parquet",
            "is_path": True,
        },
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "the same, held out", "is_path": True})
    test_file: list[str] | None = field(
        default=None,
        metadata={"help": "the same, for the scores at the very end: nothing is chosen by it", "is_path": True},
    )
    split_column_name: str | None = field(
        default=None,
        metadata={"help": "column that says of each row of train_file: train, validation (dev, val, eval) or test"},
    )
    validation_split_percentage: float = field(
        default=5.0,
        metadata={
            "help": "without validation data: per cent held out, the last rows; of one text or a few, each one's end"
        },
    )
    text_column_name: str | None = field(
        default=None, metadata={"help": "column that holds the text; default: text, or the only one of strings"}
    )
    encoding: str | None = field(
        default=None,
        metadata={"help": "of text, JSON and CSV files, as gb18030 or latin-1; default: UTF-8, or a BOM's"},
    )
    streaming: bool = field(default=False, metadata={"help": "read the data while training, without a copy on disk"})
    shuffle_buffer_size: int = field(
        default=0, metadata={"help": "number of blocks of a stream that are shuffled among each other; 0: in order"}
    )
    block_size: int = field(default=256, metadata={"help": "tokens the model sees at once"})
    packing: bool = field(
        default=True, metadata={"help": "several short examples in one block; they do not see each other"}
    )
    long_examples: str = field(
        default="cut", metadata={"help": "examples of more than block_size tokens: cut, drop, or error"}
    )
    show_examples: int = field(
        default=0, metadata={"help": "number of training examples to print first; what is not learned is dimmed"}
    )
    data_license: str | None = field(default=None, metadata={"help": "licence of the data, for the card"})
    data_sha256: str | None = field(
        default=None, metadata={"help": "of the files that data_license and language are about: others get neither"}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "number of training documents to use; default: all"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "number of held-out documents to use; default: all"}
    )

    def __post_init__(self):
        for name in ("train_file", "validation_file", "test_file"):
            setattr(self, name, as_list(getattr(self, name)))
        if not 0 <= self.validation_split_percentage < 100:
            raise InputError(
                "validation_split_percentage: must be at least 0 and less than 100, got "
                f"{self.validation_split_percentage}."
            )
        for name in ("block_size", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: must be at least 1, got {value}.")
        if self.long_examples not in ("cut", "drop", "error"):
            raise InputError(f"long_examples: must be cut, drop or error, got {self.long_examples!r}.")
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
            except LookupError as error:
                raise InputError(f"encoding: {self.encoding!r} is none that Python knows; as utf-16, gb18030, latin-1.") from error  # fmt: skip
        if self.dataset_name and self.train_file:
            raise InputError("dataset_name and train_file exclude each other.")
