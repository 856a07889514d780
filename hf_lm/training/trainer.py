"""`Trainer` with what language modelling needs: exact held-out numbers, Muon, a stop at the first NaN."""

import math
import os
import re
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction, rotate_checkpoints

from ..data.packing import IGNORED
from ..evaluation.text import TextScore, token_log_probabilities
from .arguments import HfLmTrainingArguments
from .checkpoints import ASIDE, seal
from .optimizers import MuonAdamW


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite: the run stops before the optimizer spoils the weights."""


class HfLmTrainer(Trainer):
    """
    `Trainer` for causal language models on packed blocks.

    - `evaluate` weighs every token alike, so that its numbers (loss in nats per token, perplexity, bits per byte) do
      not depend on batch size or number of processes. A `compute_metrics` of your own takes its place.
    - with `args.muon_learning_rate`, the decoder layers' matrices are trained by Muon (see `MuonAdamW`).
    - a checkpoint appears complete or not at all (see `checkpoints.py`).
    - a NaN or infinite loss raises `TrainingDiverged` before the optimizer steps.

    Args:
        eval_bytes: UTF-8 bytes of the text that the tokens of each row of `eval_dataset` cover; without them no bits
            per byte.
    """

    args: HfLmTrainingArguments

    def __init__(self, *args, eval_bytes: list[int] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.compute_metrics is None:
            self.compute_metrics = self._language_modeling_metrics
        self.eval_bytes = eval_bytes
        self.train_tokens = 0
        self._saving_aside = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        rate = getattr(self.args, "muon_learning_rate", None)
        if self.optimizer is not None or rate is None:
            return super().create_optimizer(model)
        decayed = set(self.get_decay_parameter_names(model))
        groups = {"muon": [], "decayed": [], "plain": []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_layer_matrix = parameter.ndim == 2 and re.search(r"(^|\.)layers\.\d+\.", name)
                groups["muon" if is_layer_matrix else "decayed" if name in decayed else "plain"].append(parameter)
        weight_decay = self.args.weight_decay
        _, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = MuonAdamW(
            [
                {"params": groups["muon"], "muon": True, "lr": rate, "weight_decay": weight_decay},
                {"params": groups["decayed"], "weight_decay": weight_decay},
                {"params": groups["plain"], "weight_decay": 0.0},
            ],
            **options,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.args.lr_scheduler_type == "warmup_stable_decay" and not self.args.lr_scheduler_kwargs:
            warmup = self.args.get_warmup_steps(num_training_steps)
            decay = min(round(num_training_steps * self.args.lr_decay_ratio), num_training_steps - warmup)
            self.args.lr_scheduler_kwargs = {"num_decay_steps": decay, "decay_type": "linear"}
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, ASIDE) if self._saving_aside else folder

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        run = Path(self._get_output_dir(trial))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._saving_aside = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_aside, self.args.save_total_limit = False, limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = run / ASIDE / name
            if self.state.best_global_step:  # upstream looks for the best checkpoint beside the one being saved
                self.state.best_model_checkpoint = str(run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            seal(folder, run / name, step=self.state.global_step, arguments=self.args.decisive())
            shutil.rmtree(run / ASIDE, ignore_errors=True)
            rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        self.train_tokens += inputs["input_ids"].numel() * self.args.world_size
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Reading the loss back would stall an accelerator: there it is looked at when it is logged.
        if loss.device.type == "cpu":
            self._require_finite(loss.item())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._require_finite(logs["loss"])
        super().log(logs, start_time)

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"the loss is {loss} at step {self.state.global_step + 1}; checkpoints in {self.args.output_dir} are "
                "from before. Try a lower learning_rate or muon_learning_rate."
            )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self.compute_metrics != self._language_modeling_metrics:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with self.compute_loss_context_manager():
            inputs = self._prepare_inputs(inputs)
            nats = -token_log_probabilities(model, **inputs).sum(dim=1)
        return None, nats, (inputs["labels"][:, 1:] != IGNORED).sum(dim=1)

    def _language_modeling_metrics(self, rows: EvalPrediction) -> dict[str, float]:
        nats, tokens = rows.predictions.astype("float64").tolist(), rows.label_ids.tolist()
        score = TextScore(nats, tokens, self.eval_bytes or [], [0] * len(nats))  # blocks in order, as of one text
        metrics = {"loss": score.loss, "perplexity": score.perplexity, "tokens": sum(tokens)}
        if self.eval_bytes:
            low, high = score.interval()
            metrics |= {"bits_per_byte": score.bits_per_byte, "bits_per_byte_low": low, "bits_per_byte_high": high}
        return metrics

    def create_model_card(self, *args, **kwargs) -> None:
        """Ours, from the measurements, instead of upstream's."""
        from ..hub import write_card

        if self.is_world_process_zero():
            write_card(self.args.output_dir, name=self.hub_model_id)
