"""
Load a model and its tokenizer with all checks, for the command line and for Python; register hf_lm's Auto classes.

Nothing here imports torch before a function is called: `hf-lm --help` has to answer at once.
"""

import importlib.util
import os
from pathlib import Path

from .errors import InputError
from .files import read_json
from .interop.folders import check_weight_files, is_missing_folder, outside_paths


def register_auto_classes() -> None:
    """
    Make the Auto classes of transformers know hf_lm, and hf_lm's classes read the checkpoints of other families and
    compute by `kernels`. Calling it again changes nothing.
    """
    import transformers

    from . import kernels
    from . import modeling_hf_lm as modeling
    from .configuration_hf_lm import AUTO_MAP, HfLmConfig
    from .interop.reader import install

    kernels.enable()
    install()
    transformers.AutoConfig.register(HfLmConfig.model_type, HfLmConfig, exist_ok=True)
    HfLmConfig.register_for_auto_class("AutoConfig")
    for auto_class, path in AUTO_MAP.items():
        if auto_class != "AutoConfig":
            model_class = getattr(modeling, path.split(".")[1])
            getattr(transformers, auto_class).register(HfLmConfig, model_class, exist_ok=True)
            model_class.register_for_auto_class(auto_class)


def register_with_vllm() -> None:
    """
    Let vLLM load hf_lm models without `trust_remote_code`. vLLM calls this in each of its processes, since
    pyproject.toml names it as a plugin. Without vLLM it is `register_auto_classes`.
    """
    register_auto_classes()
    if importlib.util.find_spec("vllm") is None:
        return
    from vllm import ModelRegistry

    ModelRegistry.register_model("HfLmForCausalLM", "vllm.model_executor.models.transformers:TransformersForCausalLM")


def require_model(path: str) -> str:
    """
    The path or Hub id of a model, checked as far as that is possible without loading it.

    Raises:
        InputError: the folder does not exist, holds no config or no weights, or names files outside of itself.
    """
    if not os.path.isdir(path):
        if is_missing_folder(path) or os.path.exists(path) or path.count("/") == 0:
            raise InputError(f"{path}: no such model folder (a model of the Hub is named owner/name).")
        return path
    names = os.listdir(path)
    if not {"config.json", "adapter_config.json"} & set(names):
        raise InputError(f"{path}: not a model folder, it has no config.json.")
    if not any(name.endswith((".safetensors", ".safetensors.index.json", ".gguf")) for name in names):
        raise InputError(f"{path}: the model folder has no weights (model.safetensors).")
    if outside := outside_paths(Path(path)):
        raise InputError(f"{path}: the model folder names files outside of itself: {'; '.join(outside)}.")
    base = read_json(Path(path) / "adapter_config.json").get("base_model_name_or_path")
    if base and not os.path.isdir(base):
        from .interop.adapters import base_of

        if (found := base_of(path)) != base:
            raise InputError(
                f"{path}: its base model {base} is not in the current folder, but {found}: write that into "
                "base_model_name_or_path of adapter_config.json, or use the output of hf-lm merge."
            )
        try:
            require_model(base)
        except InputError as error:
            raise InputError(
                f"{path}: names a base model in adapter_config.json that is not there: {error}"
            ) from error
    return path


def _or_out_of_reach(path: str, error: InputError) -> InputError:
    """The error; but of a Hub model that was never downloaded, while the Hub must not be asked, one with the way out."""
    if os.path.isdir(path) or os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        return error
    return InputError(
        f"{path}: the model is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub. Run `hf download {path}` "
        "without it once."
    )


def load_model(path: str, auto_class: str = "AutoModelForCausalLM", **kwargs):
    """
    Load the model in a folder or on the Hub, in evaluation mode, on the GPU if there is one and no `device_map`.

    Args:
        path: a model of hf_lm or of any family of transformers, or an adapter; folder or Hub id.
        auto_class: name of the Auto class of transformers; the default loads language models only.
        kwargs: of `from_pretrained`, such as `dtype`.

    Raises:
        InputError: see `require_model`; or the files cannot be read as a model, lack weights or have others than the
            config describes, an adapter was made for other weights, or the model has another head.
    """
    require_model(path)
    register_auto_classes()
    import torch
    import transformers

    from .interop.adapters import check_base
    from .interop.convert import readable
    from .interop.heads import check_is_language_model
    from .interop.weights import check_loaded

    if os.path.isdir(path):
        check_weight_files(Path(path))
    if auto_class == "AutoModelForCausalLM":
        with readable(path):
            check_is_language_model(path, "hf-lm demo and the pipelines of transformers use it.")
    try:
        with readable(path):
            model, info = getattr(transformers, auto_class).from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except InputError as error:
        raise _or_out_of_reach(path, error) from error
    check_loaded(model, info, path)
    check_base(path, model)
    _check_token_ids(model, path)
    is_placed = "device_map" in kwargs or not torch.cuda.is_available()
    return model.eval() if is_placed else model.to("cuda").eval()


def _check_token_ids(model, path: str) -> None:
    """
    Raises:
        InputError: a special token of generation_config.json, with which generation would end in a crash, is no number.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(getattr(model, "generation_config", None), name, None)
        if not all(isinstance(one, int | None) for one in (value if isinstance(value, list) else [value])):
            raise InputError(f"{path}: generation_config.json: {name} must be a token's number, got {value!r:.60}.")


def load_tokenizer(path: str):
    """
    Load the tokenizer of a model in a folder or on the Hub.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    register_auto_classes()  # else transformers asks whether it may run the folder's copy of our code
    from .interop.convert import find_tokenizer, readable

    with readable(path):
        tokenizer = find_tokenizer(path)
    if tokenizer is None:
        raise _or_out_of_reach(path, InputError(f"{path}: there is no tokenizer (tokenizer.json)."))
    return tokenizer
