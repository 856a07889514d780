"""
The errors of hf_lm, on one line each: invalid input, failed work, and crashes, whose traceback is kept in a file. It
imports nothing but Python, so everything may use it.
"""

import os
import re
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CRASH_FILE = "crash.txt"  # in a run's folder: the traceback of what ended it
# What torch's embedding and our model say of a token beyond the vocabulary: the folder's tokenizer is another model's.
FOREIGN_TOKEN = re.compile(r"^(index out of range in self|input_ids must be between 0 and \d+, got \d+\.)$")
LONGEST = 700  # characters of a line that names an error


class InputError(ValueError):
    """
    Something given by the user is wrong: a file, a key, a value, a folder.

    The message is one line that names what was given and what would be right. The command line prints it and exits
    with 2; from Python it is a `ValueError` like any other.
    """


def is_invalid_input(error: BaseException) -> bool:
    """Whether an error is about what the user gave, not about the program."""
    return isinstance(error, InputError) or FOREIGN_TOKEN.match(str(error)) is not None


class Failure(RuntimeError):
    """
    The input was right and the work failed: a run diverged, a push was refused. The message says all there is to know;
    the command line prints it and exits with 1.
    """


def keep_traceback(error: BaseException, folder: Path | None = None, name: str = CRASH_FILE) -> str:
    """
    Write the traceback of a crash to a file, once for each error.

    Args:
        folder: receives the file `name`; default: a new temporary file.

    Returns:
        Where the traceback is, in words: the file of the first call.
    """
    if not hasattr(error, "traceback_file"):
        try:
            if folder is None:
                descriptor, file = tempfile.mkstemp(prefix="hf-lm-crash-", suffix=".txt")
                os.close(descriptor)
            else:
                file = folder / name
            text = "".join(traceback.format_exception(error))
            Path(file).write_text(text, encoding="utf-8", errors="backslashreplace")
            error.traceback_file = f"in {file}"
        except OSError as problem:  # a full disk may be what ended the command
            error.traceback_file = f"shown by hf-lm --debug ({problem})"
    return error.traceback_file


def one_line(error: BaseException) -> str:
    """The message of an error on one line; the libraries' nested and coded ones are reduced to what matters."""
    while type(error).__name__.startswith("StrictDataclass") and error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(error).split()).partition(". Errors: ")[0])
    text = re.sub(r"data did not match any variant of untagged enum (Py)?(\w+?)(Untagged|Wrapper)", r"no \2 known to the library", text)  # fmt: skip
    if FOREIGN_TOKEN.match(text):
        text = f"a token's number is beyond the model's vocabulary: the tokenizer is not this model's ({text.rstrip('.')})."
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 100]} ... {text[-90:]}"


@contextmanager
def explained(where: str) -> Iterator[None]:
    """
    Raises:
        InputError: instead of whatever a library raises about what stands at `where`.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{where}: {one_line(error)}") from error
