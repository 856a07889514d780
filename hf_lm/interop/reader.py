"""
How the classes of hf_lm read the checkpoints of other families: `from_pretrained` asks the two readers here.

The configuration goes through the tables of `families`. The weights are converted by transformers while it loads them:
it looks up conversions by the `model_type` of a model's config, and `install` registers each family's under a name that
the config bears until the model is loaded.
"""

import os
from collections.abc import Callable
from copy import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.integrations.peft import maybe_load_adapters
from transformers.utils import cached_file

from ..configuration_hf_lm import READERS, HfLmConfig
from ..errors import InputError
from .families import FAMILIES, Family, family_of, read_config
from .folders import check_weight_files
from .weights import check_loaded, loading_conversions

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "gguf_file")


def conversions_name(family: Family) -> str:
    """What a family's conversions are registered under."""
    return f"{HfLmConfig.model_type}<{family.model_type}"


def source_config(name, load: Callable = PreTrainedConfig.get_config_dict, **kwargs) -> tuple[dict, dict]:
    """
    `PreTrainedConfig.get_config_dict`: what the `config.json` of any checkpoint says, and the arguments left over.

    Raises:
        InputError: it says nothing.
        OSError: there is none, or it is no JSON.
    """
    try:
        config_dict, left = load(name, **kwargs)
    except (TypeError, AttributeError) as error:
        raise InputError(f"{name}: config.json holds no JSON object.") from error
    return config_dict | gguf_head_dim(name, **kwargs), left


def gguf_head_dim(name, gguf_file: str | None = None, **kwargs) -> dict[str, int]:
    """`head_dim` as a GGUF file states it, where transformers takes its family's default instead; else nothing."""
    if gguf_file is None:
        return {}
    fields = gguf_fields(name, gguf_file, **kwargs)
    family = FAMILIES.get(fields["general.architecture"])
    size = fields.get(f"{family.model_type}.attention.key_length") if family and "head_dim" in family.fields else None
    return {} if size is None else {"head_dim": size}


def gguf_fields(name, gguf_file: str, **kwargs) -> dict[str, Any]:
    """What a GGUF file says in numbers and texts, not in lists, under its own keys."""
    path = cached_file(name, gguf_file, **{key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key)})
    return _fields_of(path, os.stat(path).st_mtime_ns)


@lru_cache(maxsize=2)  # a vocabulary takes seconds to read
def _fields_of(path: str, modified: int) -> dict[str, Any]:
    from gguf import GGUFReader, GGUFValueType

    fields = GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if GGUFValueType.ARRAY not in field.types}


def is_foreign(config_dict: dict) -> bool:
    return config_dict.get("model_type", HfLmConfig.model_type) != HfLmConfig.model_type


def read_config_file(load: Callable, name, for_model: bool = False, **kwargs) -> tuple[dict, dict]:
    """`HfLmConfig.get_config_dict`. `for_model`: let the config name the conversions of its family's weights."""
    config_dict, left = source_config(name, load, **kwargs)
    if for_model and is_foreign(config_dict):
        left = left | {"model_type": conversions_name(family_of(config_dict, str(name)))}
    return read_config(config_dict, str(name)), left


def read_model(load: Callable, name, *args, **kwargs):
    """
    `HfLmPreTrainedModel.from_pretrained`. A checkpoint that does not fit its configuration is an error, unless
    `ignore_mismatched_sizes=True` or `output_loading_info=True` asks for the model all the same.

    Raises:
        InputError: naming the file or the tensors.
    """
    kwargs.setdefault("use_safetensors", True)  # pickled weights only for who asks for them
    config, hub = kwargs.get("config"), {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key)}
    adapter, base, adapter_kwargs = maybe_load_adapters(name, hub, **(kwargs.get("adapter_kwargs") or {}))
    if adapter == base:  # a whole model with an adapter in its folder, which transformers adds
        adapter = None
    elif adapter is not None:
        name, kwargs = base, kwargs | {"adapter_kwargs": None}
    if kwargs.get("gguf_file"):
        name, kwargs = None, kwargs | _read_gguf(name, kwargs)
    elif name is None:
        return load(name, *args, **kwargs)
    elif isinstance(config, PreTrainedConfig):
        kwargs["config"] = _for_weights_of(name, config, hub)
    else:
        kwargs["for_model"] = True
    is_folder = name is not None and os.path.isdir(name)
    names = check_weight_files(Path(name, kwargs.get("subfolder") or "")) if is_folder else set()
    is_reporting = kwargs.pop("output_loading_info", False)
    is_tolerant = kwargs.pop("ignore_mismatched_sizes", False) or is_reporting
    model, info = load(name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    is_converted = _forget_conversions(model)
    if refused := vars(model).pop("refused_weights", None):
        layer, values = next(iter(refused.items()))
        raise InputError(
            f"{name}: {layer} has {', '.join(f'{key} {value}' for key, value in values.items())}; hf_lm reads xIELU only "
            "where its factors make it squared ReLU, as in the models that hf-lm export writes."
        )
    if not is_tolerant:
        has_head = is_converted or any(tensor.startswith("model.") for tensor in names)  # else: may be a base model's
        check_loaded(model, info, str(name or "the GGUF file"), ("lm_head.",) if has_head else ())
    if adapter is not None:  # after its base is checked
        options = {"adapter_name": kwargs.get("adapter_name"), "adapter_kwargs": adapter_kwargs, "dtype": model.dtype}
        info = model.load_adapter(adapter, **options).to_dict()
    return (model, info) if is_reporting else model


def _for_weights_of(name, config: PreTrainedConfig, hub: dict) -> PreTrainedConfig:
    """The given config, which names the conversions of the weights in a folder or on the Hub."""
    try:
        config_dict, _ = source_config(name, **hub)
    except OSError:  # for transformers to tell
        return config
    if is_foreign(config_dict):
        config = copy(config)
        config.model_type = conversions_name(family_of(config_dict, str(name)))
    return config


def _forget_conversions(model: PreTrainedModel) -> bool:
    """Give the configs inside a model their own type again; whether it was another."""
    is_converted = model.config.model_type != type(model.config).model_type
    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), HfLmConfig):
            vars(config).pop("model_type", None)
    if model.can_generate():  # transformers passes all arguments on
        vars(model.generation_config).pop("for_model", None)
    return is_converted


def _read_gguf(name, kwargs: dict) -> dict:
    """
    The arguments that stand for those of a GGUF file. transformers maps its names by the model's own type, and such a
    model cannot be saved: so it builds the family's model, whose tensors become ours without a copy.
    """
    shared = {key: kwargs.pop(key) for key in (*HUB_ARGUMENTS, "dtype", "device_map") if key in kwargs}
    native = AutoModelForCausalLM.from_pretrained(name, **shared, **gguf_head_dim(name, **shared))
    config_dict = native.config.to_dict()
    config_dict.pop("quantization_config", None)
    config = copy(kwargs.pop("config", None)) or HfLmConfig(**read_config(config_dict, str(name)))
    config.update({key: kwargs.pop(key) for key in list(kwargs) if hasattr(config, key)})
    config.model_type = conversions_name(family_of(config_dict, str(name)))
    return {"config": config, "state_dict": native.state_dict(), "dtype": native.dtype}


def install() -> None:
    """Let `HfLmConfig.from_pretrained` and `from_pretrained` of every model class read other families' checkpoints."""
    for family in FAMILIES.values():
        register_checkpoint_conversion_mapping(conversions_name(family), loading_conversions(family), overwrite=True)
    READERS.update(config=read_config_file, model=read_model)
