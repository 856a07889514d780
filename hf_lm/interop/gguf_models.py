"""Which models a GGUF file holds, and their configuration and weights under llama.cpp's names."""

import numpy as np
from transformers import PreTrainedModel

from ..errors import InputError
from .families import FAMILIES, choose_family
from .gguf_types import type_of

ARCHITECTURES = ("llama", "qwen2", "qwen3")


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
