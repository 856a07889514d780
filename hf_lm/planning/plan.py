"""
What a recipe will cost before it is run: parameters, operations, memory of each device, time, energy, money.

For other machines nothing is allocated: the model is built of fake tensors, which have shapes but no values.
"""

import logging
import math
import tempfile
import time
from collections.abc import Callable, Collection

import torch
from datasets import IterableDataset
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from ..anatomy import decoder_layers, flops_per_token, matrix_parameters, parameters_by_part, unread_matmuls
from ..errors import InputError, one_line
from ..hardware import DEVICES, assumed_watts, describe_hardware, has_fast_bfloat16, memory_of
from ..interop.adapters import add_adapter
from ..kernels.loss import slice_shape
from ..tasks import task_class
from ..tasks.base import PreparedData, Task
from ..training.device_tuning import should_save
from ..training.optimizers import newton_schulz_flops
from .forecast import forecast

UTILIZATION = 0.35  # of the peak, where nothing was measured (PaLM 540B reached 0.46, arXiv:2204.02311)
TOKENS_PER_PARAMETER = 20  # compute-optimal (Chinchilla, arXiv:2203.15556)
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # its traceback: what fails is said
# Whether weights, gradients and optimizer state are divided among the devices.
STRATEGIES = {"DDP": (0, 0, 0), "ZeRO-1": (0, 0, 1), "ZeRO-2": (0, 1, 1), "FSDP2, ZeRO-3": (1, 1, 1)}


def flops_by_part(
    model: nn.Module, context: int, muon_batch: int | None = None, muon_half: bool = True
) -> dict[str, float]:
    """
    `flops_per_token`, and the operations of the optimizer.

    Args:
        context: tokens of a sequence.
        muon_batch: with Muon, tokens of a step, over which its Newton-Schulz iterations are spread.
        muon_half: these are in 16 bits.
    """
    sizes = [sorted(parameter.shape) for parameter in matrix_parameters(model)] if muon_batch else []
    of_optimizer = sum(newton_schulz_flops(*size, muon_half) for size in sizes) / (muon_batch or 1)
    return flops_per_token(model, context) | {"optimizer": of_optimizer}


class _KeptOutputs(TorchDispatchMode):
    """Hands `keep` what recomputed layers save (`should_save`), and autocast's copies of parameters."""

    def __init__(self, unread: Collection[tuple[int, int]], keep: Callable, is_parameter: Callable):
        super().__init__()
        self.unread, self.keep, self.is_parameter, self.enabled = unread, keep, is_parameter, False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        outputs = [one for one in (output if isinstance(output, tuple | list) else [output]) if torch.is_tensor(one)]
        source = args[0] if args and isinstance(args[0], torch.Tensor) else None
        is_cast = source is not None and outputs and outputs[0].dtype != source.dtype and source.is_floating_point()
        is_copy = is_cast and self.is_parameter(source)
        if self.enabled and (is_copy or should_save(self.unread, None, operator, *args)):
            for one in outputs:
                self.keep(one)
        return output


def activation_bytes(model: nn.Module, batch_size: int, length: int, bf16: bool, checkpointing: bool = False) -> float:
    """
    What a forward keeps for the backward, measured on a model of fake tensors: each saved storage once, without the
    parameters, but with the copies that autocast makes of them.

    With checkpointing it is each layer's input, and all of one layer while that is recomputed; of layers that
    `fit_to_cpu` made recompute what is cheap, their inputs and what `should_save` says.
    """
    layers = decoder_layers(model)
    parameters = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
    selective = [layer for layer in layers if getattr(layer, "gradient_checkpointing", False)]
    for layer in selective:  # all of a layer is looked at where it is to be computed again
        layer.gradient_checkpointing = not checkpointing
    is_selective = bool(selective) and not checkpointing
    options = {"skip_logits": True} if model.config.model_type == "hf_lm" and model.can_generate() else {}

    def measure(rows: int) -> tuple[int, int, int]:
        kept, inputs, inside = {}, [], []

        def is_parameter(tensor: torch.Tensor) -> bool:
            return StorageWeakRef(tensor.untyped_storage()) in parameters

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not is_parameter(tensor):
                kept[StorageWeakRef(tensor.untyped_storage())] = tensor  # held: no other takes its place
            return tensor

        def total() -> int:
            return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

        def enter(module: nn.Module, arguments: tuple, keywords: dict) -> None:
            states = arguments[0] if arguments else keywords["hidden_states"]
            inputs.append(states.nbytes)
            inside.append(-total())
            outputs.enabled = is_selective
            if is_selective:
                keep(states)

        def leave(*_) -> None:
            outputs.enabled = False
            inside.append(total())

        outputs = _KeptOutputs(unread_matmuls(model), keep, is_parameter)
        hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
        hooks += [layer.register_forward_hook(leave) for layer in layers]
        with outputs, next(model.parameters()).fake_mode, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            ids = torch.zeros(rows, length, dtype=torch.long)
            labels = ids if model.can_generate() else ids[:, 0]
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
                try:
                    model.train()(input_ids=ids, labels=labels, use_cache=False, **options)
                except RuntimeError as error:
                    raise InputError(
                        f"model_name_or_path: the memory of {type(model).__name__} cannot be planned, its forward needs "
                        f"more than shapes: {one_line(error)}; hf-lm train with --max_steps 10 measures it."
                    ) from error
        for hook in hooks:
            hook.remove()
        return sum(inside), sum(inputs), total()

    # From two and three rows: of one row alone, some views need no copy.
    two, three = measure(2), measure(3)
    for layer in selective:
        layer.gradient_checkpointing = True
    inside, inputs, every = (few + (batch_size - 2) * (more - few) for few, more in zip(two, three, strict=True))
    if not checkpointing:
        return float(every)
    copies = 3 * two[0] - 2 * three[0]  # what does not grow with the batch
    return every - inside + copies + inputs + (inside - copies) / len(layers)


def memory_by_part(model: nn.Module, arguments, length: int, device: str, checkpointing: bool) -> dict[str, float]:
    """Bytes that training takes on one device: weights and gradients in float32, and what `arguments` ask for."""
    weights = 4.0 * sum(parameter.numel() for parameter in model.parameters())
    learned = 4.0 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    batch_size, muon = arguments.per_device_train_batch_size, arguments.muon_learning_rate is not None
    rows, width = batch_size * length, model.config.get_text_config().vocab_size if model.can_generate() else 1
    if model.config.model_type == "hf_lm":
        height, width = slice_shape(device, width, torch.bfloat16 if arguments.bf16 else torch.float32)
        if device == "cpu":  # a slice in float32, for a soft cap's slopes another, its gradients in 16 bits
            copies = 1 + (model.config.final_logit_softcapping is not None) + 0.5 * arguments.bf16
        else:
            copies = 2 - arguments.bf16  # the slice and its gradients
        rows = copies * min(rows, height)
    matrices = sum(parameter.numel() for parameter in matrix_parameters(model)) if muon else 0
    return {
        "weights": weights,
        "gradients": learned,
        "optimizer": 2 * learned - 4.0 * matrices,  # Muon has one number for each weight, AdamW two
        "activations": activation_bytes(model, batch_size, length, arguments.bf16, checkpointing),
        "logits": 4.0 * rows * width,
    }


def with_total(parts: dict[str, float], accumulating: bool) -> dict[str, float]:
    """The parts and their peak: gradients grow while activations shrink, unless they are accumulated."""
    gradients, others = parts["gradients"], parts["activations"] + parts["logits"]
    passing = gradients + others if accumulating else max(gradients, others)
    return {**parts, "total": parts["weights"] + parts["optimizer"] + parts["communication"] + passing}


def memory_by_strategy(
    model: nn.Module, arguments, length: int, device: str, gpus: int, memory: float
) -> dict[str, dict]:
    """
    `memory_by_part` of each of some devices, for the ways to divide a model among them, with and without checkpointing.

    `communication` is DDP's copy of the gradients, and for FSDP2 the gathered weights of two layers: that which computes
    and the next. `largest_model`: see there.
    """
    layer = 4.0 * sum(parameter.numel() for parameter in decoder_layers(model)[0].parameters())
    accumulating, part, found = arguments.gradient_accumulation_steps > 1, tensor_parallel_part(model, gpus), {}
    for suffix in ("", ", checkpointing"):
        whole = memory_by_part(model, arguments, length, device, bool(suffix))
        for name, divided in STRATEGIES.items() if gpus > 1 else [("one device", (0, 0, 0))]:
            shares = zip(("weights", "gradients", "optimizer"), divided, strict=True)
            parts = whole | {key: whole[key] / gpus**share for key, share in shares}
            parts["communication"] = {"DDP": whole["gradients"], "FSDP2, ZeRO-3": 2 * layer}.get(name, 0.0)
            found[name + suffix] = parts
        if part:
            found["TP" + suffix] = memory_by_part(part, arguments, length, device, bool(suffix)) | {
                "communication": 0.0
            }
    return {
        name: with_total(parts, accumulating) | {"largest_model": largest_model(model, parts, memory, accumulating)}
        for name, parts in found.items()
    }


def tensor_parallel_part(model: nn.Module, gpus: int) -> nn.Module | None:
    """What one of some devices has of a model under tensor parallelism: heads, width of the MLP, rows of the embedding."""
    sizes = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    config = model.config.to_dict()
    divisible = all(config.get(name) and config[name] % gpus == 0 for name in sizes[:3])
    if gpus == 1 or not divisible or type(model).__name__.startswith("Peft") or not model.can_generate():
        return None
    part = {name: -(-config[name] // gpus) for name in sizes}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    with FakeTensorMode():
        return type(model)(type(model.config).from_dict({**config, **special, **part, "head_dim": head_dim}))


def largest_model(model: nn.Module, parts: dict[str, float], memory: float, accumulating: bool) -> int:
    """
    Parameters of the largest model of this shape, layers and width grown alike, that trains in `memory` (bytes).

    With width and depth times `k`, the layers' weights grow as `k^3`, their activations as `k^2`, the rest as `k`.
    """
    layers = sum(parameter.numel() for parameter in decoder_layers(model).parameters())
    rest = model.num_parameters() - layers

    def parameters(k: float) -> float:
        return layers * k**3 + rest * k

    def total(k: float) -> float:
        grown = parameters(k) / parameters(1.0)
        factors = {"activations": k**2, "logits": 1.0}
        sizes = {name: size * factors.get(name, grown) for name, size in parts.items()}
        return with_total(sizes, accumulating)["total"]

    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= memory else (low, middle)
    return int(parameters(low))


def sketch(task: Task, data: PreparedData) -> nn.Module:
    """The model that a task trains, of fake tensors."""
    name, attention = task.model_arguments.model_name_or_path, task.model_arguments.attn_implementation
    adapted = task.model_arguments.use_peft  # PEFT moves what it adds, which fake tensors refuse: first on "meta"
    with torch.device("meta") if adapted else FakeTensorMode():
        if name is None:
            model = task.build_model(data)
        else:
            kind, options = getattr(task.auto_class, "config_class", AutoConfig), {"attn_implementation": attention}
            config = kind.from_pretrained(name, **options if attention else {})
            fields = task.config_fields(data) | task.model_arguments.config_fields()
            for field, value in {**fields, "vocab_size": max(len(data.tokenizer), config.vocab_size)}.items():
                setattr(config, field, value)
            model = getattr(task.auto_class, "from_config", task.auto_class)(config)
        if adapted:
            model = add_adapter(model, task.model_arguments, task.peft_task_type)
    if adapted:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            model.base_model.model.tie_weights()
    return model


def count_tokens(task: Task, data: PreparedData, sample: int = 1_000_000) -> float:
    """Tokens of the training rows, from the bytes of all and the bytes per token of the first million characters."""
    if isinstance(data.rows["train"], IterableDataset):
        raise InputError("max_steps: name it; a stream's length is not known.")
    text, size = "", 0
    for part in task.texts(data.rows["train"]):
        size += len(part.encode())
        text += part[: max(sample - len(text), 0)]
    return size * len(data.tokenizer(text, add_special_tokens=False)["input_ids"]) / max(len(text.encode()), 1)


def plan(
    model_arguments, data_arguments, arguments, hardware="this", gpus=1, price=None, utilization=UTILIZATION
) -> dict:
    """
    What a recipe costs.

    On this machine the run is prepared as `hf-lm train` does (its data are then in the cache) and some of its steps are
    timed. Of other hardware the time is that of the matrix products at a stated share of the peak; the tokens are those
    of the recipe on one device, divided among all.

    Args:
        hardware: a key of `DEVICES` with a known peak, or `"this"`.
        price: of a device for an hour, in any currency.

    Raises:
        InputError: unknown hardware, no device, or something is wrong with the recipe or its data.
    """
    known = [name for name, one in DEVICES.items() if one.peak_flops and one.memory]
    if hardware != "this" and hardware not in known:
        raise InputError(f"--hardware: must be one of {', '.join(known)}, this; got {hardware!r}.")
    if gpus < 1 or (hardware == "this" and gpus > 1):
        raise InputError(f"--gpus: must be at least 1, and more only with other --hardware, got {gpus}.")
    if not 0 < utilization <= 1:
        raise InputError(f"--utilization: must be above 0 and at most 1, got {utilization}.")
    task = task_class(data_arguments.task)(model_arguments, data_arguments, arguments)
    length = data_arguments.block_size
    step_tokens = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * length
    measured, steps, start = None, float(arguments.max_steps), time.perf_counter()
    if hardware == "this":
        with tempfile.TemporaryDirectory() as folder:
            arguments.output_dir = folder
            data = task.prepare()
            trainer = task.build_trainer(data)
            task.scores_before(trainer, data)  # its time counts
            measured = forecast(trainer, time.perf_counter() - start, seconds=5.0)
        device = arguments.device.type
        steps, step_tokens = measured["costs"]["steps"], measured["costs"]["tokens"]
        memory, peak, watts = memory_of(arguments.device), None, assumed_watts(describe_hardware(arguments.device))
    else:
        other, device = DEVICES[hardware], "cuda"
        memory, peak, watts = other.memory, other.peak_flops, other.watts
        arguments.bf16, model_arguments.attn_implementation = True, model_arguments.attn_implementation or "sdpa"
        data = task.read()
        if steps <= 0:
            steps = math.ceil(arguments.num_train_epochs * count_tokens(task, data) / step_tokens)
    model = sketch(task, data)
    if device == "cpu":
        task.fit_to_cpu(model)
    parts, tokens = parameters_by_part(model), steps * step_tokens
    muon_batch = step_tokens if arguments.muon_learning_rate is not None else None
    flops = flops_by_part(model, length, muon_batch, muon_half=not measured or has_fast_bfloat16(device))
    per_token = sum(flops.values())
    speed = measured["tokens_per_second"] if measured else peak * utilization * gpus / per_token
    hours = (measured["trained_seconds"] if measured else tokens / speed) / 3600
    count = sum(parts.values())
    return {
        "hardware": describe_hardware(arguments.device) if measured else hardware,
        "gpus": gpus,
        "parameters": {**parts, "total": count},
        "flops_per_token": {**flops, "total": per_token},
        "memory": {"device": memory, "strategies": memory_by_strategy(model, arguments, length, device, gpus, memory)},
        "steps": int(steps),
        "tokens": int(tokens),
        "optimal_tokens": TOKENS_PER_PARAMETER * count,
        "tokens_per_second": speed,
        "flops_per_second": speed * per_token,
        "utilization": None if measured else utilization,
        "hours": hours,
        "watts": watts,
        "kilowatt_hours": watts * gpus * hours / 1000 if watts else None,
        "price": price,
        "money": None if price is None else price * gpus * hours,
        "forecast": measured,
    }


def as_text(costs: dict) -> str:
    """A plan for people."""

    def listed(parts: dict, unit: float = 1.0, digits: int = 0) -> str:
        return ", ".join(f"{name} {size / unit:,.{digits}f}" for name, size in parts.items())

    measured, memory = costs["forecast"], costs["memory"]["device"]
    how = "measured" if measured else f"at {costs['utilization']:.0%} of the peak"
    lines = [
        f"{costs['gpus']} x {costs['hardware']}",
        f"parameters: {listed(costs['parameters'])}",
        f"MFLOP a token, forward and backward: {listed(costs['flops_per_token'], 1e6, 3)}",
        f"memory of a device, MB (it has {memory / 1e6:,.0f}):",
        *(
            f"  {name}: {listed({part: size for part, size in parts.items() if part != 'largest_model'}, 1e6)}; "
            f"fits up to {parts['largest_model'] / 1e6:,.0f} million parameters"
            for name, parts in costs["memory"]["strategies"].items()
        ),
        f"tokens: {costs['tokens']:,} in {costs['steps']:,} steps; compute-optimal are {costs['optimal_tokens']:,} "
        f"({TOKENS_PER_PARAMETER} a parameter, arXiv:2203.15556)",
        f"speed, {how}: {costs['tokens_per_second']:,.0f} tokens/s, {costs['flops_per_second'] / 1e9:,.1f} GFLOP/s",
    ]
    if measured:
        lines.append(f"memory of the process, measured: {measured['peak_memory_bytes'] / 1e6:,.0f} MB")
    cost = [f"time: {costs['hours'] * 3600:,.0f} s ({costs['hours']:.2f} h)"]
    if costs["watts"]:
        cost.append(f"energy: {costs['kilowatt_hours']:.3g} kWh at {costs['watts']} W a device, its stated power")
    if costs["money"] is not None:
        cost.append(f"money: {costs['money']:,.2f} at {costs['price']:g} an hour and device")
    return "\n".join([*lines, "; ".join(cost)])
