"""The recipe keys of language modelling."""

from dataclasses import dataclass, field

from ..data.arguments import DataArguments, as_list
from ..errors import InputError


@dataclass
class LanguageModelingArguments(DataArguments):
    """What a continued model should not forget."""

    control_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "text that a continued model should not forget: scored before and after the training",
            "is_path": True,
        },
    )
    control_split_percentage: float = field(
        default=0.0, metadata={"help": "score only this last per cent of control_file; 0: all of it"}
    )
    replay_percentage: float = field(
        default=0.0, metadata={"help": "per cent of training blocks that come from the rest of control_file"}
    )

    def __post_init__(self):
        super().__post_init__()
        self.control_file = as_list(self.control_file)
        if not 0 <= self.replay_percentage < 100:
            raise InputError(f"replay_percentage: must be at least 0 and less than 100, got {self.replay_percentage}.")
