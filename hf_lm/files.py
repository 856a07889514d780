"""Read and write files: JSON that may be missing or damaged, atomic writes, SHA-256; and a quiet transformers."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

from .errors import InputError, one_line


def read_json(path: Path, strict: bool = False) -> dict:
    """
    The object in a JSON file; `{}` if there is no such file.

    Args:
        strict: raise about a damaged file. Otherwise it reads as `{}`: loading the model says what is wrong with it.

    Raises:
        InputError: with `strict`: the file is not JSON, not an object, or holds a NaN or infinite number.
    """

    def refuse(constant: str):
        raise InputError(f"{path}: holds {constant}; only finite numbers are allowed.")

    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse if strict else None)
    except FileNotFoundError:
        return {}
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        if strict:
            raise InputError(f"{path}: not a valid JSON file: {one_line(error)}") from error
        return {}
    if strict and not isinstance(content, dict):
        raise InputError(f"{path}: must hold an object {{...}}, got {type(content).__name__}.")
    return as_table(content)


def as_table(value) -> dict:
    """The value where it is an object; else an empty one."""
    return value if isinstance(value, dict) else {}


def culprit(path: Path, build: Callable[[dict], object]) -> str | None:
    """What is wrong with a JSON file: what `build(content)` raises, and the entry without which it does not; or None."""

    def failure(fields: dict) -> str | None:
        try:
            build(deepcopy(fields))
        except Exception as error:
            return one_line(error)
        return None

    if not path.exists():
        return None
    try:
        content = read_json(path, strict=True)
    except InputError as error:
        return str(error)
    if (reason := failure(content)) is None:
        return None
    others = ({name: content[name] for name in content if name != key} for key in content)
    key = next((key for key, rest in zip(content, others, strict=True) if failure(rest) is None), "")
    return f"{path}: {reason}" if key in reason else f"{path}: {key} is {content[key]!r:.80}: {reason}"


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    if os.name == "posix" or path.is_file():  # elsewhere a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path beside it, which is synced and renamed at the end."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        yield partial
        fsync(partial)
        os.replace(partial, path)
        fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8, line ends as they are."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: dict) -> None:
    """Write an object as JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sha256_of(*paths: str | Path) -> str:
    """SHA-256 over the bytes of files in order, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


@contextmanager
def library_is_silent() -> Iterator[None]:
    """Silence transformers, which warns of what is then refused: one line about a mistake is enough."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
