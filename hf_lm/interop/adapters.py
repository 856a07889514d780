"""Adapters by `peft`, such as LoRA (arXiv:2106.09685): add one to a model, merge one into the weights."""

import hashlib
import os
import re
import warnings
from copy import deepcopy
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..errors import InputError, explained, one_line
from ..files import read_json
from .heads import ADAPTER_TASKS
from .parity import compare

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING = re.compile(r"(embed_tokens|lm_head)(\.base_layer|\.modules_to_save)?\.weight$")
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
        part = weights[name].detach().flatten()[:SAMPLED]
        if not len(part) or part.is_meta or part.dtype == torch.float16:
            return None
        digest.update(name.encode() + part.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
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
    if os.path.isdir(model.name_or_path):  # found from any folder
        adapted.peft_config["default"].base_model_name_or_path = os.path.abspath(model.name_or_path)
    return adapted


def base_of(folder: str | Path) -> str:
    """
    The base model that an adapter names, a relative path read from where the adapter stands if not from here.

    Raises:
        InputError: the adapter names none.
    """
    base = read_json(Path(folder) / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{folder}: {ADAPTER_CONFIG} names no base model; give it with --base.")
    beside = [parent / base for parent in Path(folder).resolve().parents]
    places = [path for path in (Path(base), *beside) if (path / "config.json").is_file()]
    return str(places[0]) if places else base


def untie(model: torch.nn.Module) -> None:
    """Copy each weight that modules share, such as a tied head's or those of replicated layers: an adapter changes one."""
    seen = set()
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) in seen:
                setattr(module, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))
            seen.add(id(weight))


def retie(model: PreTrainedModel) -> None:
    """Tie the head to the embedding if they are equal, and let the config say whether they are tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    model.config.tie_word_embeddings = head is not None and torch.equal(embedding.weight, head.weight)
    if model.config.tie_word_embeddings:
        head.weight = embedding.weight
    else:
        model.all_tied_weights_keys = {}


def merge_adapter(folder: str, base: str | None = None, tokenizer=None) -> tuple[PreTrainedModel, dict]:
    """
    Merge an adapter into the weights of its base model, in float32, and compare the result with the adapted model.

    Args:
        folder: holds the adapter.
        base: folder or Hub id of the base model; default: the one that the adapter names.
        tokenizer: of the text that both models read.

    Returns:
        The model, in the dtype of the base model, and what `parity.compare` measured.

    Raises:
        InputError: the folder holds no adapter, one for another base model, or one that cannot be merged.
    """
    peft = _peft()
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        raise InputError(f"{folder}: holds no adapter ({ADAPTER_CONFIG} is missing).")
    base, config = base or base_of(folder), read_json(path)
    labels = read_json(path.with_name("metrics.json")).get("labels")
    names = dict(enumerate(labels or []))
    heads = {"id2label": names, "label2id": {name: number for number, name in names.items()}} if names else {}
    head = ADAPTER_TASKS.get(config.get("task_type"), "ForCausalLM")
    with explained(f"{folder}: its base model {base} cannot be loaded"):
        model = getattr(transformers, f"AutoModel{head}").from_pretrained(base, **heads)
    check_base(folder, model)
    dtype = model.dtype
    warnings.simplefilter("ignore", UserWarning)  # of peft about tied weights, which are untied below
    try:
        found = load_file(Path(folder) / ADAPTER_WEIGHTS)
        # PEFT saves the whole embedding of a model whose vocabulary was resized for the adapter.
        saved = {match[1]: len(weight) for name, weight in found.items() if (match := EMBEDDING.search(name))}
        if (size := saved.get("embed_tokens")) not in (None, model.get_input_embeddings().num_embeddings):
            if hasattr(model, "lm_head") and not model.config.tie_word_embeddings and "lm_head" not in saved:
                raise InputError(
                    f"{folder}: was trained with {size} tokens, but PEFT did not save the head's new ones."
                )
            model.resize_token_embeddings(size, mean_resizing=False)
        adapted = peft.PeftModel.from_pretrained(model.float(), folder).eval()
        expected = peft.get_peft_model_state_dict(adapted)
    except InputError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: the adapter was made for another model than {base}.") from error
    if different := set(expected) ^ set(found):
        raise InputError(
            f"{folder}: the adapter was made for another model than {base}: only one of them has {min(different)}."
        )
    reference, was_tied = deepcopy(adapted), model.config.tie_word_embeddings
    untie(adapted)
    try:
        merged = adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        kind = config.get("peft_type")
        raise InputError(
            f"{folder}: an adapter of the kind {kind} cannot be merged into weights: {one_line(error)}"
        ) from error
    if was_tied:
        retie(merged)
    report = compare(merged, reference, tokenizer)  # in float32: the weights are rounded afterwards
    return merged.to(dtype), report
