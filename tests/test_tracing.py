"""What tools that read or trace the model find: its source, symbols, and tensors without values."""

import ast
import contextlib
import inspect
import textwrap

import pytest
import torch
from helpers.models import build
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hf_lm import HfLmForCausalLM
from hf_lm.modeling_hf_lm import HfLmAttention, HfLmOffsetRMSNorm, HfLmRMSNorm


def test_the_source_of_attention_says_what_vllm_reads_there():
    """Its Transformers backend takes the scale from the one call of the interface, and fuses q, k and v in `forward`."""
    calls = {}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(HfLmAttention.forward)))):
        if isinstance(node, ast.Call):
            calls.setdefault(ast.unparse(node.func), []).append(node)
    (call,) = calls["attention"]
    assert {"scaling": "self.scaling", "sliding_window": "self.sliding_window"}.items() <= {
        keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords
    }.items()
    for name in "qkv":
        (projection,) = calls[f"self.{name}_proj"]
        assert [ast.unparse(argument) for argument in projection.args] == ["hidden_states"]


class OneLevelTracer(torch.fx.Tracer):
    def is_leaf_module(self, module, name) -> bool:
        return True


@pytest.mark.parametrize("offset", [False, True])
def test_a_symbolic_trace_of_the_norm_is_the_plain_formula(offset):
    """vLLM finds the norm, and whether 1 is added to its weight, by these operations; else it could not shard it."""
    norm = (HfLmOffsetRMSNorm if offset else HfLmRMSNorm)(8, 1e-3)
    torch.nn.init.normal_(norm.weight)
    graph = OneLevelTracer().trace(norm)
    names = [getattr(node.target, "__name__", str(node.target)) for node in graph.nodes]
    arithmetic = [name for name in names if name in ("pow", "mean", "add", "rsqrt", "mul")]
    assert arithmetic == ["add"] * offset + ["pow", "mean", "add", "rsqrt", "mul", "mul"]
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(torch.fx.GraphModule(norm, graph)(x), norm(x))


@pytest.mark.parametrize("offset", [False, True])
def test_a_norm_built_by_its_size_alone_tells_where_its_weight_is_centred(offset):
    """How older vLLM tells Gemma's norm from Llama's: `type(norm)(1)`."""
    for norm in build("default", norm_offset=offset).modules():
        if "Norm" in type(norm).__name__:
            assert type(norm)(1).weight.item() == (0.0 if offset else 1.0)


class Attention(torch.nn.Module):
    """One layer's attention, without a mask."""

    def __init__(self, config):
        super().__init__()
        self.attention = HfLmAttention(config, 0)

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self.attention(hidden_states, (cos, sin))[0]


class Pair(torch.fx.Proxy):
    """Of all that is unknown only the leading shape is taken apart: batch and sequence."""

    def __len__(self) -> int:
        return 2


class AttentionTracer(torch.fx.Tracer):
    def is_leaf_module(self, module, name) -> bool:
        return not isinstance(module, HfLmAttention)

    def proxy(self, node):
        return Pair(node, self)

    def iter(self, pair):
        return iter([pair[0], pair[1]])


@pytest.mark.parametrize("changes", [{}, {"qk_norm": "full"}], ids=str)
def test_a_symbolic_trace_of_attention_goes_from_three_projections_to_the_fourth(tiny_config, changes):
    """vLLM shards the output projection with the others only where it finds it at the end of the trace."""
    tiny_config.__dict__.update(changes, _attn_implementation="eager")
    attention = Attention(tiny_config)
    graph = AttentionTracer().trace(attention)
    nodes = {str(node.target): node for node in graph.nodes}
    assert all(nodes[f"attention.{name}_proj"].args == (nodes["hidden_states"],) for name in "qkv")
    assert nodes["output"].args == (nodes["attention.o_proj"],)
    angles = torch.rand(2, 5, 4).repeat(1, 1, 2)
    inputs = torch.randn(2, 5, 32), angles.cos(), angles.sin()
    torch.testing.assert_close(torch.fx.GraphModule(attention, graph)(*inputs), attention(*inputs))


def count_operations(model: HfLmForCausalLM, skip_logits: bool) -> int:
    """Floating-point operations of one forward and backward on zeros."""
    ids = torch.zeros(2, 12, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    inputs["position_ids"] = torch.arange(12).expand(2, -1)
    with FlopCounterMode(display=False) as counter:
        outputs = model(**inputs, use_cache=False, skip_logits=skip_logits)
        outputs.loss.backward()
    assert outputs.loss.shape == () and (outputs.logits is None) == skip_logits
    return counter.get_total_flops()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("without_values", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_the_model_runs_without_values_and_its_operations_are_counted(tiny_config, without_values, training):
    counts, tiny_config._attn_implementation = [], "eager"  # fused kernels differ between devices
    for context in (contextlib.nullcontext(), without_values()):
        with context:
            model = HfLmForCausalLM(tiny_config).train(training)
            counts.append([count_operations(model, skip_logits) for skip_logits in (False, True)])
            model(torch.zeros(1, 4, dtype=torch.long), use_cache=True)
    assert counts[0] == counts[1] and min(counts[0]) > 0


def test_autocast_is_left_alone_where_there_is_none(tiny_config):
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        model = HfLmForCausalLM(tiny_config)
        assert model(torch.zeros(1, 4, dtype=torch.long)).logits.dtype == torch.float32
