"""What stands on top of a checkpoint's decoder: the head of a language model, or one that gives labels."""

from pathlib import Path

from transformers import PreTrainedConfig

from ..errors import InputError
from ..files import as_table, read_json

# end of the class's name: what such a model is
HEADS = {
    "ForSequenceClassification": "a text classifier",
    "ForTokenClassification": "a token classifier",
    "ForQuestionAnswering": "a question-answering model",
}
# PEFT's name of an adapter's task: the end of the class's name
ADAPTER_TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "WithLMHead")


def class_name(config: dict) -> str:
    """The class that wrote a `config.json`, or "" if it names none."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def head_of(config: dict, source: str) -> str | None:
    """
    The key in `HEADS` of a `config.json`; None for a language model or a model without a head.

    Raises:
        InputError: it names a class with another head, such as a masked language model.
    """
    name = class_name(config)
    head = next((head for head in HEADS if name.endswith(head)), None)
    if head is None and "For" in name and not name.endswith(LANGUAGE_MODELS):
        raise InputError(f"{source}: is a {name} (architectures in config.json), not a causal language model.")
    return head


def check_is_language_model(source: str, use: str = "") -> None:
    """
    Args:
        source: folder of a model or an adapter, or Hub id. One without a config.json in reach passes.
        use: a sentence on what to do instead.

    Raises:
        InputError: the model, or the model that the adapter makes, gives labels instead of text.
    """
    task = read_json(Path(source) / "adapter_config.json").get("task_type")
    head, name = ADAPTER_TASKS.get(task), f"adapter, task_type {task}"
    if head is None:
        try:
            config = as_table(PreTrainedConfig.get_config_dict(source)[0])
        except OSError:
            return
        head, name = head_of(config, source), class_name(config)
    if head is not None:
        raise InputError(f"{source}: is {HEADS[head]} ({name}), not a language model. {use}".strip())
