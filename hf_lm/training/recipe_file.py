"""
A recipe's YAML and the words of the command line: read as a person wrote them, converted by each key's declared type.

YAML 1.1 guesses that `no` is false, `010` is 8, `12:30` is 750 and `2024-11-28` a date. Here every value is text until
the type of its key is known; inside mappings the core schema of YAML 1.2 decides.
"""

import os
import re
import types
import typing
from collections.abc import Container
from contextlib import suppress
from dataclasses import Field
from enum import Enum
from pathlib import Path

import yaml
from yaml.constructor import ConstructorError

from ..errors import InputError, explained, one_line

TRUE, FALSE = ("true", "yes", "on", "y", "t", "1"), ("false", "no", "off", "n", "f", "0")
SWITCHES = ("yes", "no", "on", "off")  # in a mapping, whose values have no declared type
PAIRS = r"\s*(\{|[A-Za-z_][\w.]*\s*=)"  # what a mapping on one line starts with
TAG = "tag:yaml.org,2002:"
# https://yaml.org/spec/1.2.2/#103-core-schema; the merge key `<<` is not part of it, but in use.
NULL = ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""])
MERGE = ("merge", "<<", ["<"])
CORE = (
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     list("-+0123456789.")),
)  # fmt: skip


class _Loader(yaml.SafeLoader):
    """A safe loader that guesses nothing: plain scalars are text, or null. Keys are text, and unique."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{TAG}merge":
                if key.value in seen:
                    raise ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
                key.tag = f"{TAG}str"
        return super().construct_mapping(node, deep)


class _CoreLoader(_Loader):
    """The same with numbers and truth values as YAML 1.2 has them."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}

    def construct_yaml_int(self, node):
        return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)


_CoreLoader.add_constructor(f"{TAG}int", _CoreLoader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1 or 1.2 would take for something else."""


for loader, kinds in ((_Loader, (NULL, MERGE)), (_CoreLoader, (NULL, MERGE, *CORE)), (_Dumper, CORE)):
    for kind, pattern, first in kinds:
        loader.add_implicit_resolver(TAG + kind, re.compile(rf"(?:{pattern})\Z"), first)


def read_recipe(path: str) -> dict[str, object]:
    """
    The keys of a recipe: text, None, lists of these; mappings with numbers and truth values of YAML 1.2.

    Raises:
        InputError: the file cannot be read, is no YAML file, has a key twice, or holds something else than keys.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        recipe, typed = (yaml.load(text, loader) for loader in (_Loader, _CoreLoader))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}.") from error
    except ConstructorError as error:
        raise InputError(f"line {error.problem_mark.line + 1}: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"not a YAML file: {one_line(error)}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"must hold keys and values, got {type(recipe).__name__}.")
    return {key: typed[key] if isinstance(value, dict) else value for key, value in recipe.items()}


def write_yaml(recipe: dict) -> str:
    """A recipe as YAML that `read_recipe` reads the same."""
    return yaml.dump(recipe, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def stray(word: str) -> InputError:
    """The error of a word that belongs to no key."""
    name, _, value = word.lstrip("-").partition("=")
    cure = f"write --{name} {value}" if value and name.isidentifier() else "keys are written as --key value"
    return InputError(f"{word!r} belongs to no key; {cure}.")


def read_words(words: list[str], keys: Container[str]) -> list[tuple[str, list[str]]]:
    """
    `--key value ...` and `--key=value` as keys with their values, in order.

    Raises:
        InputError: a word belongs to no key, or is one of `keys` with its value, but without `--`.
    """
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if option := re.match(r"--([A-Za-z][\w-]*)(=|\Z)", word):
            found.append((option[1].replace("-", "_"), [word[option.end() :]] if option[2] else []))
        elif found and word.partition("=")[0] not in keys:
            found[-1][1].append(word)
        else:
            raise stray(word)
    return found


def expand_path(name: str, path: str) -> str:
    """
    A path with `~` and `$NAME` as a shell reads them, unless something of exactly this name exists.

    Raises:
        InputError: an environment variable is not set.
    """
    if os.path.lexists(path):
        return path
    expanded = os.path.expandvars(os.path.expanduser(path))
    if missing := re.search(r"\$([A-Za-z_]\w*|\{\w+\})", expanded):
        raise InputError(f"{name}: {path} names the environment variable {missing[1].strip('{}')}, which is not set.")
    return expanded


def read_mapping(name: str, text: str) -> dict:
    """
    `{"a": 1, "b": [2, 3]}` or `a=1,b=[2,3]` as a dict; values as in YAML 1.2.

    Raises:
        InputError: neither of the two.
    """
    fields, separator = {}, r",(?=\s*[A-Za-z_][\w.]*\s*=|\s*\Z)"  # not the comma of a list
    with explained(name):
        if text.strip().startswith("{"):
            return yaml.load(text, _CoreLoader)
        for pair in filter(None, map(str.strip, re.split(separator, text))):
            key, equals, value = pair.partition("=")
            if not equals:
                raise InputError(f"{name}: {pair!r} is not name=value.")
            fields[key.strip()] = yaml.load(value, _CoreLoader)
    return fields


def as_bool(name: str, text: str) -> bool:
    """
    Raises:
        InputError: the text is not a truth value.
    """
    if text.lower() not in TRUE + FALSE:
        raise InputError(f"{name}: must be true or false, got {text!r}.")
    return text.lower() in TRUE


def as_number(name: str, kind: type, text: str) -> int | float:
    """
    Raises:
        InputError: the text is not a number of this kind.
    """
    for read in (kind, float):  # 1e3 is a whole number
        with suppress(ValueError, OverflowError):
            number = read(re.sub(r"\.(?=inf|nan)", "", text))
            if kind is float or number == int(number):
                return kind(number)
    raise InputError(f"{name}: must be a {'whole ' if kind is int else ''}number, got {text!r}.")


class Key:
    """One key of a recipe: its name, type and metadata, as a dataclass declares them."""

    def __init__(self, field: Field, hint: object):
        self.name = field.name
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = typing.get_args(hint) if union else (hint,)
        self.kinds = {typing.get_origin(option) or option for option in options}
        items = {item for option in options if typing.get_origin(option) is list for item in typing.get_args(option)}
        enums = [kind for kind in self.kinds | items if isinstance(kind, type) and issubclass(kind, Enum)]
        self.choices = [member.value for member in enums[0]] if enums else field.metadata.get("choices")
        self.may_be_none = type(None) in self.kinds
        # Text to transformers, but a mapping in what it means.
        self.is_mapping = dict in self.kinds or field.name == "optim_args"
        self.is_path = field.metadata.get("is_path", False)  # `~` and `$NAME` are read as a shell reads them
        self.may_be_bare = bool in self.kinds or field.metadata.get("nargs") == "?"

    def from_words(self, words: list[str]) -> object:
        """
        What `read_recipe` finds in YAML, from the words of a command line; `null` is None.

        Raises:
            InputError: no word, or several where one is right.
        """
        if not words and not self.may_be_bare:
            raise InputError(f"--{self.name} needs a value.")
        if list in self.kinds and (len(words) > 1 or str not in self.kinds):
            return None if words == ["null"] else words
        if len(words) > 1:
            raise stray(words[1])
        word = words[0] if words else "true"
        return None if word == "null" else word

    def convert(self, value: object) -> object:
        """
        A value as `read_recipe` finds it (but for None), in the declared type.

        Raises:
            InputError: it has another type, or is none of the choices.
        """
        if self.is_mapping and isinstance(value, str) and (self.name == "config_overrides" or re.match(PAIRS, value)):
            value = read_mapping(self.name, value)
        if isinstance(value, dict) and self.is_mapping:
            return {name: as_bool(name, item) if item in SWITCHES else item for name, item in value.items()}
        if isinstance(value, list) and list in self.kinds and not any(isinstance(item, dict | list) for item in value):
            return [self._of_text("null" if item is None else item) for item in value]
        if isinstance(value, dict | list):
            kind = "list of texts" if list in self.kinds else "mapping" if self.is_mapping else "value"
            raise InputError(f"{self.name}: expected one {kind}, got the {type(value).__name__} {value}.")
        return [self._of_text(value)] if list in self.kinds and str not in self.kinds else self._of_text(value)

    def _of_text(self, value: object) -> object:
        text = str(value)  # of a tag in YAML, as !!int, it may be something else
        if bool in self.kinds and (str not in self.kinds or text.lower() in TRUE + FALSE):
            return as_bool(self.name, text)
        if self.choices and text not in self.choices:
            raise InputError(f"{self.name}: must be one of {', '.join(self.choices)}, got {text!r}.")
        if kind := next((kind for kind in (int, float) if kind in self.kinds), None):
            return as_number(self.name, kind, text)
        if not {str, list, dict} & self.kinds:
            raise InputError(f"{self.name}: cannot be set in a recipe.")
        return text
