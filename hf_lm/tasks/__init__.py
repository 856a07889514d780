"""
What a recipe's `task` decides: which rows it reads, how they become tokens, which head learns, how the result is scored.

To add a task, write a module here with a subclass of `Task` and add a line to `TASKS`. Its recipe keys, where it has some
of its own, stand in a module without torch beside it, so that `hf-lm train --help` answers at once.
"""

import difflib
import importlib
from dataclasses import fields
from typing import NamedTuple

from ..data.arguments import DataArguments
from ..errors import InputError


class Entry(NamedTuple):
    """
    Where a task stands.

    Args:
        task: module of this folder and subclass of `Task`.
        arguments: module of this folder and subclass of `DataArguments`; None where it adds no key.
    """

    task: str
    arguments: str | None = None


TASKS = {
    "causal-lm": Entry("language_modeling.LanguageModeling", "language_modeling_keys.LanguageModelingArguments"),
    "sequence-classification": Entry(
        "classification.SequenceClassification", "classification_keys.ClassificationArguments"
    ),
    "label-likelihood": Entry("classification.LabelLikelihood", "classification_keys.ClassificationArguments"),
    "chat": Entry("chat.Chat", "chat_keys.ChatArguments"),
    "translation": Entry("translation.Translation", "translation_keys.TranslationArguments"),
}


def result_names(task: str | None) -> dict[str, str]:
    """`{key of metrics.json: label}` of a task's results; of all tasks where a run names none that is known."""
    classes = map(task_class, [task] if task in TASKS else TASKS)
    return {key: label for one in classes for key, label in one.result_names.items()}


def charts(task: str | None) -> dict[str, dict[str, str]]:
    """`{title: {label: key of the log}}` of a task's charts; of all tasks where a run names none that is known."""
    classes = map(task_class, [task] if task in TASKS else TASKS)
    return {title: lines for one in classes for title, lines in one.charts.items()}


def usage(task: str | None, metrics: dict) -> str | None:
    """Lines of code that use a model of a task, for its card; None where those of its pipeline do."""
    classes = map(task_class, [task] if task in TASKS else TASKS)
    return next(filter(None, (one.usage(metrics) for one in classes)), None)


def task_class(name: str) -> type:
    """
    The class of a task.

    Raises:
        InputError: no task has this name.
    """
    return _load(_entry(name).task)


def arguments_class(name: str) -> type[DataArguments]:
    """
    The dataclass of the data keys of a task's recipes. Loads no torch.

    Raises:
        InputError: no task has this name.
    """
    path = _entry(name).arguments
    return DataArguments if path is None else _load(path)


def own_keys() -> dict[type[DataArguments], list[str]]:
    """The dataclasses of the keys that not all tasks share, and the tasks whose recipes have them. Loads no torch."""
    owners: dict[type[DataArguments], list[str]] = {}
    for name in TASKS:
        owners.setdefault(arguments_class(name), []).append(name)
    owners.pop(DataArguments, None)
    return owners


def fields_of(arguments: type[DataArguments]) -> list:
    """The fields that a task's dataclass adds to those of `DataArguments`."""
    return [field for field in fields(arguments) if field.name not in DataArguments.__dataclass_fields__]


def _entry(name: str) -> Entry:
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(TASKS)} is possible."
        raise InputError(f"task: unknown task {name!r}; {hint}")
    return TASKS[name]


def _load(path: str) -> type:
    module, name = path.split(".")
    return getattr(importlib.import_module(f".{module}", __name__), name)
