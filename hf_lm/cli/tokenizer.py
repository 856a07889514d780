"""Train a tokenizer on text files: byte-level BPE, single characters, or bytes."""

import argparse
import json
import os
import tempfile
from pathlib import Path

from ..errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="text files, globs, or files with a text column")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens at most, special ones included (2048)")
    parser.add_argument("--kind", default="bpe", help="bpe, char or byte (bpe)")
    parser.add_argument("--text-column-name", help="column of a .jsonl, .csv or .parquet file")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder that receives the tokenizer")
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is there")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def save(tokenizer, folder: Path) -> None:
    """Write the tokenizer's files beside the folder first: what is there is replaced whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
        for path in sorted(tokenizer.save_pretrained(staging)):
            if os.path.exists(path):
                os.replace(path, folder / os.path.basename(path))


def run(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output: {folder} is a file; name a folder.")
    if (folder / "tokenizer.json").exists() and not arguments.overwrite:
        raise InputError(f"--output: {folder} already holds a tokenizer; add --overwrite or name another folder.")
    from ..data.arguments import DataArguments
    from ..data.documents import load_documents
    from ..data.packing import encode_documents
    from ..tokenization import train_tokenizer

    source = DataArguments(
        train_file=arguments.files, text_column_name=arguments.text_column_name, validation_split_percentage=0
    )
    documents = load_documents(source)["train"]
    tokenizer = train_tokenizer((row["text"] for row in documents), arguments.vocab_size, arguments.kind)
    tokens = bytes_ = 0
    for ids, sizes in encode_documents((row["text"] for row in documents), tokenizer):
        tokens += len(ids)
        bytes_ += int(sizes.sum())
    save(tokenizer, folder)
    result = {"vocab_size": len(tokenizer), "tokens": tokens, "bytes": bytes_, "bytes_per_token": bytes_ / tokens}
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{len(tokenizer)} tokens in the vocabulary, {bytes_ / tokens:.2f} bytes per token -> {folder}")
    return 0
