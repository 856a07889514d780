"""
The one exception that means: the user can mend this; and how an error is said on one line. It needs nothing but Python,
so everything may use it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 700  # characters of a line that names an error


class InputError(ValueError):
    """
    Something given by the user is wrong: a file, a key, a value, a folder.

    The message is one line that names what was given and what would be right. The command line prints it and exits
    with 2; from Python it is a `ValueError` like any other.
    """


def one_line(error: BaseException) -> str:
    """The message of an error on one line; the libraries' nested and coded ones are reduced to what matters."""
    while type(error).__name__.startswith("StrictDataclass") and error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(error).split()).partition(". Errors: ")[0])
    text = re.sub(r"data did not match any variant of untagged enum (Py)?(\w+?)(Untagged|Wrapper)", r"no \2 known to the library", text)  # fmt: skip
    if text == "index out of range in self":  # of torch's embedding
        text = "a token's number is beyond the model's vocabulary: the tokenizer is not this model's."
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
