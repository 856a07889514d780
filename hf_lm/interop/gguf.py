"""A model with its tokenizer as one GGUF file, for llama.cpp, ollama and everything built on them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_hf_lm import HfLmConfig
from ..errors import Failure, InputError
from . import llama_cpp
from .convert import REPORT, as_held, find_tokenizer, load_checkpoint, staged, write_report
from .families import FAMILIES, read_config
from .family import same_logits
from .gguf_models import GgufModel, add_config, add_tensors, gguf_model
from .gguf_tokenizers import add_tokenizer
from .gguf_types import TYPES, type_of
from .heads import HEADS
from .modelfile import modelfile
from .parity import compare, default_text, encode, rounded
from .reader import gguf_head_dim

FILE_NAME = "model.gguf"
MODELFILE = "Modelfile"
FILE = {"gguf_file": FILE_NAME}
GREEDY = 32  # tokens that llama.cpp generates for the comparison
LARGEST_DIFFERENCE = {"float32": 0.05}  # of logarithms of probabilities; llama.cpp looks GELU up in a table in float16
OF_OTHER_TYPES = 1.0  # llama.cpp rounds what it multiplies with such weights, too


def export_gguf(source: str, destination: str | Path, dtype: str = "auto", text: str | None = None) -> dict[str, Any]:
    """
    Write a GGUF file, tokenizer and chat templates included, and read it again to compare: with transformers, if it
    understands the whole model, else with llama.cpp, if `xllamacpp` is installed.

    Args:
        destination: a path that ends in `.gguf`, beside which `.parity.json` and `.Modelfile` are written; or a new folder
            for `model.gguf`, `parity.json` and `Modelfile`.
        dtype: a key of `TYPES`; "auto": that of the weights. The comparison is with our model's weights, rounded to it.

    Returns, raises: as `convert.export_native`, or `compare_with_llama_cpp`; and `judge`, who read the file
        ("transformers", "llama.cpp" or None), `same_tokens`, whether the judge splits the text as the original tokenizer
        does, and `notes` on what llama.cpp will do in another way.
    """
    try:
        from gguf import GGUFWriter, LlamaFileType, quants
    except ImportError as error:
        raise InputError("--to gguf needs the package gguf: pip install hf-lm[gguf].") from error

    checkpoint = load_checkpoint(source)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if checkpoint.head is not None:
        raise InputError(
            f"{source}: is {HEADS[checkpoint.head]} ({type(model).__name__}), whose head a GGUF file does not hold; "
            "--to native and --to onnx keep it."
        )
    dtype = str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype
    row = gguf_model(model.config)
    held = as_held(model.float(), FAMILIES[row.family])
    if tokenizer is None:
        raise InputError(f"{source}: has no tokenizer, which a GGUF file must hold.")
    destination, files = Path(destination), None
    if destination.suffix == ".gguf":
        files = {FILE_NAME: destination} | {name: destination.with_suffix(f".{name}") for name in (REPORT, MODELFILE)}
    with staged(destination, files) as staging:
        writer = GGUFWriter(staging / FILE_NAME, row.architecture)
        name, file_type = destination.name.removesuffix(".gguf"), LlamaFileType[TYPES[dtype][1]]
        add_config(writer, row, held.config, file_type, name)
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
        notes = add_tokenizer(writer, tokenizer, model.config.vocab_size, ends)
        names = [files[name].name if files else name for name in (MODELFILE, FILE_NAME)]
        (staging / MODELFILE).write_text(modelfile(*names, tokenizer, model.generation_config, ends), encoding="utf-8")
        add_tensors(writer, row, held, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

        def as_written(name: str, weight: torch.Tensor) -> torch.Tensor:
            kind = type_of(dtype, name, weight.numpy(), held.config.tie_word_embeddings)
            return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))

        reference = model if dtype == "float32" else rounded(held, as_written)
        report = {"source": source, "format": "gguf", "family": row.family, "architecture": row.architecture}
        report |= {"dtype": dtype} | _read_again(staging, reference, tokenizer, row, dtype, text)
        return write_report(staging, report | {"notes": notes + row.notes(held.config)})


def _read_again(
    folder: Path,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row: GgufModel,
    dtype: str,
    text: str | None,
) -> dict[str, Any]:
    """Who can read a file, and what that reader finds."""
    text = default_text() if text is None else text
    if transformers_understands(folder, FAMILIES[row.family].as_held(reference.config)):
        reloaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **FILE, **gguf_head_dim(folder, **FILE)
        )
        report = {"judge": "transformers"} | compare(reloaded, reference, tokenizer, text)
        return report | {"same_tokens": same_tokens(folder, tokenizer, text)}
    if not llama_cpp.is_installed():
        return {"judge": None}
    number = min(row.context_length(reference.config) // 2, GREEDY)
    return compare_with_llama_cpp(folder / FILE_NAME, reference, tokenizer, text, number, dtype)


def same_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, text: str) -> bool | None:
    """Whether a file's tokenizer, read again, splits a text as the original does; None if transformers cannot read it."""
    try:
        read = find_tokenizer(str(folder), **FILE)
    except InputError:
        return None
    ids = [one(text, add_special_tokens=False)["input_ids"] for one in (read, tokenizer)]
    return ids[0] == ids[1]


def transformers_understands(folder: Path, config: HfLmConfig) -> bool:
    """Whether transformers reads from a GGUF file all options of the model that is in it."""
    try:
        theirs = AutoConfig.from_pretrained(folder, **FILE)
    except ValueError:  # an architecture that it does not read
        return False
    theirs.update(gguf_head_dim(folder, **FILE))
    try:
        return same_logits(HfLmConfig(**read_config(theirs.to_dict(), FILE_NAME)), config)
    except (InputError, ValueError):  # a family, or a value of an option, that it took for another
        return False


@torch.no_grad()
def compare_with_llama_cpp(
    file: Path, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, number: int, dtype: str
) -> dict[str, Any]:
    """
    Let llama.cpp continue the beginning of a text greedily, and read what it wrote with our model.

    Args:
        reference: in float32.
        number: how many tokens are read and at most written. Special ones, such as those that end a text, are not written.
        dtype: of the file.

    Returns:
        `top1_agreement`: how often llama.cpp's token is also our model's most likely one, of `tokens`;
        `max_logprob_difference`: between its and our logarithms of the probabilities of the ten tokens that it finds most
        likely, at the last eight places of the beginning; `same_tokens`: whether it splits the text as the tokenizer does.

    Raises:
        Failure: they differ too much.
    """
    ids, _ = encode(text, tokenizer, reference.config.vocab_size, number)
    prompt, special = ids[0].tolist(), tokenizer.all_special_ids
    # llama.cpp tells no probabilities at a place whose most likely token is no whole character: so at several
    places = range(len(prompt), 0, -1)[:8]
    requests = [
        ("/tokenize", {"content": text, "add_special": False, "parse_special": True}),
        llama_cpp.greedy_request(prompt, number, special),
    ]
    for length in places:
        path, body = llama_cpp.greedy_request(prompt[:length], 1, special)
        requests.append((path, body | {"n_probs": 10}))
    split, written, *answers = llama_cpp.ask(file, requests, len(prompt) + number)
    tokens = written["tokens"]
    logprobs = reference(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    difference = 0.0
    for length, answer in zip(places, answers, strict=True):
        for place in answer.get("completion_probabilities", []):
            for token in place["top_logprobs"]:
                difference = max(difference, abs(token["logprob"] - logprobs[length - 1, token["id"]].item()))
    limit = LARGEST_DIFFERENCE.get(dtype, OF_OTHER_TYPES)
    if not difference <= limit:
        raise Failure(
            f"llama.cpp's logarithms of probabilities differ from the model's by up to {difference:.3g}; at most {limit:g} "
            "is allowed. Nothing was written."
        )
    logprobs[:, special] = -torch.inf
    found = logprobs[len(prompt) - 1 : -1].argmax(-1) == torch.tensor(tokens)
    return {
        "judge": "llama.cpp",
        "max_logprob_difference": difference,
        "top1_agreement": found.float().mean().item(),
        "tokens": len(tokens),
        "same_tokens": split["tokens"] == tokenizer(text, add_special_tokens=False)["input_ids"],
    }
