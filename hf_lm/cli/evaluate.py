"""How well a model predicts a text: bits per byte with an interval, perplexity, loss."""

import argparse
import json

from ..errors import InputError
from .common import add_model_arguments, load_model, load_tokenizer


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="text files, or files with a column")
    parser.add_argument("--text-column-name", help="column of a .jsonl, .csv or .parquet file")


def load_data(arguments: argparse.Namespace) -> dict:
    """Return the documents: the last `--last-percent` as `validation`, what stands before them as `train`."""
    from ..data.arguments import DataArguments
    from ..data.documents import load_documents

    percent = arguments.last_percent or 0
    column = arguments.text_column_name
    return load_documents(
        DataArguments(train_file=arguments.data, text_column_name=column, validation_split_percentage=percent)
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--last-percent", type=float, metavar="P", help="only the last P per cent (of one text's characters, or of the documents), as a training run holds out")  # fmt: skip
    parser.add_argument("--block-size", type=int, help="tokens of a window (what the model was made for)")
    parser.add_argument("--stride", type=int, help="new tokens of each window; fewer give more context (all)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows at once; changes speed only (8)")
    parser.add_argument("--compare", metavar="OTHER", help="another model on the same text: the paired difference")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size: must be at least 1, got {arguments.batch_size}.")
    from ..evaluation.text import score_documents

    documents = load_data(arguments)
    rows = documents.get("validation", documents["train"])

    def score(path: str):
        model, tokenizer = load_model(path, dtype=arguments.dtype), load_tokenizer(path)
        texts = (row["text"] for row in rows)
        return score_documents(model, tokenizer, texts, arguments.block_size, arguments.stride, arguments.batch_size)

    own = score(arguments.model)
    result = own.summary() | {"by_document": own.by_document()}
    if arguments.compare:
        other = score(arguments.compare)
        result["compared"] = {"model": arguments.compare, **other.summary(), "minus": own.compared_to(other)}
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(line(result))
    if len(result["by_document"]) > 1:
        for row in result["by_document"][:5]:
            opening = " ".join(rows[row["document"]]["text"][:200].split())[:60]
            print(f"{row['bits_per_byte']:8.4f} in document {row['document']} ({row['bytes']:,} bytes): {opening}")
    if arguments.compare:
        minus = result["compared"]["minus"]
        print(line(result["compared"]) + f" ({arguments.compare})")
        print(
            f"{minus['difference']:+.4f} bits per byte (95%: {minus['low']:+.4f} to {minus['high']:+.4f}) difference"
        )
    return 0


def line(result: dict) -> str:
    """The main numbers, for a person."""
    return (
        f"{result['bits_per_byte']:.4f} bits per byte "
        f"(95%: {result['bits_per_byte_low']:.4f} to {result['bits_per_byte_high']:.4f}), "
        f"perplexity {result['perplexity']:.2f}, {result['loss']:.4f} nats per token, "
        f"{result['tokens']:,} tokens, {result['bytes']:,} bytes"
    )
