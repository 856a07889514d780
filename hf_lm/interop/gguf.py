"""Models of the Llama family as one GGUF file, for llama.cpp, ollama and everything built on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from .convert import REPORT, load_checkpoint, staged, to_native, write_report
from .families import FAMILIES, choose_family
from .heads import HEADS
from .parity import compare, default_text, rounded
from .reader import gguf_head_dim

FILE_NAME = "model.gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# our name: (type of the matrices in the file, its name as the type of the whole file)
TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}


def gguf_family(config) -> str:
    """
    The architecture in GGUF of a model.

    Raises:
        InputError: it has options that such files, or the programs that read them, do not have.
    """
    architecture = next((name for name in ARCHITECTURES if not FAMILIES[name].differences(config)), None)
    if architecture is None:
        family = choose_family(config).model_type
        raise InputError(f"GGUF export is for models of {', '.join(ARCHITECTURES)}; this one is of {family}.")
    plain = {
        "hidden_act": "silu",
        "attention_bias": architecture == "qwen2",
        "mlp_bias": False,
        "sliding_window": None,
    }
    blocking = {name: getattr(config, name) for name, value in plain.items() if getattr(config, name) != value}
    if config.rope_parameters["rope_type"] != "default":
        blocking["rope_type"] = config.rope_parameters["rope_type"]
    if blocking:
        listed = ", ".join(f"{name} {value!r}" for name, value in blocking.items())
        raise InputError(
            f"GGUF export: {listed} cannot be said in a GGUF file of {architecture} that every tool reads."
        )
    return architecture


def pre_tokenizer_name(definition: dict[str, Any]) -> str:
    """
    What GGUF calls the rule by which a byte-level BPE tokenizer first splits a text.

    Raises:
        InputError: it has no name for this one.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    steps = definition.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if definition["model"]["type"] == "BPE" and kinds and kinds[-1] == "ByteLevel":
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"]:
            split = steps[0]["pattern"].get("Regex")
            for name, known in GGUF_PRE_TOKENIZER_SPLITS.items():
                if split == known:
                    return name
    raise InputError(
        f"GGUF export needs a byte-level BPE tokenizer with a pre-tokenizer that llama.cpp knows; this one is "
        f"{definition['model']['type']} with {' and '.join(map(str, kinds)) or 'none'}."
    )


def add_tokenizer(writer, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: list[int]) -> None:
    """
    Vocabulary, merges, special tokens and chat templates; rows of the embedding without a token are marked unused.

    Args:
        ends: the tokens at which generation ends.

    Raises:
        InputError: a file cannot name all of them.
    """
    from gguf import TokenType

    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {item["id"]: item for item in definition["added_tokens"]}
    vocabulary = {index: token for token, index in definition["model"]["vocab"].items()}
    tokens, types = [], []
    for index in range(vocab_size):
        if index in added:
            tokens.append(added[index]["content"])
            types.append(TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        else:
            tokens.append(vocabulary.get(index, f"[PAD{index}]"))
            types.append(TokenType.NORMAL if index in vocabulary else TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(definition))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = definition["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    ids["unk"] = ids["eos"] if ids["unk"] is None else ids["unk"]  # without one, readers invent a token for it
    more = [index for index in ends if index != ids["eos"]]
    if len(more) > 2:
        raise InputError(f"eos_token_id: a GGUF file names up to three tokens that end a text, got {ends}.")
    ids |= zip(("eot", "eom"), more, strict=False)  # of a turn, of a message
    for name, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    if isinstance(templates := tokenizer.chat_template, dict):
        templates = [{"name": name, "template": template} for name, template in templates.items()]
    if templates is not None:
        writer.add_chat_template(templates)


def add_sizes(writer, config, file_type: int, name: str) -> None:
    """The configuration, under llama.cpp's names."""
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def type_of(name: str, tensor: np.ndarray):
    """The GGML type of a tensor: vectors stay in float32, and so do rows that do not fill the blocks of the type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted = GGMLQuantizationType[TYPES[name][0]]
    fits = tensor.ndim > 1 and tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if fits else GGMLQuantizationType.F32


def rope_order(tensor: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection, such that the pairs that llama.cpp rotates in its `llama` are neighbours."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def add_tensors(writer, native: PreTrainedModel, architecture: str, dtype: str) -> None:
    """All weights of a model of the library, under llama.cpp's names and in the type asked for."""
    from gguf import MODEL_ARCH, get_tensor_name_map, quants

    config = native.config
    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, weight in native.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        tensor = weight.float().numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            tensor = rope_order(tensor, heads)
        kind = type_of(dtype, tensor)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", quants.quantize(tensor, kind), raw_dtype=kind)


def export_gguf(source: str, destination: str | Path, dtype: str = "auto", text: str | None = None) -> dict[str, Any]:
    """
    Write a GGUF file, tokenizer and chat templates included, and read it again with transformers to compare.

    Args:
        destination: a path that ends in `.gguf`, beside which `.parity.json` is written; or a new folder for
            `model.gguf` and `parity.json`.
        dtype: a key of `TYPES`; "auto": that of the weights. The comparison is with our model's weights, rounded to it.

    Returns, raises: as `convert.export_native`; and `same_tokens`, whether the library's reading of the file's tokenizer
        splits the text as the original does.
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
        files = {FILE_NAME: destination, REPORT: destination.with_suffix(f".{REPORT}")}
    with staged(destination, files) as staging:
        writer = GGUFWriter(staging / FILE_NAME, architecture)
        add_sizes(writer, model.config, LlamaFileType[TYPES[dtype][1]], destination.name.removesuffix(".gguf"))
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
        add_tokenizer(writer, tokenizer, model.config.vocab_size, ends)
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
        read = AutoTokenizer.from_pretrained(staging, **file)
        same = [one(text, add_special_tokens=False)["input_ids"] for one in (read, tokenizer)]
        report = {"source": source, "format": "gguf", "family": architecture, "dtype": dtype}
        report |= compare(reloaded, rounded(model.float(), as_written), tokenizer, text)
        return write_report(staging, report | {"same_tokens": same[0] == same[1]})
