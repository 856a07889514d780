"""The types in which a GGUF file stores weights."""

import numpy as np

# our name: (type of the matrices in the file, its name as the type of the whole file)
TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}


def type_of(name: str, tensor: np.ndarray):
    """The GGML type of a tensor: vectors stay in float32, and so do rows that do not fill the blocks of the type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted = GGMLQuantizationType[TYPES[name][0]]
    fits = tensor.ndim > 1 and tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if fits else GGMLQuantizationType.F32
