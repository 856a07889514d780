"""
hf_lm: a decoder-only Transformer language model that any Hugging Face tool takes as it is.

Importing the package registers its classes with `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and the other Auto
classes. The public names load on first use.
"""

import importlib
import os
import sys

__version__ = "0.1.0"

_MODULES = {
    "configuration_hf_lm": ("HfLmConfig",),
    "modeling_hf_lm": (
        "HfLmForCausalLM",
        "HfLmForQuestionAnswering",
        "HfLmForSequenceClassification",
        "HfLmForTokenClassification",
        "HfLmModel",
        "HfLmPreTrainedModel",
    ),
    "tokenization": ("train_tokenizer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", "register_auto_classes", *_MODULE_OF]


def register_auto_classes() -> None:
    """
    Make the Auto classes of transformers know hf_lm, and hf_lm's classes read the checkpoints of other families.
    Calling it again changes nothing.
    """
    import transformers

    from . import kernels
    from . import modeling_hf_lm as modeling
    from .configuration_hf_lm import HfLmConfig
    from .interop.weights import install

    kernels.enable()
    install()
    transformers.AutoConfig.register(HfLmConfig.model_type, HfLmConfig, exist_ok=True)
    HfLmConfig.register_for_auto_class("AutoConfig")
    for auto_class, path in modeling.AUTO_MAP.items():
        if auto_class != "AutoConfig":
            model_class = getattr(modeling, path.split(".")[1])
            getattr(transformers, auto_class).register(HfLmConfig, model_class, exist_ok=True)
            model_class.register_for_auto_class(auto_class)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# `hf-lm --help` has to answer before torch is loaded; the commands register by themselves (hf_lm/cli/__init__.py).
if os.path.splitext(os.path.basename(sys.argv[0] if sys.argv else ""))[0] not in ("hf-lm", "-m"):
    register_auto_classes()
