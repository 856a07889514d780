"""Evaluation on held-out text whose numbers depend on nothing but model and text."""

from collections.abc import Callable

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from ..data.collator import SIZE, SizedCollator
from ..errors import InputError
from .loaders import columns_of, guard_workers, replaced
from .metrics import WholeSet, language_modeling_metrics, row_likelihoods


class HeldOutTrainer(Trainer):
    """
    `Trainer` whose `evaluate` weighs every token alike: loss (nats per token), perplexity and bits per byte do not depend
    on batch size or number of processes. A `compute_metrics` of your own takes their place.

    Bits per byte need a column `num_bytes` in the rows of a held-out set: the UTF-8 bytes of the text that a row's tokens
    cover, as `pack_documents` and `build_examples` write it. Without it there is loss and perplexity.

    Args:
        eval_bytes: `num_bytes` of an `eval_dataset` that has no such column.
        row_likelihoods: what `compute_metrics` gets: of each row the negative log-likelihood of its labels, in nats,
            and their number, instead of logits and labels.

    Raises:
        InputError: `eval_bytes` has another length than `eval_dataset`.
    """

    def __init__(self, *args, eval_bytes: list[int] | None = None, row_likelihoods: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        if eval_bytes is not None and SIZE not in (getattr(self.eval_dataset, "column_names", None) or [SIZE]):
            if len(eval_bytes) != len(self.eval_dataset):
                raise InputError(f"eval_bytes: holds {len(eval_bytes)} numbers for {len(self.eval_dataset)} rows.")
            self.eval_dataset = self.eval_dataset.add_column(SIZE, eval_bytes)
        self.models_language = self.compute_metrics is None
        self.row_likelihoods = row_likelihoods or self.models_language
        if self.models_language:
            self.compute_metrics = WholeSet(language_modeling_metrics)
        self.columns = columns_of(self.model)
        self.scored: tuple[int, dict] = (-1, {})  # step and metrics of the last evaluation

    @property
    def is_sharded(self) -> bool:
        """Each process holds a part of the model: a forward takes all of them."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def held_out_loader(self, build: Callable[[], DataLoader]) -> DataLoader:
        """What `build` builds: all rows of a held-out set in order, with their sizes where they are scored as language."""
        values, collator = {"dataloader_drop_last": False, "train_sampling_strategy": "random"}, self.data_collator
        if self.models_language:
            columns = {*self.columns, SIZE} if self.args.remove_unused_columns else None
            collator, values["remove_unused_columns"] = SizedCollator(collator, columns), False
        with replaced(self.args, **values), replaced(self, data_collator=collator):
            return guard_workers(build())

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        # With persistent workers transformers would keep the loader of a set that is passed, and give it for another.
        keeps = self.args.dataloader_persistent_workers and isinstance(eval_dataset, str | None)
        with replaced(self.args, dataloader_persistent_workers=keeps):
            return self.held_out_loader(lambda: super(HeldOutTrainer, self).get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        return self.held_out_loader(lambda: super(HeldOutTrainer, self).get_test_dataloader(test_dataset))

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):  # whether somebody looks must not change the training's numbers
            metrics = super().evaluate(*args, **kwargs)
        if not args and not kwargs.keys() - {"ignore_keys"}:
            self.scored = self.state.global_step, metrics
        return metrics

    def held_out_scores(self) -> dict[str, float]:
        """`evaluate()`, without doing it again where the last step has been evaluated and its weights are those kept."""
        step, metrics = self.scored
        best = self.state.best_model_checkpoint and self.args.load_best_model_at_end
        kept = self.state.best_global_step if best else self.state.global_step
        return metrics if step == kept == self.state.global_step else self.evaluate()

    def evaluation_loop(self, *args, **kwargs):
        if isinstance(self.compute_metrics, WholeSet):
            self.compute_metrics.reset()
        if self.is_in_train or not (self.args.bf16_full_eval or self.args.fp16_full_eval) or self.is_sharded:
            return super().evaluation_loop(*args, **kwargs)
        # transformers casts the model; what is saved afterwards must not be rounded
        kept = [(tensor, tensor.data) for tensor in (*self.model.parameters(), *self.model.buffers())]
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            for tensor, data in kept:
                tensor.data = data

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if not self.row_likelihoods:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with self.compute_loss_context_manager():
            return row_likelihoods(model, inputs, with_sizes=self.models_language)
