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
    "loading": ("load_model", "load_tokenizer", "register_auto_classes"),
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
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _is_command() -> bool:
    """Whether this process is `hf-lm` or `python -m hf_lm`, which has to answer `--help` before torch is loaded."""
    name = os.path.basename((sys.argv or [""])[0])
    if name == "-m":  # Python is still looking for the module: the name of it stands on its own command line
        return "-m" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("-m") + 1] == "hf_lm"
    return name in ("hf-lm", "hf-lm.exe", "hf-lm-script.py")


if not _is_command():  # the commands register when they load a model
    from .loading import register_auto_classes

    register_auto_classes()
