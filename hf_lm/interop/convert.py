"""Whole checkpoints in and out: weights, configuration, tokenizer, chat template, generation settings, and the proof."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from .. import modeling_hf_lm
from ..errors import InputError, one_line
from ..files import culprit, library_is_silent, write_json
from ..modeling_hf_lm import HfLmPreTrainedModel
from .families import FAMILIES, choose_family
from .family import Family
from .folders import check_sizes
from .gguf_pre_tokenizers import named_pre_tokenizer
from .heads import HEADS, head_of
from .parity import compare, rounded
from .reader import gguf_fields, gguf_head_dim, source_config
from .weights import check_loaded, native_state_dict, to_write

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
REPORT = "parity.json"


class Checkpoint(NamedTuple):
    """
    What `load_checkpoint` reads.

    Args:
        head: a key of `HEADS`; None: a language model's.
        family: `model_type` in its config.json.
        random: names of the weights that were not there and are random.
    """

    model: HfLmPreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    head: str | None
    family: str | None
    random: list[str]

    def describe(self, **fields) -> dict[str, Any]:
        """The first lines of a report."""
        return fields | {"head": self.head, "dtype": str(self.model.dtype).removeprefix("torch.")}


@contextmanager
def staged(destination: str | Path, files: dict[str, Path] | None = None) -> Iterator[Path]:
    """
    A new folder beside `destination` that takes its name when all went well, and is removed when not.

    Args:
        files: where there is to be no folder: which of its files take which paths, `destination` among them.

    Raises:
        InputError: `destination` (or one of the files) exists already and is not an empty folder, or cannot be written.
    """
    destination = Path(destination)
    for path in files.values() if files else [destination]:
        if path.exists() and (files or not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path}: exists already; name a new {'file' if files else 'folder'}.")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as error:
        raise InputError(f"{destination}: cannot be written ({error.strerror}).") from error
    try:
        folder.chmod(0o755)
        yield folder
        for name, path in files.items() if files else [("", destination)]:
            os.replace(folder / name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def split_source(source: str) -> tuple[str, dict[str, str]]:
    """A folder or Hub id, and `gguf_file=` where the path of a GGUF file was given."""
    if source.endswith(".gguf"):
        return os.path.dirname(source) or ".", {"gguf_file": os.path.basename(source)}
    return source, {}


def find_tokenizer(source: str, **kwargs) -> PreTrainedTokenizerBase | None:
    """
    The tokenizer that comes with a model, or None if none does.

    Raises:
        InputError: there is one, but it cannot be read.
    """
    names = [name for name in TOKENIZER_FILES if os.path.exists(os.path.join(source, name))]
    if os.path.isdir(source) and not names and not kwargs:
        return None  # transformers would build an empty one
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        if kwargs:
            return _splits_as_named(_only_tokens_in_file(tokenizer), source, **kwargs)
        return tokenizer if _splits_as_in_file(tokenizer, source) else PreTrainedTokenizerFast.from_pretrained(source)
    except Exception as error:  # whatever a broken file makes the tokenizer's code do
        if not os.path.isdir(source) and isinstance(error, OSError):
            return None
        file = os.path.join(source, kwargs.get("gguf_file") or "".join(names[:1]))
        reason = None if kwargs else tokenizer_problem(Path(source))
        raise InputError(f"the tokenizer cannot be read: {reason or f'{file}: {one_line(error)}'}") from error


def tokenizer_problem(folder: Path) -> str | None:
    """What is wrong with the files that a tokenizer is made of, and with which entry; None if they are well."""
    tokenizer = folder / "tokenizer.json"
    return (
        culprit(tokenizer, lambda fields: Tokenizer.from_str(json.dumps(fields)))
        or culprit(
            folder / "tokenizer_config.json",
            lambda fields: PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), **fields),
        )
        or culprit(folder / "config.json", _build_model)
    )


def _build_model(fields: dict) -> None:
    """A model without weights, to see whether it can be built; of another library's type, nothing."""
    if "model_type" not in fields:
        raise ValueError("there is no model_type, such as hf_lm or llama.")
    if isinstance(name := fields["model_type"], str) and name in CONFIG_MAPPING:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(CONFIG_MAPPING[name].from_dict(fields))


@contextmanager
def readable(source: str) -> Iterator[None]:
    """
    What a library raises while it loads a model, in words that name the file and the entry; it warns of nothing.

    Raises:
        InputError: instead of any other exception.
    """
    folder = Path(source)
    try:
        check_sizes(folder)
        with library_is_silent():
            yield
    except InputError:
        raise
    except Exception as error:  # whatever a broken file makes the model's code do
        problem = culprit(folder / "config.json", _build_model) or culprit(
            folder / "generation_config.json", GenerationConfig.from_dict
        )
        raise InputError(problem or f"{source}: cannot be read as a model: {one_line(error)}") from error


def _only_tokens_in_file(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Without the `<|endoftext|>` that transformers adds behind the vocabulary of a GGUF file which has none."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    size = len(definition["model"]["vocab"])
    if all(item["id"] < size for item in definition["added_tokens"]):
        return tokenizer
    definition["added_tokens"] = [item for item in definition["added_tokens"] if item["id"] < size]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)),
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        **tokenizer.special_tokens_map,
    )


def _splits_as_named(tokenizer: PreTrainedTokenizerBase, source: str, gguf_file: str) -> PreTrainedTokenizerBase:
    """With the pre-tokenizer that a GGUF file names; of many names, transformers takes GPT-2's instead."""
    name = gguf_fields(source, gguf_file).get("tokenizer.ggml.pre")
    if name is not None and (found := named_pre_tokenizer(name)):
        tokenizer.backend_tokenizer.pre_tokenizer = found
    return tokenizer


def _splits_as_in_file(tokenizer: PreTrainedTokenizerBase, source: str) -> bool:
    """Whether the tokenizer does what its tokenizer.json says; some classes of transformers put their own rules first."""
    path = Path(source) / "tokenizer.json"
    if not path.is_file() or not tokenizer.is_fast:
        return True
    file, loaded = Tokenizer.from_file(str(path)), tokenizer.backend_tokenizer
    written, read = (json.loads(one.to_str()) for one in (file, loaded))
    return all(written[part] == read[part] for part in ("normalizer", "pre_tokenizer"))


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, source: str) -> None:
    """
    Raises:
        InputError: a weight is not finite, or the tokenizer has ids that the embedding does not have.
    """
    for name, parameter in model.named_parameters():
        if not all(bound.isfinite() for bound in torch.aminmax(parameter.detach())):
            raise InputError(f"{source}: {name} holds NaN or infinite values.")
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, but the embedding only {model.config.vocab_size} "
            "(vocab_size in config.json)."
        )


def save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, weights: dict | None = None
) -> None:
    """The model (with these weights) and its generation settings, and the tokenizer with its chat template."""
    model.save_pretrained(folder, state_dict=weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_report(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    write_json(folder / REPORT, report)
    return report


def load_checkpoint(source: str, dtype: str = "auto", allow_missing: bool = False) -> Checkpoint:
    """
    Read a checkpoint of hf_lm or of another family, with all checks.

    Args:
        source: folder or Hub id, or the path of a GGUF file.
        dtype: "float32", ...; "auto": as it is.
        allow_missing: weights that are missing or of another shape become random ones, left over ones are dropped.

    Raises:
        InputError: it cannot be read, is of no known family or damaged.
    """
    folder, gguf = split_source(source)
    with readable(folder):
        config_dict, _ = source_config(folder, **gguf)
        head = head_of(config_dict, source)
        model, info = our_class(head).from_pretrained(
            folder, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **gguf
        )
        tokenizer = find_tokenizer(folder, **gguf)
    if not allow_missing:
        check_loaded(model, info, folder)
    check_model(model, tokenizer, source)
    random = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    return Checkpoint(model.eval(), tokenizer, head, config_dict.get("model_type"), random)


def import_checkpoint(
    source: str,
    destination: str | Path,
    allow_missing: bool = False,
    dtype: str = "auto",
    text: str | None = None,
) -> dict[str, Any]:
    """
    Write the hf_lm folder of a checkpoint of another family, with the proof that both compute the same.

    Args:
        source, dtype, allow_missing: see `load_checkpoint`.
        text: what both models read; default: see `parity.default_text`.

    Returns:
        What is written to `parity.json`, see `parity.compare`.

    Raises:
        InputError: see `load_checkpoint`; or the destination exists.
        RuntimeError: the models do not compute the same. No folder is left behind.
    """
    with staged(destination) as staging:
        checkpoint = load_checkpoint(source, dtype, allow_missing)
        save(staging, checkpoint.model, checkpoint.tokenizer)
        report = checkpoint.describe(source=source, family=checkpoint.family)
        tokenizer, head, saved_dtype = checkpoint.tokenizer, checkpoint.head, checkpoint.model.dtype
        if checkpoint.random:
            return write_report(staging, report | {"random_weights": checkpoint.random})
        del checkpoint
        folder, gguf = split_source(source)
        reference = auto_class(head).from_pretrained(
            folder, dtype=torch.float32, **gguf, **gguf_head_dim(folder, **gguf)
        )
        ours = our_class(head).from_pretrained(staging, dtype=torch.float32)
        rounded(reference, lambda _, weight: weight.to(saved_dtype))
        return write_report(staging, report | compare(ours, reference, tokenizer, text))


def auto_class(head: str | None) -> type:
    """The Auto class of models with a head (a key of `HEADS`; None: a language model's)."""
    return getattr(transformers, f"AutoModel{head or 'ForCausalLM'}")


def our_class(head: str | None) -> type[HfLmPreTrainedModel]:
    """As `auto_class`, of hf_lm."""
    return getattr(modeling_hf_lm, f"HfLm{head or 'ForCausalLM'}")


def as_held(model: HfLmPreTrainedModel, family: Family) -> HfLmPreTrainedModel:
    """
    The model that a family holds in place of this one: the same, or with `embedding_multiplier` folded into the embedding,
    which unties the head. Exact in the dtype of the weights.
    """
    config = family.as_held(model.config)
    if config is model.config:
        return model
    weights = model.state_dict()
    name = "model.embed_tokens.weight"
    weights[name] = weights[name] * torch.tensor(model.config.embedding_multiplier).to(weights[name])
    with no_init_weights():
        held = type(model)(config)
    held.load_state_dict(weights, assign=True)
    if model.can_generate():
        held.generation_config = model.generation_config
    return held.eval()


def to_native(model: HfLmPreTrainedModel, family: str | None = None) -> PreTrainedModel:
    """
    The same model as one of transformers' own classes, sharing its weights where the layouts agree.

    Args:
        family: a key of `FAMILIES`; default: the first one that has all options of the model.

    Raises:
        InputError: no family (or not this one) has all options of the model; names those in the way.
    """
    head = next((head for head in HEADS if isinstance(model, our_class(head))), None)
    chosen = choose_family(model.config, family, head)
    model = as_held(model, chosen)
    config = chosen.from_hf_lm(model.config)
    if head is not None:
        config.id2label, config.problem_type = model.config.id2label, model.config.problem_type
        config.label2id = model.config.label2id
    config.dtype = model.dtype
    with no_init_weights():
        native = chosen.native_class(head)(config)
    native.load_state_dict(native_state_dict(model, chosen, head), assign=True)
    native.tie_weights()
    if head is None:
        native.generation_config = model.generation_config
    return native.eval()


def export_native(
    source: str, destination: str | Path, dtype: str = "auto", family: str | None = None, text: str | None = None
) -> dict[str, Any]:
    """
    Write a checkpoint that needs none of our code: `LlamaForCausalLM`, `Qwen3ForCausalLM`, `GPT2LMHeadModel`, ...

    Arguments, result and errors as in `import_checkpoint` and `to_native`.
    """
    checkpoint = load_checkpoint(source, dtype)
    with staged(destination) as staging:
        native = to_native(checkpoint.model, family)
        chosen, reference = FAMILIES[native.config.model_type], checkpoint.model
        save(staging, native, checkpoint.tokenizer, to_write(native, reference, chosen))
        report = checkpoint.describe(source=source, family=chosen.model_type)
        del native
        reloaded = auto_class(checkpoint.head).from_pretrained(staging, dtype=torch.float32)
        if reference.dtype != torch.float32:  # scaled embeddings are rounded once more
            reference = as_held(reference, chosen)
        return write_report(staging, report | compare(reloaded, reference.float(), checkpoint.tokenizer, text))


def export_onnx(source: str, destination: str | Path, dtype: str = "auto", text: str | None = None) -> dict[str, Any]:
    """
    Write `model.onnx`: token ids and attention mask in, logits out, both dimensions free. Checked in ONNX Runtime.

    Arguments, result and errors as in `export_native`; the weights are always written in float32.
    """
    if dtype not in ("auto", "float32"):
        raise InputError(f"--to onnx writes float32 only, got --dtype {dtype}.")
    try:
        from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter

        exporter = OnnxExporter()
    except ImportError as error:
        raise InputError("--to onnx needs the packages of pip install hf-lm[onnx].") from error
    checkpoint = load_checkpoint(source, "float32")
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if checkpoint.head == "ForSequenceClassification" and model.config.pad_token_id is None:
        raise InputError(
            f"{source}: a text classifier needs a pad_token_id (config.json) to read several texts at once."
        )
    model.config.use_cache = False
    ids = torch.arange(2 * 7).reshape(2, 7) % model.config.vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with staged(destination) as staging:
        with redirect_stdout(sys.stderr):  # torch reports its progress there
            exporter.export(model, inputs, OnnxConfig(dynamic=True)).save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        exported = ExportedModel.from_pretrained(staging)

        def run(input_ids):
            return exported(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))

        report = checkpoint.describe(source=source, format="onnx")
        return write_report(staging, report | compare(run, model, tokenizer, text))
