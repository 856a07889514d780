"""The weights of other families: converted while transformers loads them, and back; and whether all are there."""

import ctypes
import re
import sys
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform

from ..errors import InputError
from ..modeling_hf_lm import HfLmPreTrainedModel
from .family import Constants, Family, Fused

QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
# Buffers in published files that are computed nowadays; they carry nothing that was learned.
WITHOUT_CONTENT = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|rotary_emb\.")
PAGE_OUT = 21  # MADV_PAGEOUT of Linux


class ToLinear(ConversionOps):
    """
    One tensor `(parts * rows, columns)`, or its bias, as those of linear layers.

    Args:
        per_head: the rows are ordered by head and then by part; else by part (see `Fused`).
        transposed: the tensor is `(columns, parts * rows)`.
    """

    def __init__(self, per_head: bool, transposed: bool):
        self.per_head, self.transposed = per_head, transposed

    @torch.no_grad
    def convert(self, input_dict, source_patterns, target_patterns, config, **kwargs):
        (tensor,) = input_dict.values()
        source = tensor[0] if isinstance(tensor, list) else tensor
        tensor = source.T if self.transposed else source
        groups = config.num_attention_heads if self.per_head else 1
        if len(tensor) % (groups * len(target_patterns)):  # told as a wrong shape
            return dict.fromkeys(target_patterns, tensor)
        parts = tensor.unflatten(0, (groups, len(target_patterns), -1)).unbind(1)
        copies = [torch.empty_like(part, memory_format=torch.contiguous_format).copy_(part) for part in parts]
        page_out(source)
        return {name: part.flatten(0, 1) for name, part in zip(target_patterns, copies, strict=True)}


class DropConstants(ConversionOps):
    """A linear layer's weight without the constants beside it; those of other values are told to `refused_weights`."""

    def __init__(self, constants: Constants):
        self.constants = constants

    @torch.no_grad
    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name, model, **kwargs):
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        weight = tensors.pop(source_patterns[0])
        found = dict(zip(self.constants.values, map(tensors.get, source_patterns[1:]), strict=True))
        if tensors and not all(_is(found[name], value) for name, value in self.constants.values.items()):
            values = {name: "missing" if one is None else f"{one.item():.6g}" for name, one in found.items()}
            layer = full_layer_name.replace(f"{self.constants.beside}.weight", self.constants.module)
            model.refused_weights = {**getattr(model, "refused_weights", {}), layer: values}
        return {target_patterns[0]: weight}


def _is(tensor: torch.Tensor | None, value: float | list[float]) -> bool:
    """Whether a tensor is a constant, perhaps rounded to 16 bits on the way."""
    types = (torch.float32, torch.bfloat16, torch.float16)
    return tensor is not None and any(torch.equal(tensor, torch.tensor(value).to(one).to(tensor)) for one in types)


def page_out(tensor: torch.Tensor) -> None:
    """Return the memory of a tensor that is mapped from a file, where the system can: its copies replace it."""
    if sys.platform == "linux" and tensor.device.type == "cpu":
        start = -(-tensor.data_ptr() // 4096) * 4096
        size = tensor.data_ptr() + tensor.nbytes - start
        if size > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), PAGE_OUT)


def conversions(family: Family) -> list[WeightTransform]:
    """The rows of a family's table as transforms of transformers, from their layout to ours."""
    transforms: list[WeightTransform] = []
    for theirs, ours in family.weights.items():
        source, transposed = theirs.replace(".", r"\."), theirs in family.conv1d
        if isinstance(ours, Constants):
            weight = f"{ours.beside}.weight"
            names = [weight, *(f"{theirs}.{name}" for name in ours.values)]
            transforms.append(
                WeightConverter([name.replace(".", r"\.") for name in names], weight, [DropConstants(ours)])
            )
            continue
        if not transposed and isinstance(ours, str):
            transforms.append(WeightRenaming(source, ours))
            continue
        targets, per_head = (QKV, ours.per_head) if isinstance(ours, Fused) else ([ours], False)
        for kind in ("weight", "bias"):
            split = ToLinear(per_head, transposed and kind == "weight")
            transforms.append(WeightConverter(rf"{source}\.{kind}", [f"{name}.{kind}" for name in targets], [split]))
    return transforms


def loading_conversions(family: Family) -> list[WeightTransform]:
    """As `conversions`, and what only published files need: other names, and files of a model without or with a head."""
    aliases = dict(family.load_only)
    prefix = family.base_prefix + "."
    if prefix == "model.":  # question answering of some families
        aliases[r"^transformer\.(embed_tokens|layers|norm)\."] = r"model.\1."
    if family.token_score != "score":
        aliases[rf"^{family.token_score}\."] = "score."
    tops = sorted({name.removeprefix(prefix).split(".")[0] for name in family.weights if name.startswith(prefix)})
    if tops and prefix != "model.":
        aliases[rf"^({'|'.join(tops)})\."] = rf"{prefix}\1."
    return [*(WeightRenaming(source, target) for source, target in aliases.items()), *conversions(family)]


def native_state_dict(model: HfLmPreTrainedModel, family: Family, head: str | None) -> dict[str, torch.Tensor]:
    """The weights of an hf_lm model under the names and in the layouts of a family's class with this head."""
    names = {ours: theirs for theirs, ours in family.weights.items() if isinstance(ours, str)}
    fused = next(((theirs, ours) for theirs, ours in family.weights.items() if isinstance(ours, Fused)), None)
    weights, native = model.state_dict(), {}
    for name in list(weights):
        if name not in weights:  # already part of a fused one
            continue
        tensor = weights.pop(name)
        if fused and QKV[0] in name:
            rest = [weights.pop(name.replace(QKV[0], other)) for other in QKV[1:]]
            groups = model.config.num_attention_heads if fused[1].per_head else 1
            tensor = torch.stack([part.unflatten(0, (groups, -1)) for part in (tensor, *rest)], dim=1).flatten(0, 2)
            name = name.replace(QKV[0], fused[0])
        for ours, theirs in names.items():
            name = name.replace(f"{ours}.", f"{theirs}.")
        if name.endswith(tuple(f"{layer}.weight" for layer in family.conv1d)):
            tensor = tensor.T.contiguous()
        native[name] = tensor
    constants = _constants(list(native), family, model.config.hidden_act)
    native |= {name: tensor.to(model.device, model.dtype) for name, tensor in constants.items()}
    renamed = {family.base_prefix: family.native_class(head).base_model_prefix}
    if head == "ForTokenClassification":
        renamed["score"] = family.token_score
    parts = {name: name.partition(".") for name in native}
    return {f"{renamed.get(top, top)}{dot}{rest}": native[name] for name, (top, dot, rest) in parts.items()}


def _constants(names: Iterable[str], family: Family, act: str) -> dict[str, torch.Tensor]:
    """The constants, in float32 and by name, of a family's model with these weights and our activation `act`."""
    found = {}
    for constants in family.weights.values():
        if isinstance(constants, Constants) and constants.act == act:
            beside = f"{constants.beside}.weight"
            layers = [name.replace(beside, constants.module) for name in names if name.endswith(beside)]
            found |= {
                f"{layer}.{key}": torch.tensor(value) for layer in layers for key, value in constants.values.items()
            }
    return found


def to_write(native: PreTrainedModel, ours: HfLmPreTrainedModel, family: Family) -> dict[str, torch.Tensor]:
    """
    The weights of a family's model as a file should hold them: constants in float32. Rounded to 16 bits they are another
    factor for a program that computes with them in float32, as llama.cpp does.
    """
    weights = native.state_dict()
    return weights | _constants(list(weights), family, ours.config.hidden_act)


class WeightsError(InputError, RuntimeError):
    """Weights that do not fit; also the RuntimeError that callers of `from_pretrained` expect here."""


def check_loaded(model: PreTrainedModel, info: dict, source: str, heads: tuple[str, ...] = ("",)) -> None:
    """
    Weights that are missing, left over or of another shape are an error.

    Args:
        info: what `output_loading_info=True` gives.
        heads: what the names of weights outside the decoder that must be there start with. (A new classification head
            may be without weights, and `lm_head`, too, if the file is that of a base model.) Default: all.

    Raises:
        InputError: naming the tensors.
    """
    base = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    missing = [name for name in info["missing_keys"] if name.startswith((base, *heads))]
    unexpected = [name for name in info["unexpected_keys"] if name.startswith(base) or "layers." in name]
    if not isinstance(model, HfLmPreTrainedModel):  # published checkpoints carry what only their training needs
        unexpected = []
    elif not base:
        unexpected = [name for name in unexpected if not re.match(r"(lm_head|score|qa_outputs|classifier)\.", name)]
    unexpected = [name for name in unexpected if not WITHOUT_CONTENT.search(name)]
    shapes = [f"{name} {tuple(got)} instead of {tuple(want)}" for name, got, want in info["mismatched_keys"]]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    texts = [f"{what}: {_listed(sorted(names))}" for what, names in problems.items() if names]
    if texts:
        raise WeightsError(f"{source}: the tensors do not fit the configuration; " + "; ".join(texts))


def _listed(names: list[str], limit: int = 8) -> str:
    names = [" ".join(name.split()) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
