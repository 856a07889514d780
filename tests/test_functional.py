"""The hand-written gradients equal those of the plain formulas."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

import hf_lm.functional_hf_lm as functional
from hf_lm import HfLmConfig, HfLmForCausalLM
from hf_lm.kernels.gradients import squared_relu
from hf_lm.kernels.loss import linear_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_relu_has_the_librarys_bits(dtype):
    torch.manual_seed(0)
    x, grad = torch.randn(7, 33, dtype=dtype, requires_grad=True), torch.randn(7, 33, dtype=dtype)
    expected = ACT2FN["relu2"](x)
    for training in (True, False):
        actual = squared_relu(x, training)
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


HEAD, LABELS = nn.Linear(16, 30), torch.randint(0, 30, (1, 5), generator=torch.Generator().manual_seed(0))
WEIGHT, ANGLES = torch.linspace(0.5, 1.5, 16), torch.arange(40.0).view(1, 5, 8).repeat(1, 1, 2)
# By hand and by the plain formula: functions of `(heads, 5, 16)`.
FUNCTIONS = {
    "rms_norm": (
        lambda x: functional.rms_norm(x, WEIGHT, 1e-6, training=True),
        lambda x: nn.functional.rms_norm(x, (16,), WEIGHT, 1e-6),
    ),
    "rotation": (
        lambda x: functional.apply_rotary_pos_emb(x[None], x[None], ANGLES.cos(), ANGLES.sin(), training=True)[0],
        lambda x: x * ANGLES.cos() + functional.rotate_half(x) * ANGLES.sin(),
    ),
    "squared_relu": (lambda x: squared_relu(x, training=True), lambda x: x.relu().square()),
    "loss": (
        lambda x: linear_cross_entropy(x[:1], HEAD, LABELS, logit_scale=0.5, softcap=3.0),
        lambda x: nn.functional.cross_entropy(3 * torch.tanh(HEAD(x[0, :-1]) / 6), LABELS[0, 1:]),
    ),
}


def derivative(function, x: torch.Tensor, order: int) -> torch.Tensor:
    """Of a number that depends on every output, along the same direction each time."""
    x = x.clone().requires_grad_()
    value = function(x).sin().sum()
    for _ in range(order):
        (slope,) = torch.autograd.grad(value, x, create_graph=True, allow_unused=True)
        value = slope.cos().sum()
    return slope.detach()


USES = {
    "value": lambda f, x: f(x),
    "gradient": lambda f, x: derivative(f, x, 1),
    "second order": lambda f, x: derivative(f, x, 2),
    "third order": lambda f, x: derivative(f, x, 3),
    "torch.func.grad": lambda f, x: torch.func.grad(lambda x: f(x).sin().sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "forward mode": lambda f, x: forward_mode(f, x),
    "vmap": lambda f, x: torch.vmap(lambda row: f(row[None]))(x.requires_grad_()).detach(),
    "gradient of each sample": lambda f, x: torch.vmap(torch.func.grad(lambda row: f(row[None]).sum()))(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x[:1]),
}


def forward_mode(function, x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.cos())
        return torch.autograd.forward_ad.unpack_dual(function(dual.requires_grad_())).tangent.detach()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gradient_by_hand_is_the_plain_one_in_every_use(name, use):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    actual, expected = (USES[use](function, x.clone()) for function in FUNCTIONS[name])
    torch.testing.assert_close(actual.view_as(expected), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_without_the_package_computes_the_same(monkeypatch):
    """From the Hub the formulas come alone: slower, never different."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = HfLmConfig(**sizes, logit_scale=0.5, final_logit_softcapping=5.0)
    weights, ids = HfLmForCausalLM(config).state_dict(), torch.randint(64, (2, 9))

    def compute() -> list[torch.Tensor]:
        model = HfLmForCausalLM(config).train()
        model.load_state_dict(weights)
        outputs = model(ids, labels=ids, skip_logits=True)
        assert outputs.logits is None
        return [outputs.loss, model(ids).logits, *torch.autograd.grad(outputs.loss, list(model.parameters()))]

    assert set(functional.KERNELS) == {
        "apply_rotary_pos_emb", "cosines_and_sines", "linear_cross_entropy", "relu2", "rms_norm", "uses_varlen",
    }  # fmt: skip
    fast = compute()
    for name in list(functional.KERNELS):
        monkeypatch.delitem(functional.KERNELS, name)
    torch.testing.assert_close(compute(), fast, atol=1e-6, rtol=1e-5)
