"""`Trainer` with what language modelling needs: exact held-out numbers, Muon, a stop at the first NaN."""

import atexit
import inspect
import os
import re
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import datasets
import torch
from accelerate.utils import broadcast_object_list, str_to_bool
from datasets.distributed import split_dataset_by_node
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction, TrainOutput
from transformers.utils import logging

from ..data.collator import SIZE, PackedCollator, SizedCollator
from ..data.packing import IGNORED
from ..data.streams import EndlessStream
from ..errors import InputError, explained, one_line
from ..evaluation.text import TextScore, token_log_probabilities
from .arguments import HfLmTrainingArguments, add_own_keys, decisive
from .callbacks import InterruptCallback, end_workers, outlive_first_signal
from .checkpoints import (
    ASIDE,
    MANIFEST,
    PROGRESS,
    checkpoint_to_resume,
    newest_valid,
    read_manifest,
    rotate,
    seal,
    whole_or_nothing,
    without_crc32,
)
from .divergence import TrainingDiverged, Watch, norm_of, sampler_of
from .metrics import BITS_PER_BYTE, LANGUAGE_MODELING, WholeSet, missing_metric_explained, require_reported
from .optimizers import check_rates, lay_out_states, optimizer_class, with_muon

logger = logging.get_logger(__name__)
STOPPER_COUNT = "early_stopping_patience_counter"  # of upstream's callback, as checkpoints hold it


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, with their names."""
    return chain(model.named_parameters(), model.named_buffers())


class HfLmTrainer(Trainer):
    """
    `Trainer` for causal language models on packed blocks.

    - `evaluate` weighs every token alike, so that its numbers (loss in nats per token, perplexity, bits per byte) do
      not depend on batch size or number of processes. A `compute_metrics` of your own takes its place.
    - with `args.muon_learning_rate`, the decoder layers' matrices are trained by Muon (see `BesideMuon`), the rest by
      what `optim` says.
    - a checkpoint appears complete or not at all (see `checkpoints.py`), and a run goes on from it to the same bits.
      `train(resume_from_checkpoint=True)` takes the newest valid one. A run that has finished is not trained further.
    - a NaN or infinite loss or gradient raises `TrainingDiverged` before the optimizer steps, or does what
      `args.on_divergence` says.
    - a stream is read over and over, and each process takes its share of it.

    Any `TrainingArguments` will do; keys that they lack are at the defaults of `HfLmTrainingArguments`.

    Bits per byte need a column `num_bytes` in the rows of a held-out set: the UTF-8 bytes of the text that a row's tokens
    cover, as `pack_documents` and `build_examples` write it. Without it there is loss and perplexity.

    Args:
        eval_bytes: `num_bytes` of an `eval_dataset` that has no such column.
        row_likelihoods: what `compute_metrics` gets: of each row the negative log-likelihood of its labels, in nats,
            and their number, instead of logits and labels.
    """

    args: HfLmTrainingArguments

    def __init__(self, *args, eval_bytes: list[int] | None = None, row_likelihoods: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, HfLmTrainingArguments):
            add_own_keys(self.args)
        if self.is_fsdp_enabled:  # a checkpoint is a model folder, however many processes made it
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        elif self.is_world_process_zero() and (
            self.args.fsdp or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "0"))
        ):
            logger.warning("fsdp: not on a CPU, where accelerate does not shard: each process holds the whole model.")
        self.models_language = self.compute_metrics is None
        self.row_likelihoods = row_likelihoods or self.models_language
        if self.models_language:
            self.compute_metrics = WholeSet(self._language_modeling_metrics)
        if eval_bytes is not None and SIZE not in (getattr(self.eval_dataset, "column_names", None) or [SIZE]):
            if len(eval_bytes) != len(self.eval_dataset):
                raise InputError(f"eval_bytes: holds {len(eval_bytes)} numbers for {len(self.eval_dataset)} rows.")
            self.eval_dataset = self.eval_dataset.add_column(SIZE, eval_bytes)
        self.train_tokens, self.train_seconds = 0, 0.0
        self._length = 0  # tokens of a row of the last batch
        self._scores: tuple[int, dict] = (-1, {})  # of the last evaluation, and its step
        base = getattr(self.model, "get_base_model", lambda: self.model)()  # of a model wrapped by PEFT
        self._can_skip_logits = "skip_logits" in inspect.signature(base.forward).parameters
        self.had_finished = False  # when it was resumed
        self.watch = Watch(self)
        self._pace: tuple[float, int] | None = None  # time and tokens when the last log, evaluation or save was over
        self._losses: list[torch.Tensor] = []  # of the batches of the update under way
        self._saving_aside = False
        self._thread, self._sealing = ThreadPoolExecutor(1), Future()  # of the last checkpoint
        self._sealing.set_result(None)

    @property
    def is_sharded(self) -> bool:
        """Each process holds a part of the model: a forward takes all of them."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        if resume_from_checkpoint:
            named = None if resume_from_checkpoint is True else resume_from_checkpoint
            resume_from_checkpoint = str(checkpoint_to_resume(self.args, named))
        return self.go_on(resume_from_checkpoint, **kwargs)

    def go_on(self, checkpoint: str | None, **kwargs) -> TrainOutput:
        """`train`, from a checkpoint on that `checkpoint_to_resume` has found good."""
        if self.models_language and self.args.eval_strategy != "no":
            require_reported(self.args.metric_for_best_model, self._reported())
        if checkpoint:
            self.restore_progress(checkpoint)
            state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
            if self._is_finished(state):
                if self.is_world_process_zero():
                    print(
                        f"The run of {checkpoint} has finished training; only what comes after is done.",
                        file=sys.stderr,
                    )
                best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
                self._load_from_checkpoint(best if best and os.path.isdir(best) else checkpoint)
                self.state, self.had_finished = state, True
                return TrainOutput(state.global_step, 0.0, {})
        self._clock = time.perf_counter()
        try:
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self._finish_saving()
            self._count_time()

    def _is_finished(self, state: TrainerState) -> bool:
        """Whether a checkpoint's state is of the run's last step: the stock trainer would train one step more."""
        stopper = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
        if stopper and stopper["attributes"][STOPPER_COUNT] >= stopper["args"]["early_stopping_patience"]:
            return True
        if self.args.max_steps > 0:
            return state.global_step >= self.args.max_steps
        return state.epoch >= self.args.num_train_epochs

    def _finalize_training(self, *args):
        self._finish_saving()
        self.accelerator.wait_for_everyone()  # the best checkpoint is in its place: all processes load it
        return super()._finalize_training(*args)

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.train_seconds += now - self._clock
        self._clock = now

    def _rows(self) -> int | None:
        return None if isinstance(self.train_dataset, IterableDataset) else len(self.train_dataset)

    def restore_progress(self, checkpoint: str) -> None:
        """
        Take up the counts that a checkpoint's manifest keeps (a checkpoint of the stock trainer has none).

        Raises:
            InputError: it was made with other data.
        """
        manifest = read_manifest(Path(checkpoint)) if Path(checkpoint, MANIFEST).exists() else {}
        progress = manifest.get(PROGRESS)
        if progress is None:
            self.args.ignore_data_skip = self.args.restart_missing_state
            return
        if progress["rows"] != self._rows() and not self.args.allow_changes:
            raise InputError(
                f"{checkpoint} was made with {progress['rows']} rows of training data, there are {self._rows()} now. "
                "Restore them, or add --allow_changes."
            )
        self.train_tokens, self.train_seconds = progress["tokens"], progress["seconds"]
        self.watch.count = progress["divergences"]
        self.watch.losses.extend(progress["losses"])

    def _issue_warnings_after_load(self, load_result) -> None:
        tied = self.accelerator.unwrap_model(self.model).all_tied_weights_keys  # saved once: nothing is missing
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(type(load_result)(missing, load_result.unexpected_keys))

    def _get_dataloader(self, dataset, *args, is_training: bool = False, **kwargs) -> DataLoader:
        if is_training and isinstance(dataset, IterableDataset):
            loader = self._get_stream_loader(dataset, *args, **kwargs)
        else:
            drops, collator = self.args.dataloader_drop_last, self.data_collator
            self.args.dataloader_drop_last = drops and is_training  # what is held out is evaluated to the last row
            self._set_signature_columns_if_needed()
            columns = self._signature_columns
            if self.models_language and not is_training:
                self._signature_columns, self.data_collator = [*columns, SIZE], SizedCollator(collator)
            if is_training and self.args.torch_compile and isinstance(collator, PackedCollator):
                # An epoch's last batch, where smaller, would make all that follow run in a graph for any size.
                self.data_collator = replace(collator, fill_to_rows=self.args.train_batch_size)
            try:
                loader = super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
            finally:
                self.args.dataloader_drop_last, self.data_collator = drops, collator
                self._signature_columns = columns
        inner = getattr(loader, "base_dataloader", loader)  # of accelerate's, which only passes on
        inner.worker_init_fn = partial(outlive_first_signal, inner.worker_init_fn)
        if inner.persistent_workers:
            atexit.register(end_workers, weakref.ref(inner))
        return loader

    def _get_stream_loader(self, dataset: IterableDataset, *args, **kwargs) -> DataLoader:
        count, own = self.args.world_size, self.args.process_index
        if isinstance(dataset, datasets.IterableDataset):
            dataset = split_dataset_by_node(dataset, own, count) if count > 1 else dataset
            if next(iter(dataset), None) is None:
                few = f"has less than one row for each of the {count} processes" if count > 1 else "holds no text"
                raise InputError(f"the training data {few}.")
        loading = self.accelerator.dataloader_config
        before, loading.dispatch_batches = loading.dispatch_batches, False  # each process reads its own share
        try:
            loader = super()._get_dataloader(EndlessStream(dataset), *args, is_training=True, **kwargs)
        finally:
            loading.dispatch_batches = before
        if count > 1 and isinstance(dataset, datasets.IterableDataset):  # accelerate would split the share again
            loader.dataset.num_processes, loader.dataset.process_index = 1, 0
        return loader

    def _run_epoch(self, *, epoch: int, train_dataloader: DataLoader, **kwargs) -> None:
        sampler = sampler_of(train_dataloader)
        if isinstance(sampler, LengthGroupedSampler):  # would draw from numbers that a checkpoint restores too late
            sampler.generator = torch.Generator().manual_seed(self.args.seed + epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def get_batch_samples(self, epoch_iterator, *args):
        return super().get_batch_samples(map(self._without_repetitions, epoch_iterator), *args)

    def _without_repetitions(self, batch: dict) -> dict:
        """
        The batch; where it is an epoch's last, without the labels of rows that are there a second time. (Of several
        processes, those that have none left get the epoch's first rows again, so that all have a batch of the same size.)
        """
        args, rows, labels = self.args, self._rows(), batch.get("labels")
        is_last = self.accelerator.gradient_state.end_of_dataloader and not args.dataloader_drop_last
        if args.world_size > 1 and rows and is_last and self.model_accepts_loss_kwargs and labels.ndim == 2:
            left = rows % (args.world_size * len(labels)) or rows
            labels[max(left - args.process_index * len(labels), 0) :] = IGNORED
        return batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.watch.count:
            logs["divergences"] = self.watch.count
        if "loss" in logs and self._pace:
            since, tokens = self._pace
            logs["tokens_per_second"] = (self.train_tokens - tokens) / (time.perf_counter() - since)
            if share := self.utilization(logs["tokens_per_second"]):
                logs["mfu"] = share
        super().log(logs, start_time)
        self._pace = None

    def utilization(self, tokens_per_second: float) -> float | None:
        """Model-FLOPs utilisation of all devices at such a speed; None where their peak is not known."""
        from ..anatomy import model_flops_utilization  # here, since it imports this package

        devices = self.args.world_size
        return model_flops_utilization(self.model, self._length, tokens_per_second, self.args.device, devices)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        if not isinstance(eval_dataset, str | None):  # with persistent workers transformers keeps that of another set
            end_workers(lambda: getattr(self, "_eval_dataloaders", {}).pop("eval", None))
        return super().get_eval_dataloader(eval_dataset)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):  # whether somebody looks must not change the training's numbers
            metrics = super().evaluate(*args, **kwargs)
        if not args and not kwargs.keys() - {"ignore_keys"}:
            self._scores = self.state.global_step, metrics
        return metrics

    def held_out_scores(self) -> dict[str, float]:
        """`evaluate()`, without doing it again where the last step has been evaluated and its weights are those kept."""
        step, metrics = self._scores
        best = self.state.best_model_checkpoint and self.args.load_best_model_at_end
        kept = self.state.best_global_step if best else self.state.global_step
        return metrics if step == kept == self.state.global_step else self.evaluate()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        if is_new and getattr(self.args, "muon_learning_rate", None) is not None:
            self._create_muon(self.model if model is None else model)
        try:
            optimizer = super().create_optimizer(model)
        except (ValueError, TypeError) as error:
            raise error if isinstance(error, InputError) else InputError(f"optim: {one_line(error)}") from error
        if (
            is_new
            and self.args.device.type == "cpu"
            and not self.is_sharded
            and isinstance(optimizer, torch.optim.AdamW)
        ):
            lay_out_states(optimizer)
        return optimizer

    def _create_muon(self, model: nn.Module) -> None:
        if self.is_deepspeed_enabled:
            raise InputError("muon_learning_rate: needs whole matrices, which DeepSpeed flattens; FSDP keeps them.")
        decayed = set(self.get_decay_parameter_names(model))
        groups = {"muon": [], "decayed": [], "plain": []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_layer_matrix = parameter.ndim == 2 and re.search(r"(^|\.)layers\.\d+\.", name)
                groups["muon" if is_layer_matrix else "decayed" if name in decayed else "plain"].append(parameter)
        weight_decay = self.args.weight_decay
        kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = with_muon(kind)(
            [
                {
                    "params": groups["muon"],
                    "muon": True,
                    "lr": self.args.muon_learning_rate,
                    "momentum": self.args.muon_momentum,
                    "weight_decay": weight_decay,
                },
                {"params": groups["decayed"], "weight_decay": weight_decay},
                {"params": groups["plain"], "weight_decay": 0.0},
            ],
            **options,
        )

    get_optimizer_cls_and_kwargs = staticmethod(optimizer_class)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        with explained("lr_scheduler_kwargs"):
            scheduler = self._create_scheduler(num_training_steps, optimizer)
            check_rates(scheduler, num_training_steps, self.args.lr_scheduler_kwargs)
        return scheduler

    def _create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None):
        if self.args.lr_scheduler_type == "warmup_stable_decay" and not self.args.lr_scheduler_kwargs:
            warmup = self.args.get_warmup_steps(num_training_steps)
            decay = min(round(num_training_steps * self.args.lr_decay_ratio), num_training_steps - warmup)
            given = self.args.lr_scheduler_kwargs  # as a checkpoint's manifest keeps it
            self.args.lr_scheduler_kwargs = {"num_decay_steps": decay, "decay_type": "linear"}
            try:
                return super().create_scheduler(num_training_steps, optimizer)
            finally:
                self.args.lr_scheduler_kwargs = given
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_eval_sampler(self, eval_dataset) -> None:
        """In order: our metrics count on it. (Upstream's follows `train_sampling_strategy`.)"""

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, ASIDE) if self._saving_aside else folder

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """
        Write a checkpoint into a temporary folder. While training continues, a thread hashes it, syncs it to the disk and
        renames it. Callbacks that do something in `on_save` find it renamed: training waits where there is one.
        """
        self._finish_saving()
        self._pace = None
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        run = Path(self._get_output_dir(trial))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm, is_read = norm_of(trained), self._is_read_when_saved()
        norm, is_read = self.accelerator.reduce(torch.stack([norm, norm.new_tensor(is_read)]), "mean")
        if not norm.isfinite():
            raise TrainingDiverged(
                f"the weights are not finite at step {self.state.global_step}: {name} is not saved."
            )
        if self.args.should_save:
            shutil.rmtree(run / ASIDE, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._saving_aside = True
        try:
            with without_crc32(), whole_or_nothing(run, name):
                super()._save_checkpoint(model, trial)
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best.name == name or best.is_dir():  # upstream looks for it beside the one being saved
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()
        finally:
            self._saving_aside, self.args.save_total_limit = False, limit
        if self.args.should_save:
            self._sealing = self._thread.submit(self._seal_checkpoint(run, name, limit))
        if is_read or self.args.push_to_hub:
            self._finish_saving()
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def _is_read_when_saved(self) -> bool:
        """Whether a callback, such as wandb's or Ray's, may read a checkpoint as soon as it is saved."""
        harmless = (TrainerCallback.on_save, InterruptCallback.on_save)
        events = [callback.on_save for callback in self.callback_handler.callbacks]
        return any(getattr(event, "__func__", event) not in harmless for event in events)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving_aside:  # else it is moved while it is uploaded
            super()._push_from_checkpoint(checkpoint_folder)

    def _finish_saving(self) -> None:
        """Wait until the last checkpoint is in its place; raise what kept it from getting there."""
        self._sealing.result()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict:  # gathered from several processes: tied weights, no longer one tensor, are in it twice
            tied = self.accelerator.unwrap_model(self.model).all_tied_weights_keys
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def _seal_checkpoint(self, run: Path, name: str, limit: int | None) -> Callable[[], None]:
        """What is left to do for a checkpoint that is written: it reads nothing that training changes."""
        folder, keep = run / ASIDE / name, [run / name]
        if self.state.best_model_checkpoint:
            keep.append(Path(self.state.best_model_checkpoint))
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self._count_time()
        progress = {
            "batches": self.state.global_step * self.args.gradient_accumulation_steps,
            "rows": self._rows(),
            "tokens": self.train_tokens,
            "seconds": self.train_seconds,
            "divergences": self.watch.count,
            "losses": list(self.watch.losses),
        }
        facts = {"step": self.state.global_step, "arguments": decisive(self.args), PROGRESS: progress}

        @whole_or_nothing(run, name)
        def seal_it() -> None:
            seal(folder, run / name, **facts)
            rotate(run, limit, keep)

        return seal_it

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """Compute the loss without the logits where nobody asks for them; 0 where no label of the update counts."""
        if self._can_skip_logits and model.training and not return_outputs:
            inputs = {**inputs, "skip_logits": True}
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch + (num_items_in_batch == 0)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        if self._sealing.done():  # what went wrong is said now, not after the work of all steps until the next save
            self._finish_saving()
        self._pace = self._pace or (time.perf_counter(), self.train_tokens)
        self.train_tokens += inputs["input_ids"].numel() * self.args.world_size
        self._length = inputs["input_ids"].shape[-1]
        if not self._losses and self.is_in_train:
            self._logged_before = self._tr_loss.clone()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        if not self.accelerator.sync_gradients:
            return loss
        whole, self._losses = torch.stack(self._losses).sum(), []
        wrong = self.watch.look(model, whole)
        if wrong is None:
            return loss
        self._leave_out(model, f"{wrong} at step {self.state.global_step + 1}. {self.watch.describe(model, whole)}.")
        return torch.zeros_like(loss)

    def _leave_out(self, model: nn.Module, what: str) -> None:
        """Keep the optimizer from making an update that diverged; stop if that is what `on_divergence` says."""
        action, limit = self.args.on_divergence, self.args.max_divergences
        self.watch.count += 1
        if action == "stop":
            raise TrainingDiverged(
                f"{what} Checkpoints in {self.args.output_dir} are from before. Try a lower learning_rate or "
                "muon_learning_rate, or --resume --on_divergence skip (or rollback)."
            )
        if self.watch.count > limit:
            raise TrainingDiverged(f"{what} More than max_divergences ({limit}) of them.")
        done = self._roll_back(what) if action == "rollback" else "the batch is skipped"
        logger.warning(f"{what} Number {self.watch.count} of at most {limit}: {done}.")
        for parameter in model.parameters():
            parameter.grad = None  # what has no gradient is not updated
        # The logged loss is the mean over the updates that were made.
        self._tr_loss.copy_(self._logged_before)
        self._globalstep_last_logged += 1

    def _roll_back(self, what: str) -> str:
        """
        Weights and optimizer as in the last checkpoint. Steps, learning rate and data go on from here: the same data
        again would end the same way.
        """
        self._finish_saving()
        found = [newest_valid(Path(self.args.output_dir)) if self.args.should_save else None]
        checkpoint = broadcast_object_list(found)[0]
        if checkpoint is None:
            raise TrainingDiverged(f"{what} There is no checkpoint yet to roll back to.")
        schedule = self.lr_scheduler.state_dict()
        self._load_from_checkpoint(str(checkpoint), self.model_wrapped if self.is_fsdp_enabled else None)
        self._load_optimizer_and_scheduler(str(checkpoint))
        self.lr_scheduler.load_state_dict(schedule)
        return f"rolled back to {checkpoint.name}"

    def evaluation_loop(self, *args, **kwargs):
        if isinstance(self.compute_metrics, WholeSet):
            self.compute_metrics.reset()
        if self.is_in_train or not (self.args.bf16_full_eval or self.args.fp16_full_eval) or self.is_sharded:
            return super().evaluation_loop(*args, **kwargs)
        # transformers casts the model; what is saved afterwards must not be rounded
        kept = {name: tensor.data for name, tensor in named_tensors(self.model)}
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            for name, tensor in named_tensors(self.model):
                tensor.data = kept[name]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Nats, and tokens or, for the own metrics, tokens and bytes (0 where unknown), of each row."""
        if not self.row_likelihoods:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with self.compute_loss_context_manager():
            inputs = dict(self._prepare_inputs(inputs))
            sizes = inputs.pop(SIZE, None)
            nats = -token_log_probabilities(model, **inputs).sum(dim=1)
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum(dim=1)
        if not self.models_language:
            return None, nats, tokens
        if sizes is None:
            sizes = torch.zeros_like(tokens)
        elif len(sizes) != len(tokens):  # a collator that makes one long row of all
            sizes = sizes.sum().expand(len(tokens))
        return None, nats, torch.stack([tokens, sizes], dim=1)

    def _reported(self) -> tuple[str, ...]:
        """Names of the own metrics of all held-out sets."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        names = []
        for name, rows in sets.items():
            columns = getattr(rows, "column_names", None)
            found = LANGUAGE_MODELING + (BITS_PER_BYTE if columns is None or SIZE in columns else ())
            names += [f"{name}_{metric}" if name else metric for metric in found]
        return tuple(names)

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        with missing_metric_explained():
            return super()._evaluate(*args, **kwargs)

    def _determine_best_metric(self, *args, **kwargs) -> bool:
        with missing_metric_explained():
            return super()._determine_best_metric(*args, **kwargs)

    def _language_modeling_metrics(self, rows: EvalPrediction) -> dict[str, float]:
        nats, (tokens, sizes) = rows.predictions.astype("float64").tolist(), rows.label_ids.T.tolist()
        score = TextScore(nats, tokens, sizes, [0] * len(nats))  # blocks in order, as of one text
        metrics = {"loss": score.loss, "perplexity": score.perplexity, "tokens": sum(tokens)}
        if any(sizes):
            low, high = score.interval()
            metrics |= {"bits_per_byte": score.bits_per_byte, "bits_per_byte_low": low, "bits_per_byte_high": high}
        return metrics

    def create_model_card(self, *args, **kwargs) -> None:
        """Keep the README.md that is there: `hub.push.PushCallback` writes the card before a push."""
