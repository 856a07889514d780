"""Low-rank adapters (LoRA, arXiv:2106.09685) by the library `peft`: put on, taken into the weights."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ..errors import InputError
from ..hub.files import read_json

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SAMPLED = 4096  # numbers of each weight


def _peft():
    try:
        import peft
    except ImportError as error:
        raise InputError('use_peft: needs the package peft: pip install "hf-lm[peft]".') from error
    return peft


def base_sha256(model) -> str | None:
    """
    SHA-256 of the start of each weight below the head, in bfloat16 (whatever it was loaded in), without an adapter's.

    Returns:
        None if the weights are not all here, or in float16, from which bfloat16 is another.
    """
    weights = {name.replace(".base_layer", ""): weight for name, weight in model.base_model.named_parameters()}
    digest = hashlib.sha256()
    for name in sorted(weights):
        if ".lora_" in name:
            continue
        part = weights[name].detach().flatten()[:SAMPLED].to("cpu", torch.bfloat16)
        if not len(part) or part.is_meta or weights[name].dtype == torch.float16:
            return None
        digest.update(name.encode() + part.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def check_base(folder: str, model) -> None:
    """
    Raises:
        InputError: the adapter that a run wrote to `folder` was trained on other weights than those of `model`.
    """
    trained_on = (read_json(Path(folder) / "metrics.json").get("base_model") or {}).get("sha256")
    if trained_on and base_sha256(model) not in (None, trained_on):
        raise InputError(f"{folder}: the adapter was made for another model: the base model has other weights.")


def add_adapter(model, arguments, task_type: str = "CAUSAL_LM"):
    """
    The model with a new adapter on its linear layers; only the adapter learns.

    Args:
        arguments: `ModelArguments`.
        task_type: peft's name of what the model does.
    """
    peft = _peft()
    config = peft.LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules or "all-linear",
        task_type=task_type,
    )
    adapted = peft.get_peft_model(model, config)
    adapted.base_sha256 = base_sha256(model)  # for metrics.json
    return adapted


def merge_adapter(folder: str, base: str | None = None):
    """
    The base model with an adapter taken into its weights.

    Args:
        folder: holds the adapter.
        base: folder or Hub id of the base model; default: the one that the adapter names.

    Raises:
        InputError: the folder holds no adapter, or one for another base model.
    """
    peft = _peft()
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        raise InputError(f"{folder}: holds no adapter ({ADAPTER_CONFIG} is missing).")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, auto_class, heads = base or config["base_model_name_or_path"], AutoModelForCausalLM, {}
        if config.get("task_type") == "SEQ_CLS":
            auto_class, labels = AutoModelForSequenceClassification, read_json(path.with_name("metrics.json"))
            names = dict(enumerate(labels.get("labels") or []))
            heads = {"id2label": names, "label2id": {name: number for number, name in names.items()}} if names else {}
        model = auto_class.from_pretrained(base, **heads)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: its base model {base} cannot be loaded: {error}") from error
    check_base(folder, model)
    try:
        adapted = peft.PeftModel.from_pretrained(model, folder)
        expected, found = peft.get_peft_model_state_dict(adapted), load_file(Path(folder) / ADAPTER_WEIGHTS)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: the adapter was made for another model than {base}.") from error
    if different := set(expected) ^ set(found):
        raise InputError(
            f"{folder}: the adapter was made for another model than {base}: only one of them has {min(different)}."
        )
    return adapted.merge_and_unload()
