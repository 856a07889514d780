"""
The doctor: does a model folder, ours or not, keep the promises that users trip over?

Each check is a function that returns what is wrong, or None. The promises are those of `tests/contract`. A model with
another head than a language model's is checked for what concerns it.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig

from ..configuration_hf_lm import HfLmConfig
from ..errors import InputError, one_line
from ..files import as_table, library_is_silent, read_json
from ..functional_hf_lm import CACHE_NAME
from ..interop.folders import check_sizes, outside_paths
from .card import USAGE, pipeline_tag_of
from .files import missing_code, pickles

TOLERANCE = 1e-3  # largest difference of two ways to the same float32 logits, relative to the largest logit
LENGTH = 12  # tokens of a test sequence


@dataclass
class Finding:
    """
    One line of the report.

    Args:
        problem: None where the promise is kept.
        is_note: the problem is how a class of transformers works, with any weights: no fault of the folder.
    """

    check: str
    problem: str | None
    mend: str
    is_note: bool = False

    @property
    def is_failure(self) -> bool:
        return self.problem is not None and not self.is_note

    def __str__(self) -> str:
        if self.problem is None:
            return f"pass  {self.check}"
        return f"{'note' if self.is_note else 'FAIL'}  {self.check}: {self.problem} -> {self.mend}"


@dataclass
class Patient:
    """A model folder and what is loaded from it, once, when a check first asks."""

    folder: Path
    trust_remote_code: bool = False
    config: dict = field(default_factory=dict)

    @property
    def task(self) -> str:
        return pipeline_tag_of(self.config) or "text-generation"

    def load(self, folder: Path):
        return getattr(transformers, USAGE[self.task][0]).from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=self.trust_remote_code,
            output_loading_info=True,
        )

    @cached_property
    def loaded(self):
        model, info = self.load(self.folder)
        return model.eval(), info

    @property
    def model(self) -> torch.nn.Module:
        return self.loaded[0]

    @property
    def is_of_transformers(self) -> bool:
        """Whether the model's class is one of transformers' own, which see packed documents apart without a cache only."""
        return type(self.model).__module__.startswith("transformers.models.")

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def ids(self) -> torch.Tensor:
        """`(2, LENGTH)` different ordinary token ids."""
        special = {self.model.config.pad_token_id, *as_list(self.model.config.eos_token_id)}
        usable = [i for i in range(min(self.model.config.vocab_size, 4096)) if i not in special]
        order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(0)).tolist()
        return torch.tensor([usable[order[i % len(order)]] for i in range(2 * LENGTH)]).view(2, LENGTH)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.model(input_ids=ids, **kwargs).logits


def as_list(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def difference(left: torch.Tensor, right: torch.Tensor) -> str | None:
    """What is wrong with two tensors that should be equal: more than `TOLERANCE` of the largest entry apart."""
    gap = (left - right).abs().max().item() / max(right.abs().max().item(), 1e-6)
    return None if gap <= TOLERANCE else f"logits differ by {gap:.1e} of the largest"


def no_pickles(patient: Patient) -> str | None:
    found = pickles(patient.folder)
    return f"{', '.join(found)}" if found else None


def paths_stay_inside(patient: Patient) -> str | None:
    return "; ".join(outside_paths(patient.folder)) or None


def code_is_complete(patient: Patient) -> str | None:
    if patient.config.get("model_type") != HfLmConfig.model_type:
        return None
    missing = missing_code(patient.folder, as_table(patient.config.get("auto_map")))
    return f"no {', '.join(missing)}" if missing else None


def weights_are_finite(patient: Patient) -> str | None:
    paths = sorted(patient.folder.glob("*.safetensors"))
    if not paths:
        return "no *.safetensors"
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                    return f"{name} in {path.name} holds NaN or infinity"
    return None


def tokenizer_fits(patient: Patient) -> str | None:
    size, rows = len(patient.tokenizer), patient.config.get("vocab_size") or patient.model.config.vocab_size
    return f"the tokenizer has {size} tokens, the model {rows}" if size > rows else None


def eos_is_not_pad(patient: Patient) -> str | None:
    tokenizer = patient.tokenizer
    if tokenizer.eos_token_id is None:
        return "the tokenizer has no eos_token"
    pads = {tokenizer.pad_token_id, patient.config.get("pad_token_id")} - {None}
    ends = {tokenizer.eos_token_id, *as_list(patient.config.get("eos_token_id"))}
    return f"token {sorted(pads & ends)[0]} is both" if pads & ends else None


def generation_config_is_consistent(patient: Patient) -> str | None:
    path = patient.folder / "generation_config.json"
    if not path.exists():
        return "no generation_config.json"
    generation = GenerationConfig.from_pretrained(patient.folder)
    generation.validate(strict=True)
    ends, rows = as_list(generation.eos_token_id), patient.config.get("vocab_size") or 0
    if not ends:
        return "no eos_token_id, so that generation never ends by itself"
    expected = patient.tokenizer.eos_token_id
    if expected is not None and expected not in ends:
        return f"eos_token_id is {generation.eos_token_id}, the tokenizer's {expected}"
    special = {"bos": generation.bos_token_id, "pad": generation.pad_token_id, "eos": max(ends)}
    too_big = [
        f"{name}_token_id {value}" for name, value in special.items() if value is not None and value >= rows > 0
    ]
    return f"{', '.join(too_big)}: the vocabulary has {rows} tokens" if too_big else None


def loads_by_auto_class(patient: Patient) -> str | None:
    info = patient.loaded[1]
    wrong = {
        kind: sorted(map(str, info.get(f"{kind}_keys") or ())) for kind in ("missing", "unexpected", "mismatched")
    }
    return "; ".join(f"{kind} weights: {', '.join(keys[:3])}" for kind, keys in wrong.items() if keys) or None


def ties_survive(patient: Patient) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        patient.model.save_pretrained(folder)
        model, _ = patient.load(Path(folder))
    for which, one in (("loaded", patient.model), ("saved and loaded", model)):
        head, embedding = one.get_output_embeddings(), one.get_input_embeddings()
        tied = head is not None and head.weight is embedding.weight
        if tied != bool(one.config.get_text_config().tie_word_embeddings):
            return (
                f"the {which} model's embedding and head are {'' if tied else 'not '}tied, its config says otherwise"
            )
    before, after = patient.model.state_dict(), model.state_dict()
    changed = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
    return f"{changed[0]} changed" if changed or before.keys() != after.keys() else None


def cached_equals_uncached(patient: Patient) -> str | None:
    whole, cache, steps = patient.logits(patient.ids, use_cache=False), None, []
    with torch.no_grad():
        for ids in patient.ids.split(LENGTH // 4, dim=1):
            output = patient.model(input_ids=ids, use_cache=True, **{CACHE_NAME: cache})
            cache = output[CACHE_NAME]
            steps.append(output.logits)
    return difference(torch.cat(steps, dim=1), whole)


def padded_equals_single(patient: Patient) -> str | None:
    """Through `generate`, as users batch; and on the right, as training does."""
    short = patient.ids[1:, : LENGTH // 2]
    padding = patient.ids[:1, : LENGTH - short.shape[1]]
    ones, zeros = torch.ones_like(short), torch.zeros_like(padding)
    right = torch.cat([short, padding], dim=1), torch.cat([ones, zeros], dim=1)
    batch = {"input_ids": torch.stack([patient.ids[0], right[0][0]]), "attention_mask": torch.ones(2, LENGTH).long()}
    batch["attention_mask"][1] = right[1][0]
    problem = difference(
        patient.logits(batch["input_ids"], attention_mask=batch["attention_mask"])[1:, : short.shape[1]],
        patient.logits(short),
    )
    if problem:
        return f"padding on the right: {problem}"
    left = torch.cat([padding, short], dim=1)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0, "num_beams": 1}
    masks = torch.stack([torch.ones(LENGTH).long(), torch.cat([zeros, ones], dim=1)[0]])
    together = patient.model.generate(torch.cat([patient.ids[:1], left]), attention_mask=masks, **options)
    alone = patient.model.generate(short, attention_mask=ones, **options)
    problem = difference(torch.stack(together.logits)[:, 1], torch.stack(alone.logits)[:, 0])
    return f"padding on the left, in generate: {problem}" if problem else None


def packed_documents_are_isolated(patient: Patient) -> str | None:
    first, second = patient.ids[:1, : LENGTH // 2], patient.ids[1:, : LENGTH // 2]
    positions = torch.arange(LENGTH // 2).repeat(2)[None]
    packed = patient.logits(torch.cat([first, second], dim=1), position_ids=positions)
    problem = difference(packed[:, LENGTH // 2 :], patient.logits(second))
    return f"the second of two packed documents sees the first: {problem}" if problem else None


@torch.no_grad()
def loss_is_accumulation_invariant(patient: Patient) -> str | None:
    """One batch of two rows against two batches of one, with unequal numbers of labels."""
    labels = patient.ids.clone()
    labels[1, : LENGTH // 2] = -100
    count = (labels[:, 1:] != -100).sum()

    def loss(rows: slice) -> torch.Tensor:
        return patient.model(input_ids=patient.ids[rows], labels=labels[rows], num_items_in_batch=count).loss

    whole, parts = loss(slice(0, 2)), loss(slice(0, 1)) + loss(slice(1, 2))
    same = torch.allclose(whole, parts, rtol=1e-4)
    return None if same else f"{parts.item():.4f} in two steps, {whole.item():.4f} in one"


# (what is promised, how it is checked, how to fix it)
CHECKS: tuple[tuple[str, Callable[[Patient], str | None], str], ...] = (
    ("paths stay inside the folder", paths_stay_inside, "put the files into the folder and name them without a path"),
    ("no pickle files", no_pickles, "delete them, or save weights with save_pretrained (safetensors)"),
    ("weights are finite", weights_are_finite, "go back to the last good checkpoint"),
    ("loads by its Auto class", loads_by_auto_class, "save it again with save_pretrained; custom code needs --trust-remote-code"),
    ("code files are complete", code_is_complete, "save it again with save_pretrained (save_code=True)"),
    ("tokenizer fits the vocabulary", tokenizer_fits, "model.resize_token_embeddings(len(tokenizer))"),
    ("eos is not pad", eos_is_not_pad, "give the tokenizer a pad token of its own, or the model never learns to stop"),
    ("generation config is consistent", generation_config_is_consistent, "set model.generation_config and save again"),
    ("ties survive a round trip", ties_survive, "set tie_word_embeddings as the weights are, and save again"),
    ("cached equals uncached", cached_equals_uncached, "the model's code mishandles its cache: use_cache=False"),
    ("padded equals single", padded_equals_single, "the model's code ignores the mask: run one sequence at a time"),
    ("packed documents are isolated", packed_documents_are_isolated, "pack with use_cache=False and without a mask, or hf-lm import it"),
    ("loss does not depend on accumulation", loss_is_accumulation_invariant, "use gradient_accumulation_steps=1"),
)  # fmt: skip
FOR_ANY_HEAD = (
    paths_stay_inside,
    no_pickles,
    weights_are_finite,
    loads_by_auto_class,
    code_is_complete,
    tokenizer_fits,
)


def examine(
    model_dir: str | os.PathLike, trust_remote_code: bool = False, skip: tuple[str, ...] = ()
) -> list[Finding]:
    """
    Check a model's folder.

    Args:
        trust_remote_code: run the Python files of the folder, if its architecture is neither transformers' nor ours.
        skip: names of checks to leave out.

    Returns:
        One finding for each check, in order. Where paths lead outside, nothing is loaded and that is all there is.

    Raises:
        InputError: not a model folder.
    """
    folder = Path(model_dir)
    config = read_json(folder / "config.json")
    if not config:
        raise InputError(f"{folder}: not a model folder, it has no config.json that can be read.")
    check_sizes(folder)
    patient, findings = Patient(folder, trust_remote_code, config), []
    for name, check, mend in CHECKS:
        if name in skip or (patient.task != "text-generation" and check not in FOR_ANY_HEAD):
            continue
        try:
            with library_is_silent():
                problem = check(patient)
                is_note = check is packed_documents_are_isolated and bool(problem) and patient.is_of_transformers
        except Exception as error:  # whatever a broken folder raises is the finding
            problem, is_note = one_line(error)[:300], False
        findings.append(Finding(name, problem, mend, is_note))
        if problem and check is paths_stay_inside:
            break
    return findings
