"""The loss without the logits is the plain one, in value and gradient."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_lm import HfLmForCausalLM
from hf_lm.kernels import loss as chunked
from hf_lm.kernels.loss import linear_cross_entropy
from hf_lm.training.arguments import HfLmTrainingArguments
from hf_lm.training.trainer import HfLmTrainer


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_items_in_batch", [None, 7])
@pytest.mark.parametrize("columns", [50, 16])
def test_loss_without_logits_equals_the_plain_loss(monkeypatch, softcap, scale, bias, num_items_in_batch, columns):
    monkeypatch.setattr(chunked, "slice_shape", lambda *_: (4, columns))  # several slices, the last one short
    torch.manual_seed(0)
    head = nn.Linear(12, 50, bias=bias)
    hidden = torch.randn(3, 9, 12, requires_grad=True)
    labels = torch.randint(0, 50, (3, 9))
    labels[0, :4] = -100
    labels[2] = -100
    logits = head(hidden) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = ForCausalLMLoss(logits, labels, vocab_size=50, num_items_in_batch=num_items_in_batch)
    inputs = [hidden, *head.parameters()]
    expected_gradients = torch.autograd.grad(expected * 3, inputs)
    loss = linear_cross_entropy(
        hidden, head, labels, logit_scale=scale, softcap=softcap, num_items_in_batch=num_items_in_batch
    )
    gradients = torch.autograd.grad(loss * 3, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("softcap", "scale", "bias"), [(None, 1.0, False), (3.0, 0.25, True)])
def test_loss_as_an_accelerator_computes_it_is_the_same(monkeypatch, softcap, scale, bias):
    monkeypatch.setattr(chunked, "slice_shape", lambda *_: (4, 50))  # several slices, the last one short
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(27, 12), torch.randn(50, 12), torch.randint(0, 50, (27,))
    labels[3:9] = -100
    arguments = (hidden, weight, torch.randn(50) if bias else None, labels, scale, softcap, -100, torch.float32)
    expected = chunked._loss_and_gradients(*arguments, True, True, bias)
    with torch.compiler.set_stance("force_eager"):
        actual = chunked._compiled_loss_and_gradients(*arguments, True, True, bias)
    torch.testing.assert_close(actual, expected)


def test_loss_is_the_plain_one_where_the_compiler_does_not_work(monkeypatch, caplog):
    monkeypatch.setattr(chunked, "COMPILED_ON", ("cpu",))
    monkeypatch.setattr(chunked, "_compiler_fails", False)
    torch.compiler.reset()
    torch.manual_seed(0)
    head, hidden, labels = nn.Linear(12, 50), torch.randn(2, 9, 12), torch.randint(0, 50, (2, 9))
    broken = {"cpp.cxx": (None, "/nowhere/c++"), "fx_graph_cache": False}
    with torch._inductor.config.patch(broken):
        losses = [chunked.linear_cross_entropy(hidden, head, labels) for _ in range(2)]
    expected = nn.functional.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(losses, [expected, expected])
    said = [record.message for record in caplog.records if "cannot be compiled" in record.message]
    assert len(said) == 1
    assert "/nowhere/c++" in said[0]
    assert "\n" not in said[0]


def test_slices_are_of_whole_tiles():
    for device, vocabulary, dtype in [("cuda", 50304, torch.bfloat16), ("cpu", 3000, torch.float32)]:
        rows, _ = chunked.slice_shape(device, vocabulary, dtype)
        assert rows % chunked.SLICE_ROWS == 0 and rows > chunked.SLICE_ROWS


def test_only_fast_products_are_worth_computing_logits_twice():
    shape, wide, narrow = chunked.slice_shape, chunked.WIDE_VOCABULARY + 1, chunked.WIDE_VOCABULARY
    assert shape("cpu", wide, torch.bfloat16) == (chunked.SLICE_ROWS, chunked.SLICE_COLUMNS)
    whole = [("cpu", narrow, torch.bfloat16), ("cpu", wide, torch.float32), ("cuda", wide, torch.bfloat16)]
    assert all(shape(*case)[1] == case[1] and shape(*case)[0] >= chunked.SLICE_ROWS for case in whole)


def test_loss_without_logits_takes_shifted_labels_and_frozen_heads():
    torch.manual_seed(0)
    head = nn.Linear(12, 50).requires_grad_(False)
    hidden = torch.randn(2, 5, 12, requires_grad=True)
    labels = torch.randint(0, 50, (2, 5))
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    one = linear_cross_entropy(hidden, head, labels)
    other = linear_cross_entropy(hidden, head, None, shift_labels=shifted)
    assert torch.equal(one, other)
    one.backward()
    assert head.weight.grad is None and hidden.grad.abs().sum() > 0


def test_loss_without_logits_can_be_differentiated_again():
    torch.manual_seed(0)
    head, hidden = nn.Linear(12, 50), torch.randn(2, 5, 12, requires_grad=True)
    loss = linear_cross_entropy(hidden, head, torch.randint(0, 50, (2, 5)))
    loss.backward(retain_graph=True)
    once = head.weight.grad.clone()
    head.weight.grad.zero_()
    for times in (1, 2, 3):
        (2 * loss).backward(retain_graph=times < 3)
        torch.testing.assert_close(head.weight.grad, 2 * times * once)


def test_loss_without_logits_under_autocast_is_near_the_plain_one():
    torch.manual_seed(0)
    head = nn.Linear(64, 300, bias=False)
    hidden = torch.randn(2, 40, 64, requires_grad=True)
    labels = torch.randint(0, 300, (2, 40))
    expected = ForCausalLMLoss(head(hidden), labels, vocab_size=300)
    expected_gradient = torch.autograd.grad(expected, head.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, head, labels)
    gradient = torch.autograd.grad(loss, head.weight)[0]
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0.05, atol=float(expected_gradient.abs().max()) / 50)


def test_model_without_logits_equals_model_with_them(tiny_model):
    tiny_model.train()
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for skip_logits in (True, False):
        tiny_model.zero_grad()
        outputs = tiny_model(ids, labels=ids, skip_logits=skip_logits)
        assert (outputs.logits is None) == skip_logits
        outputs.loss.backward()
        losses.append(outputs.loss)
        gradients.append([parameter.grad.clone() for parameter in tiny_model.parameters()])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", pytest.param("lora", marks=pytest.mark.slow), "another family"])
def test_our_trainer_skips_the_logits_where_the_model_can(tiny_model, tmp_path, kind):
    model = tiny_model
    if kind == "lora":
        from peft import LoraConfig, get_peft_model  # the long tests install it

        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    elif kind == "another family":
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
    logits, ids = [], torch.randint(3, 97, (2, 8))
    model.register_forward_hook(lambda module, arguments, outputs: logits.append(outputs.logits))
    trainer = HfLmTrainer(model, HfLmTrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    for is_asked in (False, True):
        trainer.compute_loss(model.train(), {"input_ids": ids, "labels": ids}, return_outputs=is_asked)
    trainer.compute_loss(model.eval(), {"input_ids": ids, "labels": ids})
    assert [found is None for found in logits] == [kind != "another family", False, False]


def test_logits_are_there_unless_skipped_and_for_a_loss_of_ones_own(tiny_model):
    ids = torch.randint(3, 97, (1, 8))
    for training in (False, True):
        outputs = tiny_model.train(training)(ids, labels=ids)
        loss, logits = tiny_model(ids, labels=ids, return_dict=False)[:2]
        assert loss == outputs.loss and torch.equal(logits, outputs.logits) and logits.shape == (1, 8, 97)
    tiny_model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    outputs = tiny_model(ids, labels=ids, skip_logits=True)
    assert outputs.loss == outputs.logits.sum()


@pytest.mark.parametrize("skip_logits", [True, False])
@pytest.mark.parametrize("number", [None, 0, torch.tensor(0)], ids=str)
@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_without_labels_loss_and_gradients_are_zero(tiny_model, skip_logits, number, length, compiled):
    ids = torch.randint(3, 97, (2, length))
    mask = torch.zeros_like(ids) if length == 8 else None  # padding only
    labels = torch.full_like(ids, -100) if length == 8 else ids  # the only label of a row has nothing before it
    model = torch.compile(tiny_model.train(), backend="aot_eager", disable=not compiled)
    outputs = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=number, skip_logits=skip_logits)
    outputs.loss.backward()
    assert outputs.loss == 0 and (outputs.logits is None) == skip_logits
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in tiny_model.parameters())


@pytest.mark.parametrize("skip_logits", [True, False])
def test_one_row_with_labels_is_learned_as_if_alone(tiny_model, skip_logits):
    ids = torch.randint(3, 97, (3, 8))
    labels = ids.clone()
    labels[1:] = -100
    losses = [
        tiny_model.train()(rows, labels=some, skip_logits=skip_logits).loss
        for rows, some in ((ids, labels), (ids[:1], ids[:1]))
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("skip_logits", [True, False])
def test_the_model_has_second_derivatives_and_gradients_of_each_sample(tiny_config, skip_logits):
    """In training, where gradients are written by hand, as in evaluation, where they are not."""
    torch.manual_seed(0)
    tiny_config._attn_implementation = "eager"  # the fused kernel has no second derivative
    model, ids = HfLmForCausalLM(tiny_config), torch.randint(3, 97, (3, 8))
    parameters, outcomes = dict(model.named_parameters()), []

    def loss_of(values: dict, row: torch.Tensor) -> torch.Tensor:
        keys = {"input_ids": row[None], "labels": row[None], "use_cache": False, "skip_logits": skip_logits}
        return torch.func.functional_call(model, values, kwargs=keys).loss

    for training in (True, False):
        model.train(training)
        weights = list(parameters.values())
        loss = model(ids, labels=ids, skip_logits=skip_logits and training).loss
        slopes = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        steepness = sum((slope**2).sum() for slope in slopes)
        of_each = torch.vmap(torch.func.grad(loss_of), in_dims=(None, 0))(parameters, ids)
        outcomes.append([*torch.autograd.grad(steepness, weights), *of_each.values()])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.detach().abs().max()))
    alone = torch.func.grad(loss_of)(parameters, ids[1])
    for name, value in alone.items():
        torch.testing.assert_close(of_each[name][1], value, rtol=1e-4, atol=1e-5)
