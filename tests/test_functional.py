"""The hand-written gradients equal those of the plain formulas."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

import hf_lm.functional_hf_lm as functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_relu_has_the_librarys_bits(dtype):
    torch.manual_seed(0)
    x, grad = torch.randn(7, 33, dtype=dtype, requires_grad=True), torch.randn(7, 33, dtype=dtype)
    expected = ACT2FN["relu2"](x)
    for training in (True, False):
        actual = functional.squared_relu(x, training)
        assert torch.equal(actual, expected)
        assert torch.equal(*(torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y in (actual, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_torchs(dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 5, 16, dtype=dtype, requires_grad=True)
    weight = torch.rand(16, requires_grad=True)
    grad = torch.randn(4, 5, 16, dtype=dtype)
    reference = nn.functional.rms_norm(x.double(), (16,), weight.double(), 1e-6)
    expected = torch.autograd.grad(reference, (x, weight), grad.double())
    norm = functional.rms_norm(x, weight, 1e-6, training=True)
    actual = torch.autograd.grad(norm, (x, weight), grad)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert norm.dtype == dtype
    torch.testing.assert_close(norm, reference.to(dtype), **tolerance)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), **tolerance)
    plain = functional.rms_norm(x, weight, 1e-6, training=False)
    torch.testing.assert_close(plain, reference.to(dtype), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim, rotated", [(64, 64), (64, 16), (8, 8)])
def test_the_rotation_equals_the_plain_one(head_dim, rotated, interleaved, dtype):
    """Turned in halves, in part, and where halves are too short for that."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 7, 3, head_dim, dtype=dtype), torch.randn(2, 7, 1, head_dim, dtype=dtype)
    q, k = (x.transpose(1, 2).requires_grad_() for x in (q, k))
    grads = torch.randn(2, 3, 7, head_dim, dtype=dtype), torch.randn(2, 1, 7, head_dim, dtype=dtype)
    angles = torch.rand(2, 7, rotated // 2, dtype=torch.float64) * 6
    angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k)]
    expected = functional.apply_rotary_pos_emb(*exact, cos.double(), sin.double(), interleaved)
    actual = functional.apply_rotary_pos_emb(q, k, cos, sin, interleaved, training=True)
    if rotated == head_dim:
        assert (type(actual[0].grad_fn).__name__ == "_RotationBackward") == (not interleaved)
    expected = *expected, *torch.autograd.grad(expected, exact, [grad.double() for grad in grads])
    actual = *actual, *torch.autograd.grad(actual, (q, k), grads)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other.to(dtype), **tolerance)
