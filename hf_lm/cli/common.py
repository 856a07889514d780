"""What several commands share: loading a model and its tokenizer with errors a person can act on."""

import json
import os

from ..errors import InputError


def require_model(path: str) -> str:
    """
    The path or Hub id of a model, checked as far as that is possible without loading it.

    Raises:
        InputError: the folder does not exist, or holds no config or no weights.
    """
    if not os.path.isdir(path):
        looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.exists(path)
        if looks_local or path.count("/") == 0:
            raise InputError(f"{path}: no such model folder (a model of the Hub is named owner/name).")
        return path
    names = os.listdir(path)
    if "config.json" not in names:
        raise InputError(f"{path}: not a model folder, it has no config.json.")
    if not any(name.endswith((".safetensors", ".safetensors.index.json", ".gguf")) for name in names):
        raise InputError(f"{path}: the model folder has no weights (model.safetensors).")
    return path


def load_model(path: str, **kwargs):
    """
    The causal language model in a folder or on the Hub, in evaluation mode.

    Raises:
        InputError: see `require_model`; or the files cannot be read as a model.
    """
    require_model(path)
    import hf_lm

    hf_lm.register_auto_classes()
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be loaded as a causal language model: {error}") from error


def load_tokenizer(path: str):
    """
    The tokenizer in a model folder or on the Hub.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: no tokenizer can be loaded from it: {error}") from error
