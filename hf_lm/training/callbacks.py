"""What a person sees of a run while it trains, and how they stop it."""

import json
import math
import signal
import sys
from pathlib import Path

import torch
from accelerate.utils import gather
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..generation.decoding import continue_prompts
from .checkpoints import CommitCallback
from .divergence import sampler_of


class HfLmProgressCallback(ProgressCallback):
    """One progress bar with loss, bits per byte and tokens per second; no lines of dictionaries."""

    def __init__(self):
        super().__init__()
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and not sys.stderr.isatty():
            self.training_bar.mininterval = 10.0  # a log file wants a line now and then

    def close(self) -> None:
        """End the bar's line, also where an error ended the run."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """Evaluation is a small part of a run: no bar of its own."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        names = {"loss": "loss", "eval_loss": "eval_loss"}
        names |= {f"eval_{name}": name for name in ("bits_per_byte", "accuracy")}
        self.shown.update({names[key]: f"{value:.3f}" for key, value in logs.items() if key in names})
        if "loss" in logs:
            self.shown["tok/s"] = f"{logs.get('tokens_per_second', 0):,.0f}"
        self.training_bar.set_postfix(self.shown, refresh=False)


class SampleCallback(TrainerCallback):
    """
    Continue some prompts at each evaluation. The samples go to the terminal, `samples.jsonl` and TensorBoard, which gets
    histograms of the weights and the model's graph as well if that is asked for.

    Args:
        boards: TensorBoard's callbacks of the trainer.
        is_sharded: whether a forward takes all processes.
    """

    def __init__(self, boards: list[TensorBoardCallback], is_sharded: bool = False):
        self.boards, self.is_sharded = boards, is_sharded

    def _writers(self) -> list:
        return [board.tb_writer for board in self.boards if board.tb_writer is not None]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # that of an adapter
        for board in self._writers() if args.log_graph else ():
            with torch.random.fork_rng(devices=[]):  # another of its kind: this one's forward is wrapped by now
                board.add_graph(type(model)(model.config).eval(), torch.zeros(1, 8).long(), use_strict_trace=False)

    def on_evaluate(self, args, state, control, model=None, processing_class=None, **kwargs):
        for board in self._writers() if args.log_histograms else ():
            for name, parameter in model.named_parameters():
                board.add_histogram(name, parameter, state.global_step)
        if not args.sample_prompts or not (state.is_world_process_zero or self.is_sharded):
            return
        samples = continue_prompts(model, processing_class, args.sample_prompts, args.sample_tokens, seed=args.seed)
        if not state.is_world_process_zero:
            return
        with open(Path(args.output_dir) / "samples.jsonl", "a", encoding="utf-8") as file:
            for sample in samples:
                tqdm.write(f"Sample at step {state.global_step}: {sample['text']}\n", file=sys.stderr)
                file.write(json.dumps({"step": state.global_step, **sample}, ensure_ascii=False) + "\n")
        for board in self._writers():
            for number, sample in enumerate(samples):
                board.add_text(f"sample/{number}", sample["text"], state.global_step)


def explosion(log: list[dict], uniform: float = math.inf) -> str | None:
    """
    Say that the training loss has exploded, if it has: to more than twice its least value and 1 nat.

    Args:
        log: `TrainerState.log_history`.
        uniform: loss of a uniform guess, in nats.
    """
    losses = [(entry["loss"], entry["step"]) for entry in log if "loss" in entry]
    (least, at), (last, step) = min(losses), losses[-1]
    if last <= 2 * min(least, uniform) + 1:
        return None
    before = f"{least:.4g} at step {at}" if least <= uniform else f"{uniform:.4g} for a uniform guess"
    return f"the loss exploded: {last:,.4g} at step {step}, {before}. Lower learning_rate or muon_learning_rate."


def overfitting(log: list[dict]) -> str | None:
    """Say that held-out loss is 1% above its least value while training loss has fallen, if that is so."""
    held_out = [(entry["eval_loss"], entry["step"]) for entry in log if "eval_loss" in entry]
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    (least, at), (last, step) = min(held_out), held_out[-1]
    before = [loss for when, loss in losses.items() if when <= at]
    if not before or last <= 1.01 * least or not (after := list(losses.values())[-1]) < before[-1]:
        return None
    return (
        f"the model overfits: held-out loss rose from {least:.4g} at step {at} to {last:.4g} at step {step}, training "
        f"loss fell from {before[-1]:.4g} to {after:.4g}. More text, fewer steps or a smaller model help."
    )


class TroubleCallback(TrainerCallback):
    """Say once that the loss exploded, and once that the model overfits."""

    def __init__(self):
        self.said: set[str] = set()

    def _say(self, state, kind: str, text: str | None) -> None:
        if text and kind not in self.said and state.is_world_process_zero:
            self.said.add(kind)
            tqdm.write(f"Warning: {text}", file=sys.stderr)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" in logs:
            vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0) if model.can_generate() else 0
            self._say(state, "explosion", explosion(state.log_history, math.log(vocabulary or math.inf)))

    def on_evaluate(self, args, state, control, **kwargs):
        if any("eval_loss" in entry for entry in state.log_history):
            kept = (
                " The best checkpoint is kept."
                if args.load_best_model_at_end
                else " load_best_model_at_end keeps the best."
            )
            text = overfitting(state.log_history)
            self._say(state, "overfitting", text and text + kept)


class GroupByLengthCallback(TrainerCallback):
    """Draw the order of `group_by_length` from the seed and the epoch: transformers draws it from a state restored later."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        sampler = sampler_of(train_dataloader)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(args.seed + int(state.epoch))


class InterruptCallback(TrainerCallback):
    """
    SIGINT (Ctrl-C) and SIGTERM end the run after the current step, with a checkpoint; a second signal ends it at once.

    Several processes agree at the end of each step: a signal that only one of them got stops all at the same step.

    `self.signal` is the signal that ends the run, or None.
    """

    def __init__(self):
        self.signal: int | None = None
        self._received: int | None = None
        self._previous = {}
        self._saved_step = None

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: whoever runs us there handles signals
                return

    def _handle(self, number, frame):
        self._received = number
        for second in self._previous:  # ends the process, whatever it waits for
            signal.signal(second, signal.SIG_DFL)

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.signal = self._received
        if args.world_size > 1:
            self.signal = int(gather(torch.tensor([self.signal or 0], device=args.device)).max()) or None
        if self.signal is not None:
            control.should_training_stop = True
            # What decides the best checkpoint is not left out: a resumed run would not make up for it.
            control.should_evaluate = control.should_evaluate and args.metric_for_best_model is not None
        return control

    def on_save(self, args, state, control, **kwargs):
        self._saved_step = state.global_step
        if self.signal is not None:  # it is saved; transformers would load the best now and might delete all others
            state.best_model_checkpoint = None

    def on_epoch_end(self, args, state, control, **kwargs):
        """transformers calls this when it stops, after all that the step asked for."""
        if self.signal is not None:
            control.should_save = self._saved_step != state.global_step
            complete = state.epoch % 1 == 0 and args.save_strategy != "best"  # which might refuse to save
            control.should_evaluate = control.should_evaluate and complete
        return control

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()


def reads_checkpoints(callback: TrainerCallback) -> bool:
    """Whether a callback, such as wandb's or Ray's, may read a checkpoint as soon as it is saved."""
    harmless = (TrainerCallback.on_save, CommitCallback.on_save, InterruptCallback.on_save)
    return getattr(callback.on_save, "__func__", callback.on_save) not in harmless
