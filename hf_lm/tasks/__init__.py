"""
What a recipe's `task` decides: which rows it reads, how they become tokens, which head learns, how the result is scored.

To add a task, write a module here with a subclass of `Task` and add a line to `TASKS`.
"""

import difflib
import importlib

from ..errors import InputError

# task: (module in this folder, class)
TASKS = {
    "causal-lm": ("language_modeling", "LanguageModeling"),
    "sequence-classification": ("classification", "SequenceClassification"),
    "label-likelihood": ("classification", "LabelLikelihood"),
    "chat": ("chat", "Chat"),
    "translation": ("translation", "Translation"),
}


def result_names(task: str | None) -> dict[str, str]:
    """`{key of metrics.json: label}` of a task's results; of all tasks where a run names none that is known."""
    classes = map(task_class, [task] if task in TASKS else TASKS)
    return {key: label for one in classes for key, label in one.result_names.items()}


def charts(task: str | None) -> dict[str, dict[str, str]]:
    """`{title: {label: key of the log}}` of a task's charts; of all tasks where a run names none that is known."""
    classes = map(task_class, [task] if task in TASKS else TASKS)
    return {title: lines for one in classes for title, lines in one.charts.items()}


def task_class(name: str) -> type:
    """
    The class of a task.

    Raises:
        InputError: no task has this name.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(TASKS)} is possible."
        raise InputError(f"task: unknown task {name!r}; {hint}")
    module, class_name = TASKS[name]
    return getattr(importlib.import_module(f".{module}", __name__), class_name)
