"""What is seen when a loss or a gradient is no longer a number, or the loss leaps."""

import math
from collections import deque
from itertools import islice
from statistics import fmean

import torch
from accelerate.utils import gather_object
from torch.nn.utils import get_total_norm

from ..errors import Failure

WINDOW, ENOUGH = 100, 10  # a spike is measured against the mean of so many losses, at most and at least
SHOWN = 4  # processes that a message tells about


class TrainingDiverged(Failure):
    """The loss or a gradient became NaN or infinite: the run stops before the optimizer spoils the weights."""


def sampler_of(loader: torch.utils.data.DataLoader):
    """The sampler of rows, below whatever splits its batches among processes and skips some."""
    sampler = loader
    while getattr(sampler, "batch_sampler", None) is not None:
        sampler = sampler.batch_sampler
    return getattr(sampler, "sampler", sampler)


def norm_of(tensors) -> torch.Tensor:
    """Euclidean norm over all tensors, of what this process holds of them. Shape `()`."""
    return get_total_norm([tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]).float()


class Watch:
    """
    Looks at each update before the optimizer makes it. All processes come to the same conclusion.

    Attributes:
        count: divergences so far.
        losses: of the last updates, the mean over all processes.
    """

    def __init__(self, trainer):
        self.trainer, self.count, self.losses = trainer, 0, deque(maxlen=WINDOW)

    def look(self, model: torch.nn.Module, loss: torch.Tensor) -> str | None:
        """
        What is wrong with an update, after its last backward pass; None if nothing is.

        Args:
            loss: of all its batches, shape `()`.
        """
        accelerator = self.trainer.accelerator
        scaled = getattr(accelerator, "scaler", None) is not None  # float16: its scaler deals with infinite gradients
        gradients = [] if scaled else [p.grad for p in model.parameters() if p.grad is not None]
        # A NaN or an infinity of any process is still one in the mean.
        seen = accelerator.reduce(torch.stack([loss.float(), norm_of(gradients).to(loss.device)]), "mean")
        loss, norm = seen.tolist()
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        usual, factor = fmean(self.losses or [loss]), self.trainer.args.spike_factor
        if factor is not None and len(self.losses) >= ENOUGH and loss > factor * usual:
            return f"the loss is {loss:.4g}, {loss / usual:.1f} times the mean of the {len(self.losses)} before"
        self.losses.append(loss)
        return None

    def describe(self, model: torch.nn.Module, loss: torch.Tensor) -> str:
        """Loss, gradient norm of each parameter group and rows of the batch, of the processes where it went wrong."""
        own = not math.isfinite(loss.item())
        groups = []
        for number, group in enumerate(self.trainer.optimizer.param_groups):
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            kind = f"{'Muon, ' if group.get('muon') else ''}weight_decay {group.get('weight_decay')}"
            groups.append(f"{norm_of(gradients).item():.4g} in group {number} ({kind})")
        first = next((n for n, p in model.named_parameters() if p.grad is not None and not norm_of([p.grad]).isfinite()), None)  # fmt: skip
        text = f"loss {loss.item():.6g}; gradient norm {', '.join(groups)}"
        text += f", first not finite in {first}" if first else ""
        text += f"; rows {self.rows()}"
        every = list(enumerate(gather_object([(own, text)])))
        if len(every) == 1:
            return text
        chosen = [pair for pair in every if pair[1][0]] or every
        return "; ".join(f"process {rank}: {text}" for rank, (_, text) in chosen[:SHOWN])

    def rows(self) -> str:
        """Numbers of the rows of the training data that make up this process's part of the update."""
        trainer, args = self.trainer, self.trainer.args
        loader, count = trainer.callback_handler.train_dataloader, args.gradient_accumulation_steps
        if isinstance(loader.dataset, torch.utils.data.IterableDataset):
            size = trainer._train_batch_size * args.world_size * count
            start = trainer.state.global_step * size
            return f"{start} to {start + size - 1} of the stream"
        updates = math.ceil(len(loader) / count)
        start = trainer.state.global_step % updates * count
        order = getattr(sampler_of(loader), "generator", None)
        if order is not None:  # it has gone on since the epoch's start
            order.manual_seed(order.initial_seed())
        with torch.random.fork_rng(devices=[]):  # some samplers draw from it
            return ", ".join(str(row) for batch in islice(loader.batch_sampler, start, start + count) for row in batch)
