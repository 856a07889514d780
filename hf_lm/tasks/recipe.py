"""Read a training recipe: a YAML file first, the command line over it, every key and type checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import get_type_hints

from transformers import TrainingArguments
from transformers.utils import logging

from ..configuration_hf_lm import HfLmConfig
from ..data.arguments import DataArguments
from ..errors import InputError, one_line
from ..synonyms import hint
from ..training.arguments import HfLmTrainingArguments
from ..training.keys import RENAMED, ModelArguments, defaults_of_run
from ..training.optimizers import OPTIMIZERS
from ..training.recipe_file import Key, expand_path, read_recipe, read_words
from ..training.verdicts import refuse_arguments
from . import arguments_class, fields_of, own_keys

logger = logging.get_logger(__name__)


@cache
def recipe_keys() -> dict[str, Key]:
    """Every key that a recipe may have, by name, those of all tasks included."""
    keys = {}
    for group in (ModelArguments, DataArguments, *own_keys(), HfLmTrainingArguments):
        hints = get_type_hints(group)
        keys |= {field.name: Key(field, hints[field.name]) for field in fields(group) if field.init}
    keys["optim"].choices += list(OPTIMIZERS)
    return keys


@cache
def tasks_of_keys() -> dict[str, list[str]]:
    """The keys that not all tasks share, and the tasks that each belongs to."""
    return {field.name: tasks for group, tasks in own_keys().items() for field in fields_of(group)}


@contextmanager
def said_of(where: str) -> Iterator[None]:
    """
    Raises:
        InputError: the block's, with the place where the value stands in front.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


class _Names:
    """The names of keys in one place, a file or a command line: old names of `RENAMED` are read as the new ones."""

    def __init__(self, where: str):
        self.where = where
        self.written: dict[str, str] = {}  # each key's name in the file

    def current(self, name: str) -> str:
        """
        The present name of a key.

        Raises:
            InputError: its other name was there before.
        """
        new, release = RENAMED.get(name, (name, ""))
        if (other := self.written.setdefault(new, name)) != name:
            old = name if other == new else other
            raise InputError(f"{old} is the old name of {new}, which is there too; leave out {old}.")
        if new != name:
            logger.warning(f"{self.where}: {name} is called {new} now; hf-lm {release} no longer reads the old name.")
        return new


def parse_recipe(path: str, overrides: list[str]) -> tuple[ModelArguments, DataArguments, HfLmTrainingArguments]:
    """
    Read a recipe.

    Args:
        path: YAML file with a flat mapping of keys to values.
        overrides: command-line words, `--key value ...`; they win over the file. Fields of a mapping
            (`--config_overrides hidden_size=64`) are put into the file's mapping; `null` unsets a key; `max_steps` unsets
            the file's `num_train_epochs`, and the other way round.

    Returns:
        What it says of the model, of the data (the dataclass of its task) and of the training.

    Raises:
        InputError: the file cannot be read; a key is unknown (the closest known one is named), belongs to another task or
            is there under its old and its new name; or a value has the wrong type.
    """
    keys = recipe_keys()

    def known(name: str) -> Key:
        if name not in keys:
            raise InputError(f"unknown key {name!r}{hint(name, keys, HfLmConfig.__dataclass_fields__)}")
        return keys[name]

    values, commanded = {}, set()
    with said_of(path):
        names = _Names(path)
        for name, value in read_recipe(path).items():
            key = known(names.current(str(name)))
            values[key.name] = value if value is None else key.convert(value)
    with said_of("command line"):
        names = _Names("command line")
        for name, words in read_words(overrides, keys.keys() | RENAMED.keys()):
            if name.startswith("no_") and name[3:] in keys.keys() | RENAMED.keys() and not words:
                name, words = name[3:], ["false"]
            name = names.current(name)
            value = known(name).from_words(words)
            value = value if value is None else keys[name].convert(value)
            both = isinstance(value, dict) and isinstance(values.get(name), dict)
            values[name] = values[name] | value if both else value
            commanded.add(name)
    for name, other in (("max_steps", "num_train_epochs"), ("num_train_epochs", "max_steps")):
        if name in commanded and values[name] is not None and other not in commanded:
            values.pop(other, None)
    if isinstance(arguments := values.get("optim_args"), dict):  # text to transformers
        values["optim_args"] = ",".join(f"{name}={value}" for name, value in arguments.items())
    values = {name: value for name, value in values.items() if value is not None or keys[name].may_be_none}
    task = values.get("task", DataArguments.task)
    groups = (ModelArguments, arguments_class(task), HfLmTrainingArguments)
    for name, tasks in tasks_of_keys().items():
        if values.get(name) is not None and task not in tasks:
            where = "command line" if name in commanded else path
            raise InputError(f"{where}: {name} is a key of task {' and '.join(tasks)}; the task here is {task}.")
    for name in values:
        paths = values[name] if keys[name].is_path else None
        if paths is not None:
            is_list = isinstance(paths, list)
            values[name] = [expand_path(name, path) for path in paths] if is_list else expand_path(name, paths)
    values = defaults_of_run(values.get("model_name_or_path") is None, values) | values
    values = {name: value for name, value in values.items() if value is not None}
    refuse_arguments(
        {name: value for name, value in values.items() if value != getattr(TrainingArguments, name, None)}
    )
    try:
        return tuple(
            group(**{field.name: values[field.name] for field in fields(group) if field.name in values})
            for group in groups
        )
    except InputError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        named = [name for name, value in values.items() if str(error).startswith((f"{value} ", f"{value!r} "))]
        raise InputError(": ".join([*named[:1], one_line(error)])) from error
