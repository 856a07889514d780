"""
Chunked cross-entropy. Same value and gradient as `cross_entropy(lm_head(hidden_states), labels)`, but only one slice of
the logits exists at a time.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers.utils import logging

from ..functional_hf_lm import autocast_dtype, has_no_values, number_of_items
from .gradients import uses_plain_backward

logger = logging.get_logger(__name__)

# Logits held at once: on a CPU in 16 bits and in 32, and on an accelerator. A CPU's unit for 16-bit products is so fast that a
# slice should stay in the cache; where products take nearly all of the time, larger ones are faster.
SLICE_ELEMENTS = {"cpu16": 2**19, "cpu32": 2**22, "default": 2**27}
SLICE_ROWS = 256  # or a multiple: whole tiles; not less, for each slice adds to the gradient of the whole matrix
# In 16 bits a larger vocabulary is sliced too on a CPU, by this number of columns, and the logits are recomputed, the first
# time only to add up each row. 2,048 rows at a vocabulary of 49,152: 1.1 s of one thread, instead of 1.7 s in slices of
# whole rows. In float32 the fourth product costs more than it saves (AVX2, two threads: 3.3 s, and 2.2 s in whole rows).
WIDE_VOCABULARY, SLICE_COLUMNS = 2**14, 2**11


def slice_shape(device: str, vocab_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """How many rows and columns of logits `linear_cross_entropy` holds at once on a type of device."""
    kind = "default" if device != "cpu" else "cpu16" if dtype.itemsize == 2 else "cpu32"
    rows = max(1, SLICE_ELEMENTS[kind] // vocab_size // SLICE_ROWS) * SLICE_ROWS
    return rows, SLICE_COLUMNS if kind == "cpu16" and vocab_size > WIDE_VOCABULARY else vocab_size


def without_autocast(device: str) -> AbstractContextManager:
    """Compute in the dtypes given; the meta device has no autocast to switch off."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def _plain_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    scale: float,
    cap: float | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The loss of `_loss_and_gradients` by all logits at once, which PyTorch differentiates in every way it can."""
    with without_autocast(hidden.device.type):
        z = nn.functional.linear(hidden.to(dtype), weight.to(dtype)).float()
        z = (z if bias is None else z + bias) * scale
        z = z if cap is None else cap * torch.tanh(z / cap)
        return nn.functional.cross_entropy(z, labels, ignore_index=ignore_index, reduction="sum")


def _loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    scale: float,
    cap: float | None,
    ignore_index: int,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Sum over rows of `logsumexp(z) - z[label]`, with `z = cap * tanh(scale * (h W^T + b) / cap)`, and its gradients.

    These are computed along with the loss, while a slice of `z` is at hand:
    `dz = (softmax(z) - onehot(label)) * scale * (1 - (z / cap) ** 2)`, `dh = dz W`, `dW = dz^T h`.

    Args:
        hidden: `(rows, hidden)`; weight: `(vocabulary, hidden)`; labels: `(rows,)`.
        dtype: of the products.
        need_hidden, need_weight, need_bias: which gradients.

    Returns:
        The loss and the three gradients, in float32; empty where not needed.
    """
    rows_16, matrix = hidden.to(dtype), weight.to(dtype)
    size, device = weight.shape[0], hidden.device.type
    height, width = slice_shape(device, size, dtype)
    rows = [slice(i, i + height) for i in range(0, hidden.shape[0], height)]
    columns = [slice(i, i + width) for i in range(0, size, width)]
    counted = (labels != ignore_index)[:, None]
    targets = labels[:, None].masked_fill(~counted, -1)
    counted_rows = rows_16 * counted  # the others add nothing to the gradients of weight and bias
    total = hidden.new_zeros((), dtype=torch.float32)
    grads = _room_for_gradients((hidden, weight, bias), (need_hidden, need_weight, need_bias))
    grad_hidden, grad_weight, grad_bias = (grad.zero_() for grad in grads)

    def scores(row: slice, column: slice) -> torch.Tensor:
        z = (rows_16[row] @ matrix[column].T).float()
        if bias is not None:
            z += bias[column]
        if scale != 1.0:
            z *= scale
        return z if cap is None else z.div_(cap).tanh_().mul_(cap)

    def log_totals(row: slice) -> torch.Tensor:
        parts = [scores(row, column).logsumexp(dim=-1, keepdim=True) for column in columns]
        return torch.cat(parts, dim=1).logsumexp(dim=-1, keepdim=True)

    with without_autocast(device):
        known = [log_totals(row) for row in rows] if len(columns) > 1 else [None] * len(rows)
        for column in columns:
            for row, log_total in zip(rows, known, strict=True):
                z = scores(row, column)
                place = targets[row] - column.start
                outside = (place < 0) | (place >= z.shape[1])
                place = place.masked_fill(outside, 0)
                at_label = z.gather(1, place)
                # On a CPU the softmax may take the place of the scores; of capped ones the slope is still to come.
                room = z if cap is None and device == "cpu" else None
                if log_total is None:  # PyTorch's softmax passes over the numbers once, and its largest is 1 / sum
                    largest = z.amax(dim=-1, keepdim=True)
                    dz = torch.softmax(z, dim=-1, out=room)
                    log_total = largest - dz.amax(dim=-1, keepdim=True).log()
                else:
                    dz = torch.sub(z, log_total, out=room).exp_()
                total += (log_total - at_label).masked_fill_(outside, 0.0).sum()
                if not (need_hidden or need_weight or need_bias):
                    continue
                dz.scatter_add_(1, place, outside.to(dz.dtype).sub_(1.0))
                if cap is not None:
                    dz.mul_(z.div_(cap).square_().neg_().add_(1.0))
                if scale != 1.0:
                    dz.mul_(scale)
                if need_bias:
                    grad_bias[column] += dz.T @ counted[row, 0].to(dz.dtype)
                dz = dz.to(matrix.dtype)
                if need_hidden:
                    _add_product(grad_hidden[row], dz, matrix[column])
                if need_weight:
                    _add_product(grad_weight[column], dz.T, counted_rows[row])
                del z, dz  # else they would still be there beside the next ones
    return total, grad_hidden.mul_(counted) if need_hidden else grad_hidden, grad_weight, grad_bias


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left @ right`, in one pass where the dtypes agree or the device adds up in another."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    elif total.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _room_for_gradients(inputs: tuple[torch.Tensor | None, ...], needed: tuple[bool, ...]) -> list[torch.Tensor]:
    shapes = [x.shape if need else (0,) for x, need in zip(inputs, needed, strict=True)]
    return [inputs[0].new_empty(shape, dtype=torch.float32) for shape in shapes]


# For a compiler, which would unroll the slices into thousands of nodes, or else hold all logits, it is one operator.
_loss_operator = torch.library.custom_op("hf_lm::loss_and_gradients", _loss_and_gradients, mutates_args=())


@_loss_operator.register_fake
def _(hidden, weight, bias, labels, scale, cap, ignore_index, dtype, *needed):
    total = hidden.new_empty((), dtype=torch.float32)
    return total, *_room_for_gradients((hidden, weight, bias), needed)


@torch.compile
def _slice_gradient(
    z: torch.Tensor, targets: torch.Tensor, scale: float, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Of one slice of products `z = h W^T + b` `(rows, vocabulary)`: the summed loss, and its gradient to `z` in the dtype of
    `z`. Compiled, it passes over `z` twice and keeps no copy of it in float32.

    Args:
        targets: `(rows, 1)`; less than 0 where the row does not count.
    """
    scores = z.float() * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    log_total = scores.logsumexp(dim=-1, keepdim=True)
    counted = targets >= 0
    loss = torch.where(counted, log_total - scores.gather(1, targets.clamp(min=0)), 0.0).sum()
    slope = scale if cap is None else scale * (1.0 - (scores / cap) ** 2)
    columns = torch.arange(z.shape[1], device=z.device)
    gradient = ((scores - log_total).exp() - (columns == targets).float()) * slope
    return loss, torch.where(counted, gradient, 0.0).to(z.dtype)


@_loss_operator.register_kernel("cuda")
def _compiled_loss_and_gradients(
    hidden, weight, bias, labels, scale, cap, ignore_index, dtype, need_hidden, need_weight, need_bias
):
    """`_loss_and_gradients` for an accelerator, where each pass over a slice costs as much as a product."""
    inputs, matrix = hidden.to(dtype), weight.to(dtype)
    height, _ = slice_shape(hidden.device.type, weight.shape[0], dtype)
    targets = labels[:, None].masked_fill(labels[:, None] == ignore_index, -1)
    total = hidden.new_zeros((), dtype=torch.float32)
    grads = _room_for_gradients((hidden, weight, bias), (need_hidden, need_weight, need_bias))
    grad_hidden, grad_weight, grad_bias = (grad.zero_() for grad in grads)
    with without_autocast(hidden.device.type):
        for row in (slice(i, i + height) for i in range(0, len(inputs), height)):
            z = nn.functional.linear(inputs[row], matrix, None if bias is None else bias.to(dtype))
            loss, dz = _slice_gradient(z, targets[row], scale, cap)
            total += loss
            if need_hidden:
                grad_hidden[row] = dz @ matrix
            if need_weight:
                _add_product(grad_weight, dz.T, inputs[row])
            if need_bias:
                grad_bias += dz.sum(dim=0, dtype=torch.float32)
            del z, dz  # else they would still be there beside the next ones
    return total, grad_hidden, grad_weight, grad_bias


COMPILED_ON = ("cuda",)  # kinds of device on which a slice's gradient is compiled even where the model is not
_compiler_fails = False  # found out by trying: no Triton, or no C compiler for it


def _fastest_loss_and_gradients(hidden: torch.Tensor, *arguments) -> tuple[torch.Tensor, ...]:
    """`_loss_and_gradients`, as it is fastest on the device."""
    global _compiler_fails
    if torch.compiler.is_compiling():
        return _loss_operator(hidden, *arguments)
    if hidden.device.type in COMPILED_ON and not _compiler_fails:
        try:
            return _compiled_loss_and_gradients(hidden, *arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of the compiler; an error of the inputs is raised again below
            _compiler_fails = True
            reason = " ".join(str(error).partition("\n\n")[0].split())
            logger.warning(f"The loss takes longer and more memory, for here it cannot be compiled. {reason}")
    return _loss_and_gradients(hidden, *arguments)


class _LinearCrossEntropy(torch.autograd.Function):
    """`_loss_and_gradients`, which has done the work of the backward already."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, *arguments):
        needed = ctx.needs_input_grad[:3]
        total, *grads = _fastest_loss_and_gradients(hidden, weight, bias, *arguments, *needed)
        labels, *ctx.arguments = arguments
        ctx.save_for_backward(*grads, hidden, weight, bias, labels)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        *grads, hidden, weight, bias, labels = ctx.saved_tensors
        inputs, is_compiling = (hidden, weight, bias), torch.compiler.is_compiling()
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not is_compiling:  # create_graph=True: a second derivative may follow
            # Views: with tied embeddings the hidden states themselves depend on the weight.
            inputs = [None if x is None else x.view_as(x) for x in inputs]
            total = _plain_loss(*inputs, labels, *ctx.arguments)
            asked = [x for x, need in zip(inputs, needed, strict=True) if need]
            found = iter(torch.autograd.grad(total, asked, grad_total, create_graph=True))
            return (*[next(found) if need else None for need in needed], *[None] * 5)
        # In place unless they are wanted again: a copy of the matrix's would stand beside all that the step keeps.
        again = is_compiling or torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = [grad * grad_total if again else grad.mul_(grad_total) for grad in grads]
        grads = [g.to(x.dtype) if need else None for g, x, need in zip(scaled, inputs, needed, strict=True)]
        return (*grads, *[None] * 5)


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    lm_head: nn.Linear,
    labels: torch.Tensor | None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    The causal language-modelling loss without the logits: equal to transformers' `ForCausalLMLoss` of them, in value
    and gradient, but never more than a slice of the logits exists at a time.

    Args:
        hidden_states: `(batch, sequence, hidden)`, after the final norm.
        labels: `(batch, sequence)`, shifted here; or `shift_labels`, already shifted.
        num_items_in_batch: what the summed loss is divided by; default: the number of labels that count.

    Returns:
        Scalar, nats per token; 0 where no label counts.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.reshape(-1).to(hidden_states.device)
    hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
    # Where little is learned (an answer, a label) little is computed; not on an accelerator, which this would stall.
    learned = shift_labels != ignore_index
    if learned.device.type == "cpu" and not has_no_values(learned) and 2 * learned.sum() < len(learned):
        hidden_states, shift_labels = hidden_states[learned], shift_labels[learned]
    is_usual = uses_plain_backward() or not torch.is_grad_enabled() or torch.compiler.is_compiling()
    total = (_LinearCrossEntropy.apply if is_usual else _plain_loss)(
        hidden_states,
        lm_head.weight,
        lm_head.bias,
        shift_labels,
        logit_scale,
        softcap,
        ignore_index,
        autocast_dtype(hidden_states.device.type) or hidden_states.dtype,
    )
    number = number_of_items(shift_labels, num_items_in_batch, ignore_index)
    return total / (number.to(total.device) if torch.is_tensor(number) else number)
