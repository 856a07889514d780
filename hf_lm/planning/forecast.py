"""What a run will take on this machine, time and memory, from a few of its own steps before the first one counts."""

import copy
import math
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import psutil
import torch
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from ..generation.decoding import continue_prompts
from ..hardware import peak_memory
from ..training.manifest import Progress

WARM_UP = 4  # steps that are not counted: kernels are chosen, memory is taken
SHARE = 0.03  # of the run's steps are enough: a short run is not kept waiting
SAVE_SECONDS, SAVED_BYTES_PER_SECOND = 0.15, 2.5e8  # of a checkpoint with its hashes
HEAP_GROWTH = 1.3  # of memory in a run that trains and evaluates by turns: heap fragmentation


@contextmanager
def _memory_watched() -> Iterator[list[int]]:
    """Memory of the process at the start of the block, and the most that it has inside of it, bytes."""
    process, over = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss] * 2

    def watch() -> None:
        while not over.wait(0.01):
            seen[1] = max(seen[1], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _mean(times: list[float]) -> float:
    """Seconds between two times."""
    return (times[-1] - times[0]) / (len(times) - 1)


class _Stopwatch(TrainerCallback):
    """Ends training when enough steps have been timed; a first one that compiles does not count."""

    def __init__(self, seconds: float, compiles: bool = False):
        self.seconds, self.compiles = seconds, compiles
        self.progress = Progress()  # replaced by that of the trainer that is timed
        # The clock and the tokens so far, at the start and after each step.
        self.marks: list[tuple[float, int]] = []

    def _mark(self, device: torch.device) -> None:
        self.marks.append((_now(device), self.progress.tokens))

    def on_train_begin(self, args, state, control, **kwargs):
        self._mark(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        if self.compiles:
            self.compiles, self.marks = False, []
        self._mark(args.device)
        steps, seconds = len(self.marks) - 1, self.marks[-1][0] - self.marks[0][0]
        enough = steps >= 2 * WARM_UP + SHARE * state.max_steps
        late = seconds > self.seconds and (steps >= 3 or seconds > 10 * self.seconds)  # the first two are slower
        control.should_training_stop |= enough or late

    def seconds_per_token(self) -> float:
        """Without the first few steps. (An epoch's last step may be shorter: steps are not alike, tokens are.)"""
        (start, before), (end, after) = self.marks[min(WARM_UP, len(self.marks) - 2)], self.marks[-1]
        return (end - start) / (after - before)


@contextmanager
def _nothing_changes(trainer) -> Iterator[None]:
    """Random numbers and the model's mode are afterwards as before."""
    model, device, python, numpy = trainer.model, trainer.args.device, random.getstate(), np.random.get_state()
    training, use_cache = model.training, model.config.use_cache
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        model.train(training).zero_grad(set_to_none=True)
        model.config.use_cache = use_cache


def _rehearsal(trainer, watch: _Stopwatch):
    """A second trainer of the same model and data, whose learning rates are 0: its steps leave the weights as they are."""
    arguments = copy.copy(trainer.args)
    arguments.learning_rate, arguments.on_divergence, arguments.max_divergences = 0.0, "skip", sys.maxsize
    arguments.muon_learning_rate = None if arguments.muon_learning_rate is None else 0.0
    arguments.eval_strategy = arguments.save_strategy = arguments.logging_strategy = "no"
    arguments.load_best_model_at_end = arguments.eval_on_start = arguments.push_to_hub = False
    arguments.report_to, arguments.disable_tqdm = [], True
    rehearsal = type(trainer)(
        model=trainer.model,
        args=arguments,
        data_collator=trainer.data_collator,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        compute_metrics=None if trainer.models_language else trainer.compute_metrics,
        row_likelihoods=trainer.row_likelihoods,
        processing_class=trainer.processing_class,
        callbacks=[watch],
    )
    rehearsal.remove_callback(PrinterCallback)
    watch.progress = rehearsal.progress
    return rehearsal


def _step_costs(rehearsal, watch: _Stopwatch) -> dict:
    rehearsal.train()
    state = [
        value for values in rehearsal.optimizer.state.values() for value in values.values() if torch.is_tensor(value)
    ]
    stored = sum(tensor.nbytes for tensor in [*state, *rehearsal.model.parameters()])
    tokens = rehearsal.progress.tokens / rehearsal.state.global_step
    costs = {
        "steps": rehearsal.state.max_steps,
        "tokens": tokens,
        "step": tokens * watch.seconds_per_token(),
        "save": SAVE_SECONDS + stored / SAVED_BYTES_PER_SECOND,
    }
    if rehearsal.args.train_sampling_strategy == "group_by_length":  # which starts with the longest
        rows = rehearsal.train_dataset.select(
            range(0, len(rehearsal.train_dataset), max(1, len(rehearsal.train_dataset) // 1000))
        )
        size = rehearsal.args.train_batch_size * rehearsal.args.gradient_accumulation_steps
        usual = size * sum(map(len, rows["input_ids"])) / len(rows)
        costs |= {"tokens": usual, "step": costs["step"] * usual / costs["tokens"]}
    return costs


def _evaluation_seconds(rehearsal, batches: int) -> float:
    """Of all rows held out, from a number of batches of rows, taken at even distances: they may be sorted."""
    rows, size = rehearsal.eval_dataset, batches * rehearsal.args.eval_batch_size
    some, times = rows.select(range(0, len(rows), max(1, len(rows) // size))), [_now(rehearsal.args.device)]
    rehearsal.model.eval()
    for batch in islice(rehearsal.get_eval_dataloader(some), batches):
        rehearsal.prediction_step(rehearsal.model, batch, prediction_loss_only=False)
        times.append(_now(rehearsal.args.device))
    return _mean(times) * math.ceil(len(rows) / rehearsal.args.eval_batch_size)


def _sample_seconds(rehearsal, tokens: int = 12) -> float:
    if not rehearsal.args.sample_prompts:
        return 0.0
    for count in (1, tokens):  # the first is not counted
        times = [_now(rehearsal.args.device)]
        continue_prompts(rehearsal.model, rehearsal.processing_class, rehearsal.args.sample_prompts, count)
        times.append(_now(rehearsal.args.device))
    return _mean(times) * rehearsal.args.sample_tokens / tokens


def forecast(trainer, elapsed: float = 0.0, seconds: float = 2.5) -> dict:
    """
    What the run of a trainer that has not started will take on this machine, if it goes to its last step.

    Real steps of it are timed: its model, data, autocast, optimizer and loop. They have the run's own peak of memory.

    Args:
        elapsed: seconds that the run has taken already.
        seconds: how long to measure; of slow steps three, in up to ten times as long.

    Returns:
        `train_seconds` (with evaluations, samples and checkpoints on the way) and `trained_seconds` (with what came
        before, too), until the end of training, before the model is tested; `peak_memory_bytes` until then;
        `tokens_per_second` of the steps alone; and `costs`, the seconds of one `step`, `evaluation`, round of `samples`
        and `save`, with the run's `steps` and the `tokens` of one.
    """
    start, arguments, watch = time.perf_counter(), trainer.args, _Stopwatch(seconds, trainer.args.torch_compile)
    looks, growth = trainer.eval_dataset is not None and arguments.eval_strategy != "no", 1.0
    with _nothing_changes(trainer), _memory_watched() as memory:
        rehearsal = _rehearsal(trainer, watch)
        costs = _step_costs(rehearsal, watch) | {"evaluation": 0.0, "samples": 0.0}
        if looks:  # by turns with training, as in the run: what one frees the other cannot always use
            for batches in (1, 2):
                costs["evaluation"] = _evaluation_seconds(rehearsal, batches)
                watch.marks, watch.seconds = [], 0.0
                rehearsal.train()
            costs["samples"], growth = _sample_seconds(rehearsal), HEAP_GROWTH
    # accelerate prepares a model once: the run keeps the autocast of the rehearsal, and its compiled graph.
    if trainer.args.torch_compile and not trainer.is_sharded:
        trainer.model_wrapped = rehearsal.model_wrapped
    peak = max(peak_memory(), memory[0] + int(growth * (memory[1] - memory[0])))
    steps, looking = costs["steps"], costs["evaluation"] + costs["samples"]
    epochs, every = arguments.num_train_epochs, rehearsal.state.eval_steps
    times = {"steps": steps // every if every else 0, "epoch": epochs}.get(arguments.eval_strategy, 0)
    saves = {"steps": -(-steps // rehearsal.state.save_steps), "epoch": epochs}.get(arguments.save_strategy, 0)
    train_seconds = steps * costs["step"] + times * looking + saves * costs["save"]
    result = {
        "train_seconds": train_seconds,
        "trained_seconds": elapsed + time.perf_counter() - start + train_seconds,
        "peak_memory_bytes": peak,
        "tokens_per_second": costs["tokens"] / costs["step"],
        "costs": costs,
    }
    if arguments.device.type == "cuda":
        result["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return result


def in_words(costs: dict, predicted: dict | None = None) -> str:
    """Time until a model is trained, and memory; with what was predicted, how far that was off."""
    values = []
    for key, unit, name in (("trained_seconds", 1, "s"), ("peak_memory_bytes", 1e9, "GB")):
        off = f" ({100 * (costs[key] / predicted[key] - 1):+.0f}%)" if predicted else ""
        values.append(f"{costs[key] / unit:,.{0 if unit == 1 else 2}f} {name}{off}")
    return ", ".join(values)
