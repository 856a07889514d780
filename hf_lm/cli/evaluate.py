"""How well a model predicts a text: bits per byte with an interval, perplexity, loss."""

import argparse
import json

from ..errors import InputError
from .common import load_model, load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder or Hub id")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="text files, or files with a column")
    parser.add_argument("--text-column-name", help="column of a .jsonl, .csv or .parquet file")
    parser.add_argument("--last-percent", type=float, metavar="P", help="only the last P per cent (of one text's characters, or of the documents), as a training run holds out")  # fmt: skip
    parser.add_argument("--block-size", type=int, help="tokens of a window (what the model was made for)")
    parser.add_argument("--stride", type=int, help="new tokens of each window; fewer give more context (all)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows at once; changes speed only (8)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size: must be at least 1, got {arguments.batch_size}.")
    from ..data.arguments import DataArguments
    from ..data.documents import load_documents
    from ..evaluation.text import score_documents

    percent = arguments.last_percent or 0
    source = DataArguments(
        train_file=arguments.data, text_column_name=arguments.text_column_name, validation_split_percentage=percent
    )
    documents = load_documents(source)
    rows = documents.get("validation", documents["train"])
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    texts = (row["text"] for row in rows)
    score = score_documents(
        model, tokenizer, texts, arguments.block_size, arguments.stride, batch_size=arguments.batch_size
    )
    result = score.summary()
    if arguments.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['bits_per_byte']:.4f} bits per byte "
            f"(95%: {result['bits_per_byte_low']:.4f} to {result['bits_per_byte_high']:.4f}), "
            f"perplexity {result['perplexity']:.2f}, {result['loss']:.4f} nats per token, "
            f"{result['tokens']:,} tokens, {result['bytes']:,} bytes"
        )
    return 0
