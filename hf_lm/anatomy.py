"""What a model of any family is made of: its layers, its parameters by part, its operations per token."""

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .errors import InputError
from .hardware import DEVICES, describe_hardware


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """
    The list of decoder layers of any model of transformers.

    Raises:
        InputError: there is none.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(model).__name__} has no list of {count} decoder layers to look into.")


PARTS = {  # of parameters: the first whose pattern is in the name
    "norms": r"norm|(^|\.)ln_",
    "head": r"(^|\.)(lm_head|score|embed_out)\.",
    "embedding": r"embed|\.wte\.|\.wpe\.",
    "attention": r"\.(self_)?att(n|ention)\.",
    "mlp": r"\.(mlp|feed_forward)\.",
    "other": "",
}


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """The number of parameters of each kind; of tied ones only one is counted."""
    parts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        parts[next(part for part, pattern in PARTS.items() if re.search(pattern, name))] += parameter.numel()
    return {part: count for part, count in parts.items() if count}


def matrix_parameters(model: nn.Module) -> list[nn.Parameter]:
    """
    The matrices that an optimizer of whole matrices, such as Muon, trains: what the model's own `matrix_parameters` says, or
    all two-dimensional parameters of the decoder layers. An adapter's matrices in these layers are among them.
    """
    base = getattr(model, "get_base_model", lambda: model)()  # of a model wrapped by PEFT
    if hasattr(base, "matrix_parameters"):
        return base.matrix_parameters()
    return [parameter for parameter in decoder_layers(base).parameters() if parameter.ndim == 2]


def unread_matmuls(model: nn.Module) -> frozenset[tuple[int, int]]:
    """
    Return the weight shapes `(inputs, outputs)` of the matmuls that a recomputed layer can leave out, as the layers'
    own `unread_linear` says, unless another linear map of a layer has the same shape.
    """
    unread, others = set(), set()
    for layer in model.modules():
        if hasattr(layer, "unread_linear"):
            last = layer.unread_linear()
            inside = set() if last is None else set(last.modules())  # an adapter's matrices too
            linear = [module for module in layer.modules() if isinstance(module, nn.Linear) and module not in inside]
            others.update((module.in_features, module.out_features) for module in linear)
            if last is not None:
                unread.add((last.in_features, last.out_features))
    return frozenset(unread - others)


def flops_per_token(model: nn.Module, context: int) -> dict[str, float]:
    """
    Floating-point operations of forward and backward for each token, as `torch.utils.flop_counter` counts them on
    tensors without values: those of weights (`"matrices"`), of attention scores and values (in full, as if attention
    were not causal), and of the head. Frozen weights have no gradient to compute; recomputation does not count.

    Args:
        context: tokens of a sequence.
    """
    attention, training = model.config.get_text_config()._attn_implementation, model.training
    model.set_attn_implementation("eager")  # fused kernels of a CPU are not counted
    model.eval()  # dropout and recomputation do not count
    try:
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            tensors = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)
                for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            }
            ids = torch.zeros(1, context, dtype=torch.long)
            inputs = {"input_ids": ids, "use_cache": False}
            logits = torch.func.functional_call(model, tensors, kwargs=inputs).logits
            logits.sum().backward()
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
    counts = counter.get_flop_counts()
    head = {id(model.get_output_embeddings())} if model.can_generate() else {id(getattr(model, "score", None))}
    names = [name for name, module in model.named_modules() if id(module) in head]
    of_head = sum(sum(counts.get(f"{type(model).__name__}.{name}", {}).values()) for name in names)
    of_attention = counts["Global"].get(torch.ops.aten.bmm, 0)
    of_matrices = counter.get_total_flops() - of_head - of_attention
    per_text = {"head": of_head if model.can_generate() else 0}  # of a classifier: one token of a text
    parts = {"matrices": of_matrices, "attention": of_attention} | per_text
    return {name: count / context for name, count in parts.items()}


def peak_of(device: torch.device) -> float | None:
    """Peak of dense bfloat16 matmuls of a device (1/s); None where `DEVICES` has none."""
    name = describe_hardware(device) if device.type == "cuda" else ""
    return next((known.peak_flops for kind, known in DEVICES.items() if kind in name), None)


@dataclass(frozen=True)
class OperationCount:
    """`flops_per_token` of a short sequence of `context` tokens: those of attention grow with the length."""

    flops: dict[str, float]
    context: int
    peak: float

    @classmethod
    def of(cls, model: nn.Module, device: torch.device, context: int = 8) -> "OperationCount | None":
        """Count before the model is wrapped, sharded or compiled; None where the peak of the device is not known."""
        peak = peak_of(device)
        return cls(flops_per_token(model, context), context, peak) if peak else None

    def at(self, context: int) -> float:
        """All operations of a token in a sequence of another length."""
        return sum(self.flops.values()) + self.flops["attention"] * (context / self.context - 1)

    def utilization(self, context: int, tokens_per_second: float, devices: int) -> float:
        """See `model_flops_utilization`."""
        return tokens_per_second * self.at(context) / (self.peak * devices)


def model_flops_utilization(
    model: nn.Module, context: int, tokens_per_second: float, device: torch.device, devices: int = 1
) -> float | None:
    """
    The share of the peak of all devices that the model's own operations take (`flops_per_token`; MFU, arXiv:2204.02311,
    appendix B): recomputation does not count. None where the peak is not known (`DEVICES`).
    """
    count = OperationCount.of(model, device, context)
    return count and count.utilization(context, tokens_per_second, devices)
