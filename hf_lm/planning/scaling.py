"""Which new model to train in a given time, by a scaling law fitted to a sweep and the speed of this machine."""

import json
import math
import re
import shlex
import tempfile
import time
from dataclasses import dataclass

from datasets import IterableDataset

from ..errors import InputError
from ..tasks import task_class
from .forecast import forecast

START = 2e6  # bytes of text, after which a batch of `batch_at_start` tokens is critical
REPEATED = 15.4  # epochs after which more of them add almost nothing (R* of arXiv:2305.16264)
SHAPES = ((64, 4), (96, 5), (128, 6), (192, 6), (256, 8), (384, 8), (512, 10), (640, 12), (768, 12))  # width, layers
VOCABULARIES, BATCHES = (1024, 2048, 4096), (8, 16, 32)  # those of the sweep
HEAD_DIM = 32
# Moby-Dick read 12 times by the recipe's model: 2.37 bits per byte held out; with dropout of 0.1 1.92, of 0.2 1.93. Read 5
# times: 1.94, with dropout of 0.1 1.95 (recipes/benchmarks/time_to_quality.md).
DROPOUT, MANY_EPOCHS = {"embedding_dropout": 0.1, "residual_dropout": 0.1}, 6


@dataclass(frozen=True)
class Law:
    """
    Held-out bits per byte of a model that was trained to the end of its schedule, in the form of arXiv:2203.15556:

        floor + size * matrices**-alpha * vocab**-delta + data * (bytes / (1 + batch / critical))**-beta
        critical = batch_at_start * (bytes / START)**growth

    `matrices` are the parameters of the layers, `bytes` those of the text that was read, `batch` the tokens of a step. A
    batch of `critical` tokens needs twice the text of a small one (arXiv:1812.06162); it grows with the text that is
    read (arXiv:2410.21676).
    """

    floor: float
    size: float
    alpha: float
    delta: float
    data: float
    beta: float
    batch_at_start: float
    growth: float

    def bits_per_byte(self, matrices: float, vocab: float, batch: float, read: float, text: float) -> float:
        """
        Args:
            read: bytes that training reads, repetitions included.
            text: bytes that there are; what is read again counts less and less (arXiv:2305.16264).
        """
        again = max(read / text - 1, 0.0)
        worth = min(read, text) + text * REPEATED * -math.expm1(-again / REPEATED)
        by_size = self.size * matrices**-self.alpha * vocab**-self.delta
        critical = self.batch_at_start * (read / START) ** self.growth
        return self.floor + by_size + self.data * (worth / (1 + batch / critical)) ** -self.beta


# Of recipes/addresses, by recipes/benchmarks/scaling.py (0.2 to 2.7 million parameters in the layers, blocks of 128 tokens,
# 0.2 to 2.8 million tokens).
LAW = Law(
    floor=0.6756, size=136.9, alpha=0.3959, delta=0.1847, data=6.69, beta=0.1214, batch_at_start=2446.0, growth=1.627
)


def matrices(width: int, layers: int) -> int:
    """Parameters of the layers' matrices: attention `4 * width**2`, MLP `8 * width**2`."""
    return 12 * layers * width**2


def seconds_of(budget: str) -> float:
    """
    `"90s"`, `"30min"` or `"2h"` in seconds.

    Raises:
        InputError: something else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h)", budget.strip())
    if not found or not float(found[1]):
        raise InputError(f"--budget: must be a time as 90s, 30min or 2h, got {budget!r}.")
    return float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]]


class _Candidates:
    """The recipe with other sizes: what each costs on this machine and what the law says of it."""

    def __init__(self, model_arguments, data_arguments, arguments, budget: float, law: Law):
        self.parts, self.budget, self.law = (model_arguments, data_arguments, arguments), budget, law
        self.fields = model_arguments.config_fields()
        self.prepared: dict[int, tuple] = {}  # of each vocabulary: tokenizer and seconds that it takes
        self.rated: dict[tuple, dict] = {}

    def build(self, width: int, layers: int, vocabulary: int, batch: int):
        """A trainer of the recipe with these sizes."""
        start = time.perf_counter()
        model_arguments, data_arguments, arguments = self.parts
        model_arguments.vocab_size, arguments.per_device_train_batch_size = vocabulary, batch
        model_arguments.config_overrides = as_overrides(self.fields, width, layers)
        task = task_class(data_arguments.task)(*self.parts)
        tokenizer, _ = self.prepared.get(vocabulary, (None, 0.0))
        data = task.prepare(tokenizer=tokenizer)
        trainer = task.build_trainer(data)
        if isinstance(trainer.train_dataset, IterableDataset):
            raise InputError("--budget: needs data of known length, not a stream.")
        if not self.prepared:
            self.text = sum(len(text.encode()) for text in task.texts(data.rows["train"]))
        self.prepared.setdefault(vocabulary, (trainer.processing_class, time.perf_counter() - start))
        return trainer

    def rate(self, place: tuple[int, int, int], seconds: float) -> dict:
        """
        Steps that fit into the budget, and the bits per byte that they lead to, at a place in `SHAPES`, `VOCABULARIES`
        and `BATCHES`; number of seconds for which steps are measured.
        """
        (width, layers), vocabulary, batch = SHAPES[place[0]], VOCABULARIES[place[1]], BATCHES[place[2]]
        trainer = self.build(width, layers, vocabulary, batch)
        costs, arguments = forecast(trainer, seconds=seconds)["costs"], trainer.args
        step, fixed = costs["step"], self.prepared[vocabulary][1] + 2.5  # seconds: that of the run's own forecast
        pauses = [(arguments.save_strategy, arguments.save_steps, costs["save"])]
        pauses.append((arguments.eval_strategy, arguments.eval_steps, costs["evaluation"] + costs["samples"]))
        for strategy, every, seconds in pauses:
            if strategy == "steps":  # below 1: a share of the run
                step += seconds / every if every >= 1 else 0.0
                fixed += seconds / every if every < 1 else 0.0
        steps = max(int((self.budget - fixed) / step), 1)
        tokens = steps * costs["tokens"]
        read = self.text * tokens / (len(trainer.train_dataset) * self.parts[1].block_size)
        return {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "vocab_size": vocabulary,
            "per_device_train_batch_size": batch,
            "max_steps": steps,
            "tokens_per_second": costs["tokens"] / costs["step"],
            "epochs": read / self.text,
            "bits_per_byte": self.law.bits_per_byte(
                matrices(width, layers), vocabulary, costs["tokens"], read, self.text
            ),
        }

    def at(self, place: tuple[int, int, int]) -> dict:
        """`rate`, each place measured once."""
        if place not in self.rated:
            self.rated[place] = self.rate(place, 1.0)
        return self.rated[place]

    def make_sure(self) -> None:
        """Measure the best for longer, until one that was measured so is the best."""
        sure = set()
        while (place := min(self.rated, key=lambda place: self.rated[place]["bits_per_byte"])) not in sure:
            self.rated[place] = self.rate(place, 5.0)
            sure.add(place)


def as_overrides(fields: dict, width: int, layers: int) -> str:
    """`config_overrides` of a recipe with another shape."""
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // HEAD_DIM}
    fields = {**fields, **shape}
    if not all(isinstance(value, str | int | float) for value in fields.values()):
        return json.dumps(fields)
    return ",".join(f"{name}={value}" for name, value in fields.items())


def regularized(fields: dict, epochs: float) -> dict:
    """Fields of the configuration, with dropout where the text is read many times and the recipe has none of its own."""
    return fields | DROPOUT if epochs > MANY_EPOCHS and not DROPOUT.keys() & fields.keys() else fields


def choose(model_arguments, data_arguments, arguments, budget: float, law: Law | None = None) -> dict:
    """
    Width, layers, vocabulary, batch and steps with which a new model gets the lowest bits per byte in a given time on
    this machine: uphill from the recipe's own, the speed of each candidate measured by some of its steps. Text that is
    read more than `MANY_EPOCHS` times calls for dropout.

    Args:
        budget: seconds, from the start of `hf-lm train` until the model is trained.

    Returns:
        `best` and all `candidates`, each with `bits_per_byte` as the law has it for the text it was fitted to; `keys`
        of the recipe that make it; `overrides`, those as words of a command.

    Raises:
        InputError: the recipe is not one of a new language model, or the budget too short to prepare its data.
    """
    if model_arguments.model_name_or_path or data_arguments.task != "causal-lm":
        raise InputError("--budget: chooses the size of a new language model (task causal-lm, no model_name_or_path).")
    if model_arguments.tokenizer_name or model_arguments.tokenizer_kind != "bpe":
        raise InputError("--budget: chooses the vocabulary too; leave out tokenizer_name and tokenizer_kind.")
    fields = model_arguments.config_fields()

    def nearest(values: tuple, wanted: float) -> int:
        return min(range(len(values)), key=lambda place: abs(math.log(values[place] / wanted)))

    widths = tuple(width for width, _ in SHAPES)
    start = (
        nearest(widths, fields.get("hidden_size", 128)),
        nearest(VOCABULARIES, model_arguments.vocab_size),
        nearest(BATCHES, arguments.per_device_train_batch_size),
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments.output_dir = folder
        found = _Candidates(model_arguments, data_arguments, arguments, budget, law or LAW)
        best = found.at(start)
        place, improved = start, True
        if found.prepared[best["vocab_size"]][1] > budget / 2:
            raise InputError(f"--budget: preparing the data takes {found.prepared[best['vocab_size']][1]:.0f} s.")
        while improved:
            improved = False
            for axis, values in enumerate((SHAPES, VOCABULARIES, BATCHES)):
                for move in (1, -1):
                    while 0 <= (to := place[axis] + move) < len(values):
                        other = (*place[:axis], to, *place[axis + 1 :])
                        if found.at(other)["bits_per_byte"] >= best["bits_per_byte"]:
                            break
                        place, best, improved = other, found.at(other), True
        found.make_sure()
    candidates = sorted(found.rated.values(), key=lambda one: one["bits_per_byte"])
    best = candidates[0]
    keys = {name: best[name] for name in ("vocab_size", "per_device_train_batch_size", "max_steps")}
    fields = regularized(fields, best["epochs"])
    keys = {"config_overrides": as_overrides(fields, best["hidden_size"], best["num_hidden_layers"]), **keys}
    overrides = [word for name, value in keys.items() for word in (f"--{name}", str(value))]
    return {"best": best, "candidates": candidates, "keys": keys, "overrides": overrides}


def in_words(choice: dict, words: list[str]) -> str:
    """The choice for people, with the command that trains it: the recipe, the keys that it was asked with, the choice."""
    lines = [
        "{bits_per_byte:.3f} bits per byte: {hidden_size} wide, {num_hidden_layers} layers, vocabulary {vocab_size:,}, "
        "batch {per_device_train_batch_size}, {max_steps:,} steps, {epochs:.1f} epochs, {tokens_per_second:,.0f} "
        "tokens/s".format(**one)
        for one in (choice["best"], *choice["candidates"][1:6])
    ]
    lines[1:] = ["next best:", *(f"  {line}" for line in lines[1:])]
    note = "(bits per byte as of the text that the law was fitted to, the presidents' addresses)"
    return "\n".join([*lines, note, f"hf-lm train {shlex.join([*words, *choice['overrides']])}"])
