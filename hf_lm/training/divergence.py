"""What is seen when a loss or a gradient is no longer a number, or the loss leaps."""

import math
from itertools import islice
from statistics import fmean

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.utils import get_total_norm

from ..errors import Failure
from .manifest import Progress

ENOUGH = 10  # losses at least, against whose mean a spike is measured
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


def look(
    accelerator: Accelerator,
    progress: Progress,
    loss: torch.Tensor,
    norm: torch.Tensor | None,
    spike_factor: float | None,
) -> str | None:
    """
    What is wrong with an update, after its last backward pass; None if nothing is. All processes conclude the same, with
    one synchronization of host and device.

    Args:
        progress: has the losses of earlier updates; takes that of this one if it is right.
        loss: sum of those of the update's batches, shape `()`.
        norm: of the gradients, shape `()`; None where infinite ones are the gradient scaler's business (float16).
        spike_factor: treat a loss above this many times the recent mean as diverged; None: never.
    """
    # A NaN or an infinity of any process is still one in the mean.
    norm = loss.new_zeros(()) if norm is None else norm.to(loss.device)
    loss, norm = accelerator.reduce(torch.stack([loss.float(), norm.float()]), "mean").tolist()
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the gradient norm is {norm}"
    usual = fmean(progress.losses or [loss])
    if spike_factor is not None and len(progress.losses) >= ENOUGH and loss > spike_factor * usual:
        return f"the loss is {loss:.4g}, {loss / usual:.1f} times the mean of the {len(progress.losses)} before"
    progress.losses.append(loss)
    return None


def describe(model: torch.nn.Module, optimizer, loss: torch.Tensor, rows: str) -> str:
    """
    Loss, gradient norm of each parameter group and rows of the update, of the processes where it went wrong.

    Args:
        rows: as `rows_of` names them.
    """
    own = not math.isfinite(loss.item())
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        kind = f"{'Muon, ' if group.get('muon') else ''}weight_decay {group.get('weight_decay')}"
        groups.append(f"{norm_of(gradients).item():.4g} in group {number} ({kind})")
    named = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    first = next((name for name, gradient in named if not norm_of([gradient]).isfinite()), None)
    text = f"loss {loss.item():.6g}; gradient norm {', '.join(groups)}"
    text += f", first not finite in {first}" if first else ""
    text += f"; rows {rows}"
    every = list(enumerate(gather_object([(own, text)])))
    if len(every) == 1:
        return text
    chosen = [pair for pair in every if pair[1][0]] or every
    return "; ".join(f"process {rank}: {text}" for rank, (_, text) in chosen[:SHOWN])


def rows_of(loader: torch.utils.data.DataLoader, args, step: int) -> str:
    """Numbers of the rows of the training data that make up this process's part of the update after `step`."""
    count = args.gradient_accumulation_steps
    if isinstance(loader.dataset, torch.utils.data.IterableDataset):
        size = args.train_batch_size * args.world_size * count
        return f"{step * size} to {(step + 1) * size - 1} of the stream"
    start = step % math.ceil(len(loader) / count) * count
    order = getattr(sampler_of(loader), "generator", None)
    if order is not None:  # it has gone on since the epoch's start
        order.manual_seed(order.initial_seed())
    with torch.random.fork_rng(devices=[]):  # some samplers draw from it
        return ", ".join(str(row) for batch in islice(loader.batch_sampler, start, start + count) for row in batch)
