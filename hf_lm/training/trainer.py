"""`Trainer` with what language modelling needs: exact held-out numbers, Muon, a stop at the first NaN."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn.utils import clip_grads_with_norm_
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from ..anatomy import OperationCount
from ..data.collator import PackedCollator
from ..errors import InputError, explained, one_line
from .arguments import HfLmTrainingArguments, add_own_keys
from .callbacks import GroupByLengthCallback, reads_checkpoints
from .checkpoints import CommitCallback, checkpoint_to_resume, is_finished, newest_valid, writing
from .divergence import TrainingDiverged, describe, look, norm_of, rows_of
from .held_out import HeldOutTrainer
from .loaders import endless, guard_workers, keep_own_share, mask_duplicates, replaced
from .manifest import Progress, read_manifest
from .metrics import missing_metric_explained, reported_metrics, require_reported
from .optimizers import check_rates, choose_optimizer, lay_out_states, schedule_options

logger = logging.get_logger(__name__)


class HfLmTrainer(HeldOutTrainer):
    """
    `Trainer` for causal language models on packed blocks, with the evaluation of `HeldOutTrainer`.

    - with `args.muon_learning_rate`, the decoder layers' matrices are trained by Muon (see `BesideMuon`), the rest by
      what `optim` says.
    - a checkpoint counts when its manifest is written (see `checkpoints.py`), and a run resumes from it to the same bits.
      `train(resume_from_checkpoint=True)` takes the newest valid one. A run that has finished is not trained further.
    - a NaN or infinite loss or gradient raises `TrainingDiverged` before the optimizer steps, or does what
      `args.on_divergence` says.
    - a stream is read over and over, and each process takes its share of it.

    Any `TrainingArguments` will do; keys that they lack are at the defaults of `HfLmTrainingArguments`.

    Attributes:
        progress: tokens, seconds and divergences so far, those before a resume included.
        had_finished: whether the run was resumed after its last step.
    """

    args: HfLmTrainingArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        is_stream = isinstance(self.train_dataset, IterableDataset | None)
        self.train_dataset = endless(self.train_dataset, self.args)
        if not isinstance(self.args, HfLmTrainingArguments):
            add_own_keys(self.args)
        self.args.logging_nan_inf_filter = False  # it reads each loss back from the device; `look` has done so
        if self.is_fsdp_enabled:  # a checkpoint is a model folder, however many processes made it
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        elif self.is_world_process_zero() and (
            self.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") in ("true", "1")
        ):
            logger.warning("fsdp: not on a CPU, where accelerate does not shard: each process holds the whole model.")
        self.progress = Progress(None if is_stream else len(self.train_dataset))
        self.commits = CommitCallback(self.progress)
        self.callback_handler.callbacks.insert(0, self.commits)  # others find a checkpoint committed
        self.add_callback(GroupByLengthCallback())
        # Tied weights are saved once: they are not missing when a checkpoint is loaded.
        if tied := getattr(self.model, "all_tied_weights_keys", None):
            self.model._keys_to_ignore_on_save.update(tied)
        self.had_finished = False
        self.operations: OperationCount | None = None  # where the peak of the device is known
        self.sequence_length = 0  # tokens of a row of the last batch
        self.pace: tuple[float, int] | None = None  # time and tokens when the last log, evaluation or save was over
        self.losses: list[torch.Tensor] = []  # of the batches of the update under way
        self.grad_norm: torch.Tensor | None = None  # of the update under way
        self.made: list[float] = []  # losses of the updates since the last log
        self.has_skipped = False  # whether there was one that was not made

    @property
    def is_scaled(self) -> bool:
        """In float16 a scaler deals with infinite gradients."""
        return getattr(self.accelerator, "scaler", None) is not None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        if resume_from_checkpoint:
            named = None if resume_from_checkpoint is True else resume_from_checkpoint
            resume_from_checkpoint = str(checkpoint_to_resume(self.args, named))
        return self.go_on(resume_from_checkpoint, **kwargs)

    def go_on(self, checkpoint: str | None, **kwargs) -> TrainOutput:
        """`train`, resumed from a checkpoint that `checkpoint_to_resume` has found good, or from the start."""
        if self.models_language and self.args.eval_strategy != "no":
            require_reported(self.args.metric_for_best_model, reported_metrics(self.eval_dataset))
        if checkpoint:
            self.restore_progress(checkpoint)
            state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
            if is_finished(state, self.args):
                if self.is_world_process_zero():
                    done = "has finished training; only what comes after is done."
                    print(f"The run of {checkpoint} {done}", file=sys.stderr)
                best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
                self._load_from_checkpoint(best if best and os.path.isdir(best) else checkpoint)
                self.state, self.had_finished = state, True
                return TrainOutput(state.global_step, 0.0, {})
        self.operations = OperationCount.of(self.model, self.args.device)
        self.commits.is_awaited = any(map(reads_checkpoints, self.callback_handler.callbacks))
        self.commits.limit = self.args.save_total_limit
        self.progress.start()
        try:
            with missing_metric_explained(), replaced(self.args, save_total_limit=None):
                return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self.commits.wait()
            self.progress.count_time()

    def restore_progress(self, checkpoint: str) -> None:
        """
        Take up the counts that a checkpoint's manifest keeps (a checkpoint of the stock trainer has none).

        Raises:
            InputError: it was made with other data.
        """
        facts = read_manifest(Path(checkpoint)).get("progress")
        if facts is None:
            self.args.ignore_data_skip = self.args.restart_missing_state
            return
        if facts["rows"] != self.progress.rows and not self.args.allow_changes:
            raise InputError(
                f"{checkpoint} was made with {facts['rows']} rows of training data, there are {self.progress.rows} now. "
                "Restore them, or add --allow_changes."
            )
        self.progress.restore(facts)

    def get_train_dataloader(self) -> DataLoader:
        collator = self.data_collator
        if self.args.torch_compile and isinstance(collator, PackedCollator):
            # An epoch's last batch, where smaller, would make all that follow run in a graph for any size.
            collator = replace(collator, fill_to_rows=self.args.train_batch_size)
        own = {"dispatch_batches": False} if isinstance(self.train_dataset, IterableDataset) else {}
        with replaced(self, data_collator=collator), replaced(self.accelerator.dataloader_config, **own):
            loader = super().get_train_dataloader()
        keep_own_share(loader)
        return guard_workers(loader)

    def get_batch_samples(self, epoch_iterator, *args):
        return super().get_batch_samples(map(self.mask_duplicates, epoch_iterator), *args)

    def mask_duplicates(self, batch: dict) -> dict:
        is_last = self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last
        if is_last and self.progress.rows and self.model_accepts_loss_kwargs:
            mask_duplicates(batch, self.progress.rows, self.args)
        return batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if self.has_skipped:  # the logged loss is the mean over the updates that were made
                loss = {"loss": fmean(self.made)} if self.made else {}
                logs = {name: value for name, value in logs.items() if name != "loss"} | loss
            self.has_skipped, self.made = False, []
        if "loss" in logs and self.progress.divergences:
            logs["divergences"] = self.progress.divergences
        if "loss" in logs and self.pace:
            since, tokens = self.pace
            logs["tokens_per_second"] = (self.progress.tokens - tokens) / (time.perf_counter() - since)
            if share := self.utilization(logs["tokens_per_second"]):
                logs["mfu"] = share
        super().log(logs, start_time)
        self.pace = None

    def utilization(self, tokens_per_second: float) -> float | None:
        """Model-FLOPs utilization of all devices at such a speed; None where their peak is not known."""
        count, length = self.operations, self.sequence_length
        return count and count.utilization(length, tokens_per_second, self.args.world_size)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new, given = self.optimizer is None, self.optimizer_cls_and_kwargs
        try:
            if is_new:
                model = self.model if model is None else model
                names = self.get_decay_parameter_names(model)
                self.optimizer_cls_and_kwargs = choose_optimizer(self.args, model, names, given)
            optimizer = super().create_optimizer(model)
        except (ValueError, TypeError) as error:
            raise error if isinstance(error, InputError) else InputError(f"optim: {one_line(error)}") from error
        finally:
            self.optimizer_cls_and_kwargs = given
        if is_new and self.args.device.type == "cpu" and not self.is_sharded:
            lay_out_states(optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        given = self.args.lr_scheduler_kwargs
        options = schedule_options(self.args, num_training_steps)
        with explained("lr_scheduler_kwargs"), replaced(self.args, lr_scheduler_kwargs=options):
            scheduler = super().create_scheduler(num_training_steps, optimizer)
            check_rates(scheduler, num_training_steps, given)
        return scheduler

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Save as transformers does, marked as uncommitted; older checkpoints are deleted after the commit."""
        self.commits.wait()
        self.pace = None
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        norm = norm_of([parameter for parameter in self.model.parameters() if parameter.requires_grad])
        if not self.accelerator.reduce(norm, "mean").isfinite():
            raise TrainingDiverged(
                f"the weights are not finite at step {self.state.global_step}: {folder.name} is not saved."
            )
        self.accelerator.wait_for_everyone()
        with writing(folder, self.args.should_save):
            self.accelerator.wait_for_everyone()  # the folder is new
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # all processes have written their files

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push what is committed: the upload reads the folder in the background, where no file may come or go."""
        self.accelerator.wait_for_everyone()  # all processes have written their files
        self.commits.on_save(self.args, self.state, self.control)
        self.commits.wait()
        super()._push_from_checkpoint(checkpoint_folder)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """Compute the loss without the logits where nobody asks for them; 0 where no label of the update counts."""
        if "skip_logits" in self.columns and model.training and not return_outputs:
            inputs = {**inputs, "skip_logits": True}
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch + (num_items_in_batch == 0)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        self.commits.raise_failure()  # now, not after the work of all steps until the next save
        self.pace = self.pace or (time.perf_counter(), self.progress.tokens)
        self.progress.tokens += inputs["input_ids"].numel() * self.args.world_size
        self.sequence_length = inputs["input_ids"].shape[-1]
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss)
        if self.accelerator.sync_gradients:
            whole, self.losses = torch.stack(self.losses).sum(), []
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            self.grad_norm = None if self.is_scaled else norm_of(gradients)
            wrong = look(self.accelerator, self.progress, whole, self.grad_norm, self.args.spike_factor)
            if wrong is None:
                self.made.append(self.progress.losses[-1])
            else:
                step = self.state.global_step
                rows = rows_of(self.callback_handler.train_dataloader, self.args, step)
                self.leave_out(model, f"{wrong} at step {step + 1}. {describe(model, self.optimizer, whole, rows)}.")
        return torch.where(loss.isfinite(), loss, 0.0)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Clip by the norm that `training_step` has taken, where this process has whole gradients."""
        if self.grad_norm is None or self.is_sharded or not self.grad_norm.isfinite():
            return super()._clip_grad_norm(model)
        clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, self.grad_norm)
        return self.grad_norm

    def leave_out(self, model: nn.Module, what: str) -> None:
        """Keep the optimizer from making an update that diverged; stop if that is what `on_divergence` says."""
        action, limit, progress = self.args.on_divergence, self.args.max_divergences, self.progress
        progress.divergences += 1
        if action == "stop":
            raise TrainingDiverged(
                f"{what} Checkpoints in {self.args.output_dir} are from before. Try a lower learning_rate or "
                "muon_learning_rate, or --resume --on_divergence skip (or rollback)."
            )
        if progress.divergences > limit:
            raise TrainingDiverged(f"{what} More than max_divergences ({limit}) of them.")
        done = self.roll_back(what) if action == "rollback" else "the batch is skipped"
        logger.warning(f"{what} Number {progress.divergences} of at most {limit}: {done}.")
        for parameter in model.parameters():
            if self.is_scaled and parameter.grad is not None:
                parameter.grad.fill_(torch.inf)  # the scaler skips an update with infinite gradients
            else:
                parameter.grad = None  # what has no gradient is not updated
        self.has_skipped = True

    def roll_back(self, what: str) -> str:
        """Restore weights and optimizer, not steps and data: the same data again would end the same way."""
        self.commits.wait()
        found = [newest_valid(Path(self.args.output_dir)) if self.args.should_save else None]
        checkpoint = broadcast_object_list(found)[0]
        if checkpoint is None:
            raise TrainingDiverged(f"{what} There is no checkpoint yet to roll back to.")
        schedule = self.lr_scheduler.state_dict()
        self._load_from_checkpoint(str(checkpoint), self.model_wrapped if self.is_fsdp_enabled else None)
        self._load_optimizer_and_scheduler(str(checkpoint))
        self.lr_scheduler.load_state_dict(schedule)
        return f"rolled back to {checkpoint.name}"

    def create_model_card(self, *args, **kwargs) -> None:
        """Keep the card that is there: `hub.push.PushCallback` writes it from measurements."""
