"""Low-rank adapters (LoRA, arXiv:2106.09685) by the library `peft`: put on, taken into the weights."""

import json
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ..errors import InputError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _peft():
    try:
        import peft
    except ImportError as error:
        raise InputError('use_peft: needs the package peft: pip install "hf-lm[peft]".') from error
    return peft


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
    return peft.get_peft_model(model, config)


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
        base = base or json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
        model = AutoModelForCausalLM.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: its base model {base} cannot be loaded: {error}") from error
    try:
        adapted = peft.PeftModel.from_pretrained(model, folder)
        missing = set(peft.get_peft_model_state_dict(adapted)) - set(load_file(Path(folder) / ADAPTER_WEIGHTS))
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: the adapter was made for another model than {base}.") from error
    if missing:
        raise InputError(
            f"{folder}: the adapter was made for another model than {base}: it has nothing for {min(missing)}."
        )
    return adapted.merge_and_unload()
