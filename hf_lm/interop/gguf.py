"""A model with its tokenizer as one GGUF file, for llama.cpp, ollama and everything built on them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..errors import InputError
from .convert import REPORT, find_tokenizer, load_checkpoint, staged, to_native, write_report
from .gguf_models import add_sizes, add_tensors, gguf_family
from .gguf_tokenizers import add_tokenizer
from .gguf_types import TYPES, type_of
from .heads import HEADS
from .modelfile import modelfile
from .parity import compare, default_text, rounded
from .reader import gguf_head_dim

FILE_NAME = "model.gguf"
MODELFILE = "Modelfile"


def export_gguf(source: str, destination: str | Path, dtype: str = "auto", text: str | None = None) -> dict[str, Any]:
    """
    Write a GGUF file, tokenizer and chat templates included, and read it again with transformers to compare.

    Args:
        destination: a path that ends in `.gguf`, beside which `.parity.json` and `.Modelfile` are written; or a new folder
            for `model.gguf`, `parity.json` and `Modelfile`.
        dtype: a key of `TYPES`; "auto": that of the weights. The comparison is with our model's weights, rounded to it.

    Returns, raises: as `convert.export_native`; and `same_tokens`, and `notes` on what llama.cpp will do in another way.
    """
    try:
        from gguf import GGUFWriter, LlamaFileType, quants
    except ImportError as error:
        raise InputError("--to gguf needs the package gguf: pip install hf-lm[gguf].") from error

    checkpoint = load_checkpoint(source)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if checkpoint.head is not None:
        raise InputError(
            f"{source}: is {HEADS[checkpoint.head]} ({type(model).__name__}), whose head a GGUF file does not hold; --to native and "
            "--to onnx keep it."
        )
    dtype = str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype
    architecture = gguf_family(model.config)
    if tokenizer is None:
        raise InputError(f"{source}: has no tokenizer, which a GGUF file must hold.")
    destination, files = Path(destination), None
    if destination.suffix == ".gguf":
        files = {FILE_NAME: destination} | {name: destination.with_suffix(f".{name}") for name in (REPORT, MODELFILE)}
    with staged(destination, files) as staging:
        writer = GGUFWriter(staging / FILE_NAME, architecture)
        add_sizes(writer, model.config, LlamaFileType[TYPES[dtype][1]], destination.name.removesuffix(".gguf"))
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
        notes = add_tokenizer(writer, tokenizer, model.config.vocab_size, ends)
        names = [files[name].name if files else name for name in (MODELFILE, FILE_NAME)]
        (staging / MODELFILE).write_text(modelfile(*names, tokenizer, model.generation_config, ends), encoding="utf-8")
        add_tensors(writer, to_native(model, architecture), architecture, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

        def as_written(weight: torch.Tensor) -> torch.Tensor:
            kind = type_of(dtype, weight.numpy())
            return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))

        file = {"gguf_file": FILE_NAME}
        reloaded = AutoModelForCausalLM.from_pretrained(
            staging, dtype=torch.float32, **file, **gguf_head_dim(staging, **file)
        )
        text = default_text() if text is None else text
        report = {"source": source, "format": "gguf", "family": architecture, "dtype": dtype}
        report |= compare(reloaded, rounded(model.float(), as_written), tokenizer, text)
        report["same_tokens"] = same_tokens(staging, tokenizer, text)
        return write_report(staging, report | {"notes": notes})


def same_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, text: str) -> bool | None:
    """Whether a file's tokenizer, read again, splits a text as the original does; None if transformers cannot read it."""
    try:
        read = find_tokenizer(str(folder), gguf_file=FILE_NAME)
    except InputError:
        return None
    ids = [one(text, add_special_tokens=False)["input_ids"] for one in (read, tokenizer)]
    return ids[0] == ids[1]
