"""What several commands share: the MODEL argument and texts of the command line."""

import argparse

from ..errors import InputError
from ..loading import load_model, load_tokenizer, require_model

__all__ = ["add_model_arguments", "check_text", "load_model", "load_tokenizer", "require_model"]


def check_text(text: str, name: str) -> str:
    """
    A text from the command line or standard input, as it is.

    Raises:
        InputError: it holds bytes that are not UTF-8 (Python carries them as lone surrogates).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = ascii(text[error.start])[1:-1].replace("\\udc", "byte 0x")
        raise InputError(f"{name}: is not UTF-8: {bad} after {text[: error.start][-20:]!r}.") from error
    return text


def add_model_arguments(parser: argparse.ArgumentParser, dtype: str = "float32") -> None:
    """MODEL and what it is computed in. Scores need float32: in bfloat16 they depend on the batch size (1e-3)."""
    parser.add_argument("model", metavar="MODEL", help="model folder or Hub id")
    choices = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=choices, default=dtype, help=f"computed in; auto: as saved ({dtype})")
