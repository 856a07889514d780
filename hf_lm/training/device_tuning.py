"""What the machine is good at, and how to get it."""

import logging
from collections.abc import Callable, Collection
from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from ..anatomy import unread_matmuls
from ..configuration_hf_lm import HfLmConfig
from ..hardware import device_type
from ..kernels.varlen import HAS_VARLEN
from ..modeling_hf_lm import HfLmMLP

# Bytes that a forward keeps for the backward. Of the MLPs: beyond, layers may recompute what is cheap. Of attention's
# probabilities: 17M parameters and 512 tokens stay below (recipes/log/memory.md).
KEPT_BY_MLPS, KEPT_BY_ATTENTION = 1e8, 2.5e8
# What is cheap grows with width times layers, a step with parameters: by their ratio a step takes about 2% longer at 0.9e-4
# (17M parameters, vocabulary 49k), 6% at 1.3e-4 (135M, 49k), 10% at 1.8e-4 (17M, 8k; float32).
CHEAP_PER_PARAMETER = 1.5e-4


def should_save(unread: Collection[tuple[int, int]], _, operator, *arguments, **keywords) -> bool:
    """
    Selective-checkpointing policy: save matmul and attention outputs, recompute everything else. The layer's last matmul
    is not saved where nothing inside the layer reads it.

    Args:
        unread: weight shapes of such matmuls (`unread_matmuls`).
    """
    aten = torch.ops.aten
    if operator not in (aten.mm.default, aten.addmm.default):
        return operator is aten.bmm.default or "attention" in operator.name()  # fused attention of any device
    return tuple(arguments[-1].shape) not in unread


def choose_in_compiled_layer(hidden_size: int, _, operator, *arguments, **keywords) -> CheckpointPolicy:
    """
    Selective-checkpointing policy for compiled layers: recompute the residual stream's pointwise operators (its sums,
    its norms, their copies in 16 bits), which the compiler fuses into kernels that run anyway. The rest is the
    compiler's choice, which by itself saves all of these.
    """
    states = arguments[0] if arguments else None
    is_stream = isinstance(states, torch.Tensor) and states.ndim == 3 and states.shape[-1] == hidden_size
    is_cheap = torch.Tag.pointwise in operator.tags or operator is torch.ops.aten._to_copy.default
    return CheckpointPolicy.MUST_RECOMPUTE if is_stream and is_cheap else CheckpointPolicy.PREFER_SAVE


def _checkpoint_layers(model: PreTrainedModel, policy: Callable) -> None:
    """Let each layer save for the backward what `policy` says, by PyTorch's selective checkpointing."""
    contexts = partial(create_selective_checkpoint_contexts, policy)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False, "context_fn": contexts})


def fit_to_cpu(
    model: PreTrainedModel,
    batch_size: int,
    length: int,
    bfloat16: bool,
    attention: bool = True,
    recompute: bool = True,
) -> None:
    """
    Let a model train on a CPU as fast as it can without keeping much.

    - Short attention in bfloat16 is written out: the backward of PyTorch's fused kernel takes 5.2 ms a layer, this 1.7 ms
      (128 tokens, batch 8, 4 heads of 32, two cores). Not in float32, where it is no faster and takes more memory, nor
      where its probabilities would take more than `KEPT_BY_ATTENTION`.
    - Where the projections of the MLPs take more than `KEPT_BY_MLPS`, and the rest of a layer is not more than
      `CHEAP_PER_PARAMETER` says, layers save for the backward only what `should_save` says and recompute that rest
      (norms, rotations, activations).

    Args:
        batch_size, length: rows of a batch, and their tokens.
        bfloat16: whether matmuls are computed in it.
        attention: choose its implementation; where not, it stays as it is.
        recompute: recompute what is cheap, where it takes much; False: nowhere.
    """
    config, itemsize = model.config.get_text_config(), 2 if bfloat16 else 4
    probabilities = batch_size * length**2 * config.num_attention_heads * config.num_hidden_layers * itemsize
    if attention and bfloat16 and length <= 512 and probabilities <= KEPT_BY_ATTENTION:
        model.set_attn_implementation("eager")
    layers = [module for module in model.modules() if isinstance(module, HfLmMLP)]
    widths = [layer.up_proj.out_features * (1 if layer.gate_proj is None else 2) for layer in layers]
    is_cheap = config.hidden_size * config.num_hidden_layers <= CHEAP_PER_PARAMETER * model.num_parameters()
    if recompute and is_cheap and batch_size * length * sum(widths) * itemsize > KEPT_BY_MLPS:
        _checkpoint_layers(model, partial(should_save, unread_matmuls(model)))


def fit_to_gpu(model: PreTrainedModel, half: bool, attention: bool = True, recompute: bool = False) -> None:
    """
    Let a model train on a GPU as fast as it can without keeping much.

    - In 16 bits on a CUDA device packed documents use varlen attention (cumulative sequence lengths) instead of a mask.
    - Compiled layers save for the backward what `choose_in_compiled_layer` says: 135M parameters, vocabulary 49k, took 0.55
      instead of 0.65 of transformers' memory, as fast (`recipes/benchmarks`).

    Args:
        half: whether matmuls are computed in 16 bits.
        attention: choose its implementation, where it would be SDPA; where not, it stays as it is.
        recompute: the second, for a model that is going to be compiled.
    """
    config = model.config.get_text_config()
    can = HAS_VARLEN and half and device_type() == "cuda" and config.model_type == HfLmConfig.model_type
    if attention and can and config._attn_implementation == "sdpa" and not config.attention_dropout:
        model.set_attn_implementation("varlen")
    if recompute:
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # it warns of what we do not do
        _checkpoint_layers(model, partial(choose_in_compiled_layer, config.hidden_size))
