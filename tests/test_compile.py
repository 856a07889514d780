"""`torch.compile`: one graph, the same numbers, and nothing in it that the model does not need."""

import pytest
import torch
from helpers.models import EXACT, build, draw_ids
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

pytestmark = pytest.mark.filterwarnings("ignore:.*_compile flag:DeprecationWarning", "ignore:flex_attention called")


@pytest.fixture
def fresh_compiler():
    """The code of one model is that of all, and the compiler gives up after eight versions of it."""
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param("default", marks=pytest.mark.slow), "everything"])
def test_compiles_to_one_graph(name, backend):
    model = build(name, "sdpa")
    ids = draw_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for arguments in ({}, {"attention_mask": mask}, {"labels": ids, "use_cache": False}):
        expected, actual = model(ids, **arguments), compiled(ids, **arguments)
        torch.testing.assert_close(actual.logits[mask.bool()], expected.logits[mask.bool()], **EXACT)
        if "labels" in arguments:
            torch.testing.assert_close(actual.loss, expected.loss)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param("default", "aot_eager", marks=pytest.mark.slow),
        pytest.param("everything", "aot_eager", marks=pytest.mark.slow),
        pytest.param("everything", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_training_gives_the_loss_and_the_gradients_without_the_logits(name, backend):
    model = build(name, "sdpa").train()
    ids = draw_ids(2, 9)
    labels = ids.clone()
    labels[0, :3] = -100
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        outputs = forward(ids, labels=labels, use_cache=False, skip_logits=True)
        assert outputs.logits is None
        outputs.loss.backward()
        results.append([outputs.loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_training_holds_no_logits_and_no_mask_and_finds_the_cosines_once():
    model, ids, shapes, operators = build("default", "sdpa", vocab_size=999).train(), draw_ids(4, 37), [], []

    def look(graph, inputs):
        values = [node.meta.get("val") for node in graph.graph.nodes]
        shapes.extend(value.shape for value in values if isinstance(value, torch.Tensor))
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    forward = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    forward(ids, labels=ids, use_cache=False, skip_logits=True).loss.backward()
    assert 0 < max(shape.numel() for shape in shapes) < ids.numel() * 999
    assert not any(shape[-2:] == (37, 37) for shape in shapes)
    assert sum("cosines_and_sines" in operator for operator in operators) == 1
