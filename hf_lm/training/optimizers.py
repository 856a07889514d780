"""Muon for the matrices of the decoder layers, AdamW for everything else, as one optimizer that checkpoints as one."""

import copy
import importlib
import os
from collections import defaultdict

import torch
from accelerate.utils import str_to_bool
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import Trainer, TrainingArguments

from ..anatomy import matrix_parameters
from ..errors import InputError, explained
from ..hardware import has_fast_bfloat16
from .recipe_file import read_mapping

# Optimizers beside those of transformers, by the name that `optim` takes: module and class. The class gets parameter groups,
# `lr` and the entries of `optim_args`.
OPTIMIZERS = {
    "nadam": ("torch.optim", "NAdam"),
}
# Coefficients of the quintic Newton-Schulz iteration, https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
GRAM_FROM = 2  # columns for each row, from which on its steps cost less by way of the Gram matrix


# What each keeps of a parameter beside the number of steps, which AdamW expects in every state that it loads.
MUON_STATE, ADAMW_STATE = ("momentum_buffer",), ("exp_avg", "exp_avg_sq")


def first_state(parameter: torch.Tensor, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The state of a parameter before the first step: zeros."""
    return {"step": torch.tensor(0.0)} | {name: torch.zeros_like(parameter) for name in names}


def lay_out_states(optimizer: torch.optim.Optimizer) -> None:
    """
    Take the memory of all states of AdamW before the first step does, on a CPU. There they would come to lie between the first
    gradients, which freed would leave holes too small for activations: 240 of 4,300 MB (135M parameters, float32).
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.AdamW) else ():
        if group["amsgrad"]:  # has a third number
            continue
        names = MUON_STATE if group.get("muon") else ADAMW_STATE
        for parameter in group["params"]:
            optimizer.state[parameter] |= first_state(parameter, names)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """
    The nearest (semi-)orthogonal matrices, roughly: all singular values are brought near 1 by Newton-Schulz steps.

    Args:
        matrices: `(count, rows, columns)`; computed in bfloat16 where the device is fast at it, which suffices.

    Returns:
        The same shape and dtype.
    """
    a, b, c = NEWTON_SCHULZ
    fast = has_fast_bfloat16(matrices.device.type)
    x = matrices.to(torch.bfloat16) if fast else matrices
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    if x.dtype == torch.float32 and x.shape[-1] >= GRAM_FROM * x.shape[-2]:
        x = newton_schulz_factor(x @ x.mT, steps) @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


def newton_schulz_factor(gram: torch.Tensor, steps: int) -> torch.Tensor:
    """
    What Newton-Schulz steps come to as a factor of `X`, from `G = X X^T` alone: the product of `P = a + b G + c G ** 2` of
    each step, which leaves `P G P`. For a wide `X` that is half the work (512 x 128: 2.1 instead of 5.5 ms for six). `G`
    loses what is small in `X`, so not in 16 bits.
    """
    a, b, c = NEWTON_SCHULZ
    factor = None
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = polynomial if factor is None else polynomial @ factor
        if step + 1 < steps:
            gram = polynomial @ gram @ polynomial
    return factor


def newton_schulz_flops(low: int, high: int, half: bool, steps: int = 5) -> float:
    """Operations of `orthogonalize` for a matrix of `low` x `high`, the lesser first; `half`: in 16 bits."""
    if half or high < GRAM_FROM * low:
        return steps * (4 * low**2 * high + 2 * low**3)
    return 4 * low**2 * high + (8 * steps - 6) * low**3


class BesideMuon:
    """
    What makes an optimizer train by Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) the parameter
    groups that carry `"muon": True`; a base class in front of that of the optimizer. Those groups hold two-dimensional
    parameters only; they use `lr`, `momentum` (default 0.95, Nesterov) and `weight_decay` of their group, and the update
    is scaled by `sqrt(max(1, rows / columns))`.

    Matrices of the same shape are orthogonalised together. `torch.optim.Muon` gives the same update (see the tests),
    but treats one matrix at a time and needs a second optimizer beside it, which `Trainer` cannot checkpoint.

    Raises:
        ValueError: a Muon group holds a parameter that is not a matrix.
    """

    def __init__(self, params, lr: float = 1e-3, **kwargs):
        groups = [{"muon": False, **(group if isinstance(group, dict) else {"params": [group]})} for group in params]
        super().__init__(
            [{"momentum": 0.95, **group} if group["muon"] else group for group in groups], lr=lr, **kwargs
        )
        for group in self.param_groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.ndim != 2:
                        raise ValueError(f"Muon trains matrices, got a parameter of shape {tuple(parameter.shape)}.")

    @torch.no_grad()
    def step(self, closure=None):
        every_group = self.param_groups
        self.param_groups = [group for group in every_group if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every_group
        for group in every_group:
            if group["muon"]:
                self._muon_step(group)
        return loss

    @staticmethod
    def _orthogonal(updates: torch.Tensor) -> torch.Tensor:
        """`orthogonalize`, also of matrices that FSDP2 shards: gathered once, each process keeps its part."""
        if not isinstance(updates, DTensor):
            return orthogonalize(updates)
        mesh, placements = updates.device_mesh, updates.placements
        whole = orthogonalize(updates.full_tensor())
        return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim).redistribute(mesh, placements)

    def _muon_step(self, group: dict) -> None:
        by_shape = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for (rows, columns), parameters in by_shape.items():
            gradients = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                state = self.state[parameter]
                if MUON_STATE[0] not in state:  # Adagrad has already made its own
                    state = self.state[parameter] = first_state(parameter, MUON_STATE)
                state["step"] += 1
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            for buffer, gradient in zip(buffers, gradients, strict=True):
                buffer.lerp_(gradient, 1 - group["momentum"])
            pairs = zip(gradients, buffers, strict=True)
            updates = [gradient.lerp(buffer, group["momentum"]) for gradient, buffer in pairs]
            updates = self._orthogonal(torch.stack(updates)).unbind()
            if group["weight_decay"]:
                for parameter in parameters:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


class MuonAdamW(BesideMuon, torch.optim.AdamW):
    """AdamW, with Muon for the parameter groups that carry `"muon": True` (see `BesideMuon`)."""


def with_muon(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """
    `MuonAdamW` for AdamW, and the like for torch's other optimizers and for Adafactor.

    Raises:
        InputError: it is none of those, so that what it does with parameter groups is not known.
    """
    if optimizer is torch.optim.AdamW:
        return MuonAdamW
    if not isinstance(optimizer, type) or not optimizer.__module__.startswith(
        ("torch.optim.", "transformers.", "hf_lm.")
    ):
        raise InputError(
            f"muon_learning_rate: {getattr(optimizer, '__name__', optimizer)} cannot train the rest; choose as optim "
            "adamw_torch, adafactor, sgd, adagrad or rmsprop, or leave muon_learning_rate out."
        )
    return type(f"Muon{optimizer.__name__}", (BesideMuon, optimizer), {})


def optimizer_class(arguments: TrainingArguments, model=None) -> tuple[type[torch.optim.Optimizer], dict]:
    """
    The class and the options that `optim` and `optim_args` ask for.

    Raises:
        InputError: a package is missing, or the optimizer does not read an entry of `optim_args`.
    """
    name = arguments.optim
    if name in OPTIMIZERS:
        module, class_name = OPTIMIZERS[name]
        with explained(f"optim: {name}"):
            kind = getattr(importlib.import_module(module), class_name)
        return kind, {"lr": arguments.learning_rate} | read_mapping("optim_args", arguments.optim_args or "")

    def build(optim_args: str | None):
        changed = copy.copy(arguments)
        changed.optim_args = optim_args
        return Trainer.get_optimizer_cls_and_kwargs(changed, model)

    with explained(f"optim: {getattr(name, 'value', name)}"):
        found = build(arguments.optim_args)
        entries = (arguments.optim_args or "").replace(" ", "").split(",")
        for entry in filter(None, entries):
            others = build(",".join(other for other in entries if other != entry))
            if entry.startswith("weight_decay=") or others[1] == found[1]:
                key = entry.partition("=")[0]
                raise InputError(
                    f"optim_args: {key} is not read; it is {getattr(name, 'value', name)} that is trained with."
                )
    return found


def choose_optimizer(
    arguments: TrainingArguments, model: nn.Module, decayed: list[str], given: tuple[type, dict] | None = None
) -> tuple[type[torch.optim.Optimizer], dict]:
    """
    The `optimizer_cls_and_kwargs` of a trainer: what `optim` asks for, and with `muon_learning_rate` Muon beside it for the
    model's `matrix_parameters`.

    Args:
        decayed: names of the parameters that `weight_decay` is for.
        given: a class and options instead of what `optim` says.

    Raises:
        InputError: see `optimizer_class` and `with_muon`.
    """
    trains_matrices = arguments.muon_learning_rate is not None
    if trains_matrices and (arguments.deepspeed or str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false"))):
        raise InputError("muon_learning_rate: needs whole matrices, which DeepSpeed flattens; FSDP keeps them.")
    kind, options = given or optimizer_class(arguments, model)
    if not trains_matrices:
        return kind, options
    if arguments.fp16 and "fused" in options:  # a fused optimizer skips infinite gradients itself; Muon would not
        options = {**options, "fused": False}
    matrices = {id(parameter) for parameter in matrix_parameters(model)}
    groups: dict[str, list] = {"muon": [], "decayed": [], "plain": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind_of_group = "muon" if id(parameter) in matrices else "decayed" if name in decayed else "plain"
            groups[kind_of_group].append(parameter)
    muon = {"muon": True, "lr": arguments.muon_learning_rate, "momentum": arguments.muon_momentum}
    parameters = [
        {"params": groups["muon"], **muon, "weight_decay": arguments.weight_decay},
        {"params": groups["decayed"], "weight_decay": arguments.weight_decay},
        {"params": groups["plain"], "weight_decay": 0.0},
    ]
    return with_muon(kind), {**options, "params": parameters}


def schedule_options(arguments: TrainingArguments, steps: int) -> dict | None:
    """The `lr_scheduler_kwargs` of a run of that many steps: those given, or the decay that `lr_decay_ratio` says."""
    if arguments.lr_scheduler_type != "warmup_stable_decay" or arguments.lr_scheduler_kwargs:
        return arguments.lr_scheduler_kwargs
    decay = min(round(steps * arguments.lr_decay_ratio), steps - arguments.get_warmup_steps(steps))
    return {"num_decay_steps": decay, "decay_type": "linear"}


def check_rates(scheduler, steps: int, options: dict | None) -> None:
    """
    Raises:
        InputError: `lr_scheduler_kwargs` make a learning rate below 0 or above its peak, or a decay longer than the run.
    """
    decay = (options or {}).get("num_decay_steps", 0)
    if not 0 <= decay <= steps:
        raise InputError(f"lr_scheduler_kwargs: num_decay_steps must be 0 to {steps} (the run's steps), got {decay}.")
    for rate_at in getattr(scheduler, "lr_lambdas", ()):
        for step in range(0, steps, max(1, steps // 100)):
            rate = rate_at(step)
            if isinstance(rate, complex) or not 0 <= rate < 1 + 1e-6:
                raise InputError(
                    f"lr_scheduler_kwargs: {options} makes the learning rate {rate} times its value at step {step}."
                )
