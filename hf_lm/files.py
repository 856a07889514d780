"""Read and write files: JSON that may be missing or damaged, and a quiet transformers while it is read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def read_json(path: Path) -> dict:
    """The object in a JSON file; `{}` if it is missing or none (loading the model says what is wrong with it)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return as_table(content)


@contextmanager
def library_is_silent() -> Iterator[None]:
    """The library warns of what is then refused: one line about a mistake is enough."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def as_table(value) -> dict:
    """The value where it is an object; else an empty one."""
    return value if isinstance(value, dict) else {}
