"""What several commands share: loading a model and its tokenizer with errors a person can act on."""

import argparse
import json
import os
from pathlib import Path

from ..errors import InputError
from ..hub.files import outside_paths


def require_model(path: str) -> str:
    """
    The path or Hub id of a model, checked as far as that is possible without loading it.

    Raises:
        InputError: the folder does not exist, holds no config or no weights, or names files outside of itself.
    """
    if not os.path.isdir(path):
        looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.exists(path)
        if looks_local or path.count("/") == 0:
            raise InputError(f"{path}: no such model folder (a model of the Hub is named owner/name).")
        return path
    names = os.listdir(path)
    if not {"config.json", "adapter_config.json"} & set(names):
        raise InputError(f"{path}: not a model folder, it has no config.json.")
    if not any(name.endswith((".safetensors", ".safetensors.index.json", ".gguf")) for name in names):
        raise InputError(f"{path}: the model folder has no weights (model.safetensors).")
    if outside := outside_paths(Path(path)):
        raise InputError(f"{path}: the model folder names files outside of itself: {'; '.join(outside)}.")
    return path


def add_model_arguments(parser: argparse.ArgumentParser, dtype: str = "float32") -> None:
    """MODEL and what it is computed in. Scores need float32: in bfloat16 they depend on the batch size (1e-3)."""
    parser.add_argument("model", metavar="MODEL", help="model folder or Hub id")
    choices = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=choices, default=dtype, help=f"computed in; auto: as saved ({dtype})")


def unavailable(path: str, what: str, error: Exception) -> InputError:
    """The error to raise when `what` of a model cannot be loaded; of one that was never downloaded, with the way out."""
    if not os.path.isdir(path) and os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return InputError(
            f"{path}: {what} is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub. Run `hf download {path}` "
            "without it once."
        )
    return InputError(f"{path}: no {what} can be loaded: {error}")


def load_model(path: str, auto_class: str = "AutoModelForCausalLM", **kwargs):
    """
    The causal language model (or another) in a folder or on the Hub, in evaluation mode, on the GPU if there is one.

    Raises:
        InputError: see `require_model`; or the files cannot be read as a model.
    """
    require_model(path)
    import hf_lm

    hf_lm.register_auto_classes()
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = getattr(transformers, auto_class).from_pretrained(path, **kwargs).eval()
        return model.to("cuda") if torch.cuda.is_available() else model
    except (OSError, json.JSONDecodeError) as error:
        raise unavailable(path, "model", error) from error


def load_tokenizer(path: str):
    """
    The tokenizer in a model folder or on the Hub.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    import hf_lm

    hf_lm.register_auto_classes()  # else the library asks whether it may run the folder's copy of our code
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise unavailable(path, "tokenizer", error) from error
