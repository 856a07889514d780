"""The types in which a GGUF file stores weights."""

import numpy as np

# our name: (type of the matrices in the file, its name as the type of the whole file)
TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q5_1": ("Q5_1", "MOSTLY_Q5_1"),
    "q5_0": ("Q5_0", "MOSTLY_Q5_0"),
    "q4_1": ("Q4_1", "MOSTLY_Q4_1"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
# Names of tensors, llama.cpp's and ours, that it keeps in float32 although they may be matrices, and that of the head.
EXACT = ("norm.weight", "position_embd.weight", "embed_positions.weight")
HEADS = ("output.weight", "lm_head.weight")
EMBEDDINGS = ("token_embd.weight", "model.embed_tokens.weight")
HEAD_TYPE = "Q8_0"  # llama.cpp's own tool writes Q6_K, which the package gguf cannot


def type_of(dtype: str, name: str, tensor: np.ndarray, is_tied: bool):
    """
    The GGML type of a tensor, nearly as llama.cpp's own tool chooses it: vectors stay in float32, and so do rows that do
    not fill the blocks of the type; the head has at least eight bits.

    Args:
        dtype: a key of `TYPES`.
        name: llama.cpp's or ours.
        is_tied: the embedding is the head, too.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted = GGMLQuantizationType[TYPES[dtype][0]]
    is_head = name in HEADS or is_tied and name in EMBEDDINGS
    if is_head and dtype.startswith(("q4", "q5")):
        wanted = GGMLQuantizationType[HEAD_TYPE]
    fits = tensor.ndim > 1 and tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if fits and not name.endswith(EXACT) else GGMLQuantizationType.F32
