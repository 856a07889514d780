"""
The weights of other families, converted while the library loads them, and back.

`install` teaches the classes of hf_lm to read a foreign folder or Hub id as it is: the configuration goes through the
tables of `families`, each weight through the library's own `WeightRenaming` and `WeightConverter`. It sits above the
model, whose two files go to the Hub and know nothing of it.
"""

import json
import os
import re
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    revert_weight_conversion,
)
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import cached_file

from ..configuration_hf_lm import HfLmConfig
from ..errors import InputError
from ..modeling_hf_lm import HfLmPreTrainedModel
from .families import FAMILIES, Family, Fused, family_of, read_config

QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
# Buffers in published files that are computed nowadays; they carry nothing that was learned.
WITHOUT_CONTENT = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|rotary_emb\.")
CONFIG_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "gguf_file")


class SplitQkv(ConversionOps):
    """One projection `(3 * heads * head_dim, hidden)`, or its bias, into query, key and value (see `Fused`)."""

    def __init__(self, per_head: bool, transposed: bool):
        self.per_head, self.transposed = per_head, transposed

    @torch.no_grad
    def convert(self, input_dict, source_patterns, target_patterns, config, **kwargs):
        (tensor,) = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        tensor = tensor.T if self.transposed else tensor
        groups = config.num_attention_heads if self.per_head else 1
        parts = tensor.unflatten(0, (groups, 3, -1)).unbind(1)
        copies = (torch.empty_like(part, memory_format=torch.contiguous_format).copy_(part) for part in parts)
        return {name: part.flatten(0, 1) for name, part in zip(target_patterns, copies, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return FuseQkv(self.per_head, self.transposed)


class FuseQkv(SplitQkv):
    """The reverse of `SplitQkv`."""

    @torch.no_grad
    def convert(self, input_dict, source_patterns, target_patterns, config, **kwargs):
        groups = config.num_attention_heads if self.per_head else 1
        parts = [input_dict[name] for name in source_patterns]
        parts = [(part[0] if isinstance(part, list) else part).unflatten(0, (groups, -1)) for part in parts]
        tensor = torch.stack(parts, dim=1).flatten(0, 2)
        return {target_patterns[0]: tensor.T.contiguous() if self.transposed else tensor}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitQkv(self.per_head, self.transposed)


def conversions(family: Family) -> list[WeightTransform]:
    """The rows of a family's table as transforms of the library, from their layout to ours."""
    transforms: list[WeightTransform] = []
    for theirs, ours in family.weights.items():
        source, transposed = theirs.replace(".", r"\."), theirs in family.conv1d
        if isinstance(ours, Fused):
            for kind in ("weight", "bias"):
                split = SplitQkv(ours.per_head, transposed and kind == "weight")
                transforms.append(WeightConverter(rf"{source}\.{kind}", [f"{name}.{kind}" for name in QKV], [split]))
        elif transposed:
            transforms.append(WeightConverter(rf"{source}\.weight", f"{ours}.weight", [Transpose(0, 1)]))
            transforms.append(WeightRenaming(rf"{source}\.bias", f"{ours}.bias"))
        else:
            transforms.append(WeightRenaming(source, ours))
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
    before = getattr(model, "_weight_conversions", None)
    model._weight_conversions = conversions(family)
    try:
        weights = revert_weight_conversion(model, model.state_dict())
    finally:
        model._weight_conversions = before
    renamed = {family.base_prefix: family.native_class(head).base_model_prefix}
    if head == "ForTokenClassification":
        renamed["score"] = family.token_score
    parts = {name: name.partition(".") for name in weights}
    return {f"{renamed.get(top, top)}{dot}{rest}": weights[name] for name, (top, dot, rest) in parts.items()}


def check_files(files: list[str]) -> set[str]:
    """
    The names of the tensors in safetensors files.

    Raises:
        InputError: a weight file is missing, no safetensors file at all (a git-lfs pointer, a web page), or cut short.
    """
    names: set[str] = set()
    for file in filter(lambda name: str(name).endswith(".safetensors"), files):
        if not os.path.isfile(file):
            raise InputError(f"{file}: listed in the index of the checkpoint, but there is no such file.")
        with open(file, "rb") as stream:
            head = stream.read(64)
        if head.startswith(b"version https://git-lfs"):
            raise InputError(f"{file}: a git-lfs pointer instead of weights; fetch the file itself (git lfs pull).")
        if head.lstrip()[:1] == b"<":
            raise InputError(f"{file}: a web page (HTML) instead of weights; download the file itself.")
        try:
            with safe_open(file, framework="pt") as opened:
                names.update(opened.keys())
        except SafetensorError as error:
            size = os.path.getsize(file)
            raise InputError(f"{file}: {size} bytes that are no complete safetensors file ({error}).") from error
    return names


class MappedTensor:
    """
    One tensor of a safetensors file, mapped into memory by itself: once it is converted, its pages go. (In a mapping of
    the whole file they would stay beside the converted copies.) Stands in for the slice that `safe_open` gives.
    """

    def __init__(self, file: str, start: int, dtype: str, shape: list[int], data_offsets: list[int]):
        self.file, self.dtype, self.shape = file, dtype, shape
        self.start, self.size = start + data_offsets[0], data_offsets[1] - data_offsets[0]

    def __getitem__(self, index) -> torch.Tensor:
        if self.size == 0:
            return torch.empty(self.shape, dtype=str_to_torch_dtype[self.dtype])[index]
        data = np.memmap(self.file, np.uint8, mode="c", offset=self.start, shape=(self.size,))
        return torch.from_numpy(data).view(str_to_torch_dtype[self.dtype]).view(self.shape)[index]

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype


def mapped_tensors(file: str) -> dict[str, MappedTensor]:
    """All tensors of a safetensors file (its header is the length and then JSON)."""
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {name: MappedTensor(file, 8 + size, **entry) for name, entry in header.items()}


def check_index(folder: str) -> None:
    """
    Raises:
        InputError: the index of a sharded checkpoint is no index, or names a file outside its folder.
    """
    for path in sorted(Path(folder).glob("*.safetensors.index.json")):
        try:
            files = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path}: no index of a sharded checkpoint, it needs a weight_map of tensors to files ({error!r})."
            ) from error
        for name in files:
            if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
                raise InputError(f"{path}: weight_map names {name!r}; only safetensors files beside it are allowed.")
        check_files([str(path.parent / name) for name in sorted(files)])


class WeightsError(InputError, RuntimeError):
    """Weights that do not fit; also the RuntimeError that callers of `from_pretrained` expect here."""


def check_loaded(model: PreTrainedModel, info, source: str, heads: tuple[str, ...]) -> None:
    """
    Weights that are missing, left over or of another shape are an error.

    Args:
        heads: what the names of weights outside the decoder that must be there start with. (A new classification head
            may be without weights, and `lm_head`, too, if the file is that of a base model.)

    Raises:
        InputError: naming the tensors.
    """
    base = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    pairs = getattr(model, "all_tied_weights_keys", {})  # of a pair, the file may hold either
    tied = set(pairs) | {source for target, source in pairs.items() if target not in info.missing_keys}
    missing = [name for name in set(info.missing_keys) - tied if name.startswith((base, *heads))]
    unexpected = [name for name in info.unexpected_keys if name.startswith(base) or "layers." in name]
    if not base:
        unexpected = [name for name in unexpected if not re.match(r"(lm_head|score|qa_outputs|classifier)\.", name)]
    unexpected = [name for name in unexpected if not WITHOUT_CONTENT.search(name)]
    shapes = [f"{name} {tuple(got)} instead of {tuple(want)}" for name, got, want in info.mismatched_keys]
    broken = [f"{name} ({error})" for name, error in info.conversion_errors.items()]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "not convertible": broken}
    texts = [f"{what}: {_listed(sorted(names))}" for what, names in problems.items() if names]
    if texts:
        raise WeightsError(f"{source}: the tensors do not fit the configuration; " + "; ".join(texts))


def check_complete(model: PreTrainedModel, info: dict, source: str) -> None:
    """
    As `check_loaded`, for a model that is used as it is (of any family): nothing may be missing, its head included.

    Args:
        info: what `output_loading_info=True` gives.

    Raises:
        InputError: naming the tensors.
    """
    if missing := sorted(info["missing_keys"]):
        raise WeightsError(f"{source}: the weights lack {_listed(missing)}.")
    if not isinstance(model, HfLmPreTrainedModel):  # published checkpoints carry what only their training needs
        info = info | {"unexpected_keys": set()}
    check_loaded(model, SimpleNamespace(**info, conversion_errors={}), source, heads=("",))


def _listed(names: list[str], limit: int = 8) -> str:
    names = [" ".join(name.split()) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# The family of the checkpoint that this thread is loading, None if it is one of hf_lm itself.
_loading: ContextVar[Family | None] = ContextVar("family", default=None)
# Whether the caller asked for `output_loading_info`, and so looks at what is missing without our help.
_reporting: ContextVar[bool] = ContextVar("reporting", default=False)


def source_config(name, cls: type[PreTrainedConfig] = PreTrainedConfig, **kwargs) -> tuple[dict, dict]:
    """
    `PreTrainedConfig.get_config_dict`: what the `config.json` of any checkpoint says, and the arguments left over.

    Raises:
        InputError: it says nothing.
        OSError: there is none, or it is no JSON.
    """
    try:
        config_dict, left = PreTrainedConfig.get_config_dict.__func__(cls, name, **kwargs)
    except (TypeError, AttributeError) as error:
        raise InputError(f"{name}: config.json holds no JSON object.") from error
    return config_dict | gguf_head_dim(name, **kwargs), left


def gguf_head_dim(name, gguf_file: str | None = None, **kwargs) -> dict[str, int]:
    """`head_dim` as a GGUF file states it, where transformers takes its family's default instead; else nothing."""
    if gguf_file is None:
        return {}
    from gguf import GGUFReader

    options = {key: kwargs[key] for key in CONFIG_ARGUMENTS if kwargs.get(key)}
    fields = GGUFReader(cached_file(name, gguf_file, **options)).fields
    family = FAMILIES.get(fields["general.architecture"].contents())
    size = fields.get(f"{family.model_type}.attention.key_length") if family and "head_dim" in family.fields else None
    return {} if size is None else {"head_dim": size.contents()}


def _source_family(name, kwargs: dict) -> Family | None:
    """The family of a folder, file or Hub id; None if that is for the library to find out (hf_lm, adapters, errors)."""
    if name is None:
        return None
    try:
        config_dict, _ = source_config(name, **{key: kwargs[key] for key in CONFIG_ARGUMENTS if kwargs.get(key)})
    except OSError:
        return None
    if config_dict.get("model_type", HfLmConfig.model_type) == HfLmConfig.model_type:
        return None
    return family_of(config_dict, str(name))


@classmethod
def _get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
    config_dict, kwargs = source_config(pretrained_model_name_or_path, cls, **kwargs)
    return read_config(config_dict, str(pretrained_model_name_or_path)), kwargs


@classmethod
def _from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
    name = pretrained_model_name_or_path
    kwargs.setdefault("use_safetensors", True)  # pickled weights only for who asks for them
    load = PreTrainedModel.from_pretrained.__func__
    if kwargs.get("gguf_file"):
        # The library maps a GGUF file's names by the model's own type, and such a model cannot be saved: let it build
        # the family's model, whose tensors become ours without a copy.
        shared = {key: kwargs.pop(key) for key in (*CONFIG_ARGUMENTS, "dtype", "device_map") if key in kwargs}
        native = AutoModelForCausalLM.from_pretrained(name, **shared, **gguf_head_dim(name, **shared))
        config_dict = native.config.to_dict()
        config_dict.pop("quantization_config", None)
        family = family_of(config_dict, str(name))
        config = kwargs.pop("config", None) or HfLmConfig(**read_config(config_dict, str(name)))
        config.update({key: kwargs.pop(key) for key in list(kwargs) if hasattr(config, key)})
        name, kwargs = None, kwargs | {"config": config, "state_dict": native.state_dict(), "dtype": native.dtype}
    else:
        family = _source_family(name, kwargs)
        if name is not None and os.path.isdir(name):
            check_index(os.path.join(name, kwargs.get("subfolder") or ""))
    tokens = _loading.set(family), _reporting.set(bool(kwargs.get("output_loading_info")))
    try:
        return load(cls, name, *args, **kwargs)
    finally:
        _loading.reset(tokens[0])
        _reporting.reset(tokens[1])


@staticmethod
def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
    family = _loading.get()
    source = str(load_config.pretrained_model_name_or_path or (checkpoint_files or ["the weights"])[0])
    if family is not None:
        mapping = get_checkpoint_conversion_mapping(_key(family))
        load_config = replace(load_config, weight_mapping=[*mapping, *(load_config.weight_mapping or [])])
    names = check_files(checkpoint_files or [])
    if names and family is not None and family.copies_weights:
        state_dict = {name: tensor for file in checkpoint_files for name, tensor in mapped_tensors(file).items()}
    load = PreTrainedModel._load_pretrained_model
    info, offload_index = load(model, state_dict, checkpoint_files, load_config, expected_keys)
    if family is not None:
        model._weight_conversions = None  # so that `save_pretrained` writes the layout that fits our config
    if getattr(model, "_hf_peft_config_loaded", False):  # the files are an adapter's: the library checks them
        return info, offload_index
    if not load_config.ignore_mismatched_sizes and not _reporting.get() and (family is not None or checkpoint_files):
        with_head = family is not None or any(name.startswith("model.") for name in names)
        check_loaded(model, info, source, ("lm_head.",) if with_head else ())
    return info, offload_index


def _key(family: Family) -> str:
    return f"{HfLmConfig.model_type}<{family.model_type}"


@cache
def install() -> None:
    """
    Let `HfLmConfig.from_pretrained` and `from_pretrained` of every model class read other families' checkpoints.

    A checkpoint that does not fit its configuration is an error, unless `ignore_mismatched_sizes=True` or
    `output_loading_info=True` asks for the model all the same.
    """
    for family in FAMILIES.values():
        register_checkpoint_conversion_mapping(_key(family), loading_conversions(family), overwrite=True)
    HfLmConfig.get_config_dict = _get_config_dict
    HfLmPreTrainedModel.from_pretrained = _from_pretrained
    HfLmPreTrainedModel._load_pretrained_model = _load_pretrained_model
