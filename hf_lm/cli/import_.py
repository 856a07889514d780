"""Make an hf_lm folder of a checkpoint of another family: hf-lm import SRC DST."""

import argparse
import json
from pathlib import Path

from ..errors import InputError, explained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="model folder, Hub id, or a .gguf file")
    parser.add_argument("destination", metavar="DST", help="new folder")
    parser.add_argument(
        "--allow-missing", action="store_true", help="random weights where tensors are missing or of another shape"
    )
    add_shared(parser, ("auto", "float32", "float16", "bfloat16"))


def add_shared(parser: argparse.ArgumentParser, dtypes: tuple[str, ...]) -> None:
    """What import and export have in common."""
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights; default: as they are")
    parser.add_argument("--text", metavar="FILE", help="what both models read; default: the opening of Moby-Dick")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def read_text(file: str | None) -> str | None:
    """
    Raises:
        InputError: the file cannot be read as UTF-8 text, or is empty.
    """
    if file is None:
        return None
    with explained(f"--text {file}: cannot be read as UTF-8 text"):
        text = Path(file).read_text(encoding="utf-8")
    if not text.strip():
        raise InputError(f"--text {file}: holds no text.")
    return text


def show(report: dict, destination: str, as_json: bool) -> int:
    """Print what was written and how well it agrees."""
    from ..interop.heads import HEADS

    if as_json:
        print(json.dumps(report))
        return 0
    kind = HEADS[report["head"]].removeprefix("a ") + ", " if report.get("head") else ""
    print(f"{destination}: {report.get('family') or report.get('format')}, {kind}{report['dtype']}")
    if "random_weights" in report:
        print(f"random weights, not compared: {', '.join(report['random_weights'])}")
        return 0
    if report.get("judge", "transformers") is None:
        print("not read back: transformers does not read all of it; install xllamacpp to compare it in llama.cpp")
    else:
        kind, by = ("logprob", " in llama.cpp") if report.get("judge") == "llama.cpp" else ("logit", "")
        print(
            f"parity{by} over {report['tokens']} tokens: largest {kind} difference "
            f"{report[f'max_{kind}_difference']:.2g}, top-1 agreement {report['top1_agreement']:.2%}"
        )
    if report.get("bits_per_byte") is not None:
        print(f"bits per byte: {report['bits_per_byte']:.4f}, original {report['reference_bits_per_byte']:.4f}")
    if report.get("same_tokens") is False:
        print("the text is split into other tokens than by the original tokenizer")
    for note in report.get("notes", ()):
        print(f"note: {note}")
    return 0


def run(arguments: argparse.Namespace) -> int:
    text = read_text(arguments.text)
    from .. import register_auto_classes

    register_auto_classes()
    from ..interop.convert import import_checkpoint

    report = import_checkpoint(
        arguments.source, arguments.destination, arguments.allow_missing, arguments.dtype, text=text
    )
    return show(report, arguments.destination, arguments.json)
