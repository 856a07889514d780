"""Hand a model on as a native checkpoint, GGUF or ONNX: hf-lm export SRC DST --to native."""

import argparse
import os

from .import_ import add_shared, read_text, show

# those that start with q are GGUF's, named by their bits a weight
DTYPES = ("auto", "float32", "float16", "bfloat16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
K_QUANTS = (
    "GGUF's other types, such as Q4_K_M, are llama.cpp's to write: export with --dtype float16 (or bfloat16), then "
    "llama-quantize model.gguf model-q4_k_m.gguf Q4_K_M"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = K_QUANTS
    parser.add_argument("source", metavar="SRC", help="model folder or Hub id")
    parser.add_argument("destination", metavar="DST", help="new folder, or a new .gguf file")
    formats = ("native", "gguf", "onnx")
    parser.add_argument("--to", choices=formats, help="format (default native; gguf where DST ends in .gguf)")
    add_shared(parser, DTYPES)


def run(arguments: argparse.Namespace) -> int:
    from ..errors import InputError

    to = arguments.to or ("gguf" if arguments.destination.endswith(".gguf") else "native")
    if arguments.dtype.startswith("q") and to != "gguf":
        raise InputError(f"--dtype {arguments.dtype} is for --to gguf only, got --to {to}.")
    if os.path.isfile(os.path.join(arguments.source, "adapter_config.json")):
        raise InputError(f"SRC: {arguments.source} is an adapter; hf-lm merge takes it into its base model first.")
    text = read_text(arguments.text)
    from .. import register_auto_classes

    register_auto_classes()
    from ..interop import convert, gguf

    export = {"native": convert.export_native, "gguf": gguf.export_gguf, "onnx": convert.export_onnx}[to]
    report = export(arguments.source, arguments.destination, arguments.dtype, text=text)
    return show(report, arguments.destination, arguments.json)
