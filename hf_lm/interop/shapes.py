"""New models in the shape of a family: its fields, read through its table into those of `HfLmConfig`."""

from copy import copy
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from ..configuration_hf_lm import HfLmConfig
from ..errors import InputError, explained
from ..files import library_is_silent
from ..synonyms import FIELDS, closest
from .families import FAMILIES
from .family import PLAIN, WITHOUT_EFFECT_ON_LOGITS, Family

# What a new model takes from its recipe and from HfLmConfig, and not from the family: a Llama need not have 7B parameters.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
# Names of published config.json files that transformers reads into `rope_parameters`, and where.
ROTARY = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
    "rope_scaling": None,
}


def check_architecture(name: str) -> None:
    """
    Raises:
        InputError: it is no family of the table; names the nearest one.
    """
    if name not in FAMILIES:
        close = closest(name, FAMILIES, {})
        meant = f"; did you mean {close!r}?" if close else "."
        raise InputError(f"architecture: must be one of {', '.join(FAMILIES)}, got {name!r}{meant}")


def new_fields(architecture: str, overrides: dict[str, Any], **given) -> dict[str, Any]:
    """
    The fields of `HfLmConfig` for a new model in the shape of a family: sizes, dropouts and initial weights as in any new
    model, all else as in the family's own configuration, with the fields that `overrides` names.

    Args:
        architecture: a key of `FAMILIES`.
        overrides: fields under the family's names or ours.
        given: fields of `HfLmConfig` that overrides win over, such as the size of the vocabulary.

    Raises:
        InputError: unknown family; a field that the family does not have, or that nothing here expresses; a wrong value.
    """
    check_architecture(architecture)
    family = FAMILIES[architecture]
    named = _their_names(family, overrides)
    own = {name: named.pop(name) for name in WITHOUT_EFFECT_ON_LOGITS if name in named and name not in _names(family)}
    with explained("config_overrides"), library_is_silent():
        theirs = _configuration(family, named, given)
        ours = family.to_hf_lm(theirs)
        for name in named.keys() - family.field_pairs().values():
            _check_effect(family, name, named, given, theirs)
    read = family.field_pairs()
    ours |= {
        name: getattr(HfLmConfig, name)
        for name in WITHOUT_EFFECT_ON_LOGITS
        if name not in given and read.get(name) not in named
    }
    return ours | own | {"native_family": architecture}


def _names(family: Family) -> set[str]:
    """All fields that a configuration of the family may have."""
    names = {item.name for item in fields(family.config_class)}
    return names | set(ROTARY) if "rope_parameters" in names else names


def _their_names(family: Family, overrides: dict[str, Any]) -> dict[str, Any]:
    """
    The overrides with the family's names for fields, and ours for what only training needs.

    Raises:
        InputError: there is no such field, or one is named twice.
    """
    pairs, known, named = family.field_pairs(), _names(family), {}
    for name, value in overrides.items():
        theirs = name if name in known else pairs.get(name, name if name in WITHOUT_EFFECT_ON_LOGITS else None)
        if theirs is None:
            close = closest(name, known | pairs.keys(), FIELDS)
            meant = f"; did you mean {close!r}?" if close else "."
            raise InputError(f"config_overrides: {family.config_class.__name__} has no field {name}{meant}")
        if theirs in named:
            raise InputError(f"config_overrides: {name} is another name of {theirs}, which is there too; name one.")
        named[theirs] = value
    return named


def _configuration(family: Family, named: dict[str, Any], given: dict[str, Any]) -> PreTrainedConfig:
    """Their configuration: their defaults, our sizes, what is given, and over all of them what is named."""
    pairs = family.field_pairs()
    sizes = {name: named[pairs[name]] for name in SIZES if pairs.get(name) in named}
    base = HfLmConfig(**(PLAIN | dict(family.fixed) | given | sizes))
    written = family.write(base)
    # Fields that follow from the sizes by a rule: those that change with the width of the MLP or the attention's scale.
    wider, scaled = copy(base), copy(base)
    wider.intermediate_size, scaled.attention_multiplier = base.intermediate_size + 32, 1.0
    names = {pairs[name] for name in (*SIZES, *given) if pairs.get(name)}
    names |= {
        name for name in _names(family) for other in (wider, scaled) if _differ(written, family.write(other), name)
    }
    values = {name: getattr(written, name) for name in names}
    rope = getattr(family.config_class(), "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":  # scaled to contexts that a new model has not
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return family.config_class(**(values | named))


def _differ(one: Any, other: Any, name: str) -> bool:
    return getattr(one, name, None) != getattr(other, name, None)


def _check_effect(family: Family, name: str, named: dict, given: dict, theirs: PreTrainedConfig) -> None:
    """
    Raises:
        InputError: a value is not the family's default, and yet changes nothing in our configuration.
    """
    without = _configuration(family, {key: value for key, value in named.items() if key != name}, given)
    usual = without.rope_parameters.get(ROTARY[name]) if name in ROTARY else getattr(without, name, None)
    if named[name] != usual and family.to_hf_lm(theirs) == family.to_hf_lm(without):
        raise InputError(
            f"config_overrides: {name} of {family.config_class.__name__} changes nothing in a model of hf_lm with these "
            "options."
        )
