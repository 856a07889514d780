"""The recipe keys of classification, by a head or by the likelihood of words."""

from dataclasses import dataclass, field

from ..data.arguments import DataArguments
from ..errors import InputError


@dataclass
class ClassificationArguments(DataArguments):
    """Which labels there are, how rows are balanced, which words stand for a label."""

    label_column_name: str = field(default="label", metadata={"help": "column that holds the label of a text"})
    class_names: list[str] | None = field(
        default=None, metadata={"help": "the labels there are; where the column holds numbers, the name of 0, 1, ..."}
    )
    class_balance: str = field(
        default="none",
        metadata={"help": "oversample: repeat examples of rarer labels until all are as frequent; none"},
    )
    prompt_template: str = field(
        default="{text}\nLabel: {label}", metadata={"help": "what label-likelihood reads; ends in {label}"}
    )
    label_words: list[str] | None = field(
        default=None, metadata={"help": "words for {label}, in the order of class_names; default: these names"}
    )
    baseline: bool = field(
        default=False, metadata={"help": "score TF-IDF with logistic regression (scikit-learn) on the same split"}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.class_balance not in ("none", "oversample"):
            raise InputError(f"class_balance: must be none or oversample, got {self.class_balance!r}.")
