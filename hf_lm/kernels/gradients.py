"""Rotary positions, RMS norm and squared ReLU with hand-written exact gradients, measured to be faster than PyTorch's."""

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.utils.import_utils import is_torch_fx_proxy

from .. import functional_hf_lm as plain
from ..functional_hf_lm import autocast_dtype, rotate_half


def is_compiled() -> bool:
    """Whether `torch.compile` traces this. (An export that is not strict does not come by Dynamo.)"""
    return torch.compiler.is_dynamo_compiling()


def uses_plain_backward() -> bool:
    """Whether a hand-written gradient can be used: eager reverse mode, neither `torch.func` nor forward mode."""
    is_transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed


# Compiled, the cosines would be computed anew in the kernels of every layer: 5 of 130 ms a step on a GPU (recipes/log/gpu.md).
@torch.library.custom_op("hf_lm::cosines_and_sines", mutates_args=())
def _cosines_and_sines(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return angles.cos(), angles.sin()


@_cosines_and_sines.register_fake
def _(angles):
    return torch.empty_like(angles), torch.empty_like(angles)


def cosines_and_sines(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula of this name; for a compiler one operator, whose outcome is kept."""
    return _cosines_and_sines(angles) if is_compiled() else (angles.cos(), angles.sin())


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int = 1) -> torch.Tensor:
    """`x * cos + sign * rotate_half(x) * sin` in few passes."""
    turned, half = x * cos, x.shape[-1] // 2
    if half * x.itemsize < 64:  # a vector register, below which halves are slow
        return turned.addcmul_(rotate_half(x), sin, value=sign)
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return turned


class _Rotation(torch.autograd.Function):
    """`y = x cos + rotate_half(x) sin`: `dx` is `dy` turned back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _Rotation.apply(grad, cos, -sin), None, None
        return rotate(grad, cos, sin, sign=-1), None, None


def apply_rotary_pos_emb(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    training: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The formula of this name. In training, where pairs are halves apart, with its own gradient: forward and backward of
    4 x 512 tokens with 6 heads of 64 take 3.0 instead of 9.2 ms (float32, two cores), 2.0 instead of 3.5 in bfloat16.
    """
    cos, sin = cos.unsqueeze(1).to(q.dtype), sin.unsqueeze(1).to(q.dtype)
    rotated, heads = cos.shape[-1], q.shape[1]
    by_hand = training and not interleaved and uses_plain_backward()

    def turn(x: torch.Tensor) -> torch.Tensor:
        turning = x[..., :rotated]
        if by_hand:
            turned = _Rotation.apply(turning, cos, sin)
        else:
            turned = turning * cos + rotate_half(turning, interleaved) * sin
        return turned if rotated == x.shape[-1] else torch.cat((turned, x[..., rotated:]), dim=-1)

    if by_hand or torch.compiler.is_compiling():
        return turn(q), turn(k)
    both = turn(torch.cat((q, k), dim=1))  # at once: in decoding, the number of operations is what takes the time
    return both[:, :heads], both[:, heads:]


class _RMSNorm(torch.autograd.Function):
    """
    `y = w n` with `n = x / rms(x)`: `dx = (w dy - n mean(w dy n)) / rms(x)`, `dw = sum(dy n)`.

    `n` and `1 / rms(x)` are outputs as well: what is saved is then part of the graph of a second derivative.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, weight, inverse)
        ctx.set_materialize_grads(False)
        return normed * weight, normed, inverse

    @staticmethod
    def backward(ctx, grad, grad_normed, grad_inverse):
        normed, weight, inverse = ctx.saved_tensors
        if torch.is_grad_enabled() or grad_normed is not None or grad_inverse is not None:
            return *_RMSNorm.second_backward(normed, weight, inverse, grad, grad_normed, grad_inverse), None
        grad_normed = grad * weight
        dot = (grad_normed * normed).sum(dim=-1, keepdim=True)
        grad_weight = (grad * normed).flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
        return grad_normed.addcmul_(normed, dot, value=-1.0 / normed.shape[-1]).mul_(inverse), grad_weight, None

    @staticmethod
    def second_backward(normed, weight, inverse, *grads):
        """The same gradients by operations that can be differentiated, and those of the other outputs."""
        outputs = normed, normed, inverse
        grad, grad_normed, grad_inverse = (
            torch.zeros_like(y) if given is None else given for y, given in zip(outputs, grads, strict=True)
        )
        to_normed = grad_normed + grad * weight
        centered = to_normed - normed * (to_normed * normed).mean(dim=-1, keepdim=True)
        to_length = grad_inverse * inverse.square() * normed / normed.shape[-1]
        return centered * inverse - to_length, (grad * normed).flatten(0, -2).sum(dim=0)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, training: bool = False) -> torch.Tensor:
    """
    The formula of this name. On a CPU PyTorch's own has no fused backward: `_RMSNorm` takes 0.30 instead of 0.42 ms,
    forward and backward, for 1,024 x 128 values on two cores.
    """
    if not is_torch_fx_proxy(x) and x.device.type == "cpu":
        if x.dtype.itemsize == 2 and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            normed = (x * length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)
            return normed.to(autocast_dtype("cpu") or x.dtype)
        if training and uses_plain_backward():
            return _RMSNorm.apply(x.float(), weight.float(), eps)[0].to(autocast_dtype("cpu") or x.dtype)
    return plain.rms_norm.__wrapped__(x, weight, eps)


class _SquaredReLU(torch.autograd.Function):
    """`y = r ** 2` with `r = relu(x)`: `dx = 2 r dy`. `r` is an output as well, for second derivatives."""

    @staticmethod
    def forward(ctx, x):
        rectified = x.relu()
        ctx.save_for_backward(rectified)
        ctx.set_materialize_grads(False)
        return rectified.square(), rectified

    @staticmethod
    def backward(ctx, grad, grad_rectified):
        (rectified,) = ctx.saved_tensors
        if grad_rectified is None and not torch.is_grad_enabled():
            return (grad * rectified).mul_(2.0)
        parts = [] if grad is None else [2.0 * grad * rectified]
        return sum(parts + ([] if grad_rectified is None else [grad_rectified * (rectified > 0)]))


def squared_relu(x: torch.Tensor, training: bool = False) -> torch.Tensor:
    """
    `relu(x) ** 2` (arXiv:2109.08668). In training its gradient takes two passes: forward and backward of 1,024 x 512
    values 1.31 instead of 3.69 ms (CPU, one thread).
    """
    return _SquaredReLU.apply(x)[0] if training and uses_plain_backward() else nn.functional.relu(x).square()


class SquaredReLU(nn.Module):
    """The activation `"relu2"` of transformers, by `squared_relu`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return squared_relu(hidden_states, self.training)
