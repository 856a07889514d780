"""Where a trained model can run without hf_lm, with the commands that take it there."""

import shlex
from dataclasses import MISSING, fields
from pathlib import Path

from ..configuration_hf_lm import HfLmConfig
from ..errors import InputError
from ..files import library_is_silent, read_json
from .families import choose_family
from .family import Family
from .gguf_models import gguf_model
from .heads import class_name, head_of


def where_it_runs(folder: str | Path) -> str:
    """
    One or two lines on a finished run: the native class and the GGUF architecture that hold the model, each with the
    command that writes it; or which option is in the way of all.

    Args:
        folder: of a model or an adapter.
    """
    folder = Path(folder)
    source = shlex.quote(str(folder))
    if (folder / "adapter_config.json").exists():
        return f"Runs elsewhere once merged: hf-lm merge {source} {shlex.quote(f'{folder}-merged')}, then hf-lm export"
    saved = read_json(folder / "config.json")
    if saved.get("model_type") != HfLmConfig.model_type:
        return f"Runs without hf_lm as it is: {class_name(saved)} of transformers"
    head = head_of(saved, str(folder))
    with library_is_silent():
        config = HfLmConfig.from_pretrained(folder)
        try:
            family = choose_family(config, head=head)
        except InputError as error:
            return f"Runs with hf_lm only: {error}"
        served = " and vLLM" if head is None and _has_usual_activation(family, config) else ""
        native = family.native_class(head).__name__
        lines = [
            f"Runs without hf_lm in transformers{served} as {native}: hf-lm export {source} "
            + shlex.quote(f"{folder}-native")
        ]
        if head is None and (architecture := _gguf(config)):
            lines.append(
                f"Runs without hf_lm in llama.cpp and Ollama as GGUF of {architecture}: hf-lm export {source} "
                + shlex.quote(f"{folder}.gguf")
            )
    return "\n".join(lines)


def _has_usual_activation(family: Family, config: HfLmConfig) -> bool:
    """Whether the activation is the one that the family's configuration has by default: vLLM knows no other."""
    theirs, names = family.from_hf_lm(config), ("hidden_act", "hidden_activation", "activation_function")
    defaults = {
        item.name: item.default for item in fields(theirs) if item.name in names and item.default is not MISSING
    }
    return all(getattr(theirs, name) == default for name, default in defaults.items())


def _gguf(config: HfLmConfig) -> str | None:
    """The GGUF architecture of a model, None if there is none."""
    try:
        return gguf_model(config).architecture
    except InputError:
        return None
