"""
How fast is a training step and how much memory does it take, against transformers' Llama of the same shape?
See training_step.md and training_step_gpu.md.

The model is a Llama on both sides (hf_lm with that architecture; at 124M hf_lm's defaults), random weights in float32,
bfloat16 autocast as the Trainer does it with `bf16: true` (`--dtype float32` without), fused AdamW, one batch of
random tokens, forward, backward, step. Transformers' model runs as it comes; ours as `hf-lm train` sets it up
(`hf_lm.training.device_tuning`). Memory is the peak above what the process had before the model. Tokens per CPU second
are given beside those per second of the clock, because other work on a shared machine stretches the latter.
"""

import statistics
import time

import harness

SIDES = ("transformers", "hf_lm")
SHAPES = {  # hidden size, MLP, layers, heads, key/value heads
    "17M": (384, 1024, 8, 6, 6),
    "124M": (768, 2048, 12, 12, 12),
    "135M": (576, 1536, 30, 9, 3),
}
VOCABULARIES = {"8k": 8192, "49k": 49152, "50k": 50304}
CASES = ("17M-8k-512", "17M-8k-2048", "17M-49k-512", "17M-49k-2048", "135M-49k-512")


def build_model(side: str, size: str, vocabulary: int, context: int, case: dict):
    """The model of one side, in training mode on the case's device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_lm import HfLmConfig, HfLmForCausalLM
    from hf_lm.hardware import keep_freed_memory
    from hf_lm.training.device_tuning import fit_to_cpu, fit_to_gpu

    hidden, mlp, layers, heads, kv_heads = SHAPES[size]
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    if side == "transformers":
        return LlamaForCausalLM(LlamaConfig(**shape)).train().to(case["device"])
    choices = {"mlp_type": "gated", "hidden_act": "silu", "norm_position": "pre", "qk_norm": None}
    if size == "124M":
        choices = {"intermediate_size": mlp * 3 // 2}  # not gated: two matrices instead of three
    model = HfLmForCausalLM(HfLmConfig(**shape | choices))
    is_mixed, is_compiled = case["dtype"] == "bfloat16", case["compile"]
    if case["device"] == "cpu":
        if not is_compiled:
            keep_freed_memory()
        fit_to_cpu(model, max(1, case["tokens"] // context), context, is_mixed, recompute=not is_compiled)
    else:
        fit_to_gpu(model, is_mixed, recompute=is_compiled)
    return model.train().to(case["device"])


def build_optimizer(side: str, model, case: dict):
    """Fused AdamW for all parameters, or Muon for our matrices."""
    import torch

    from hf_lm.anatomy import matrix_parameters
    from hf_lm.training.optimizers import MuonAdamW, lay_out_states

    if side == "hf_lm" and case["optimizer"] == "muon":
        matrices = {id(parameter): parameter for parameter in matrix_parameters(model)}
        others = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
        groups = [{"params": list(matrices.values()), "muon": True, "lr": 0.02}, {"params": others}]
        optimizer = MuonAdamW(groups, lr=1e-4, fused=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if side == "hf_lm" and case["device"] == "cpu":
        lay_out_states(optimizer)
    return optimizer


def draw_batch(vocabulary: int, rows: int, context: int, document: int, device: str) -> dict:
    """Random tokens; with `document`, of packed documents of that many on average (geometric)."""
    import torch
    from accelerate.utils import send_to_device

    from hf_lm.data.collator import PackedCollator

    ids = torch.randint(0, vocabulary, (rows, context))
    if not document:
        return dict.fromkeys(("input_ids", "labels"), ids.to(device))
    begins = torch.rand(rows, context) < 1 / document
    begins[:, 0] = True
    index = torch.arange(context).expand(rows, -1)
    positions = index - torch.where(begins, index, 0).cummax(dim=1).values
    numbers = {"input_ids": ids.numpy(), "labels": ids.numpy(), "position_ids": positions.numpy()}
    packed = PackedCollator(0, lengths=device == "cuda")
    return send_to_device(
        packed([{name: values[row] for name, values in numbers.items()} for row in range(rows)]), device
    )


def measure(side: str, **case) -> dict[str, float]:
    """Tokens per second and per CPU second, peak memory and model-FLOPs utilization of a step."""
    import torch
    import transformers  # noqa: F401  both sides import before memory is counted

    import hf_lm.training.device_tuning  # noqa: F401
    from hf_lm.anatomy import model_flops_utilization

    size, words, length = case["shape"].split("-")
    vocabulary, context, device = VOCABULARIES[words], int(length), torch.device(case["device"])
    rows = max(1, case["tokens"] // context)
    with harness.PeakMemory() as memory:
        model = build_model(side, size, vocabulary, context, case)
        optimizer = build_optimizer(side, model, case)
        forward = torch.compile(model) if case["compile"] else model
        batch = draw_batch(vocabulary, rows, context, case["packed"], case["device"])
        mixed = torch.autocast(device.type, torch.bfloat16, enabled=case["dtype"] == "bfloat16")
        options = {"use_cache": False} | ({"skip_logits": True} if side == "hf_lm" else {})
        times, cpu_times = [], []
        for _ in range(case["steps"] + 1):
            start, cpu_start = time.perf_counter(), time.process_time()
            with mixed:
                loss = forward(**batch, **options).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            cpu_times.append(time.process_time() - cpu_start)
    seconds, cpu_seconds, tokens = statistics.median(times[1:]), statistics.median(cpu_times[1:]), rows * context
    is_gpu = device.type == "cuda"
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu_seconds,
        "first_step_seconds": times[0],
        "peak_mb": torch.cuda.max_memory_allocated() / 2**20 if is_gpu else memory.peak_mb,
        "mfu": model_flops_utilization(model, context, tokens / seconds, device) or 0.0,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": float(loss),
    }


def build_parser():
    parser = harness.build_parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES, help="size-vocabulary-context, such as 17M-8k-512")
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch (2048)")
    parser.add_argument("--steps", type=int, default=3, help="steps measured, after a first one (3)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(bfloat16, autocast)")
    parser.add_argument("--threads", type=int, default=0, help="threads to compute with (all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    parser.add_argument("--packed", type=int, default=0, help="mean tokens of packed documents (none are packed)")
    parser.add_argument("--muon", action="store_true", help="hf_lm: Muon for matrices, as the recipes have it")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    return parser


def compare(bench: harness.Bench) -> int:
    options = bench.arguments
    case = {name: getattr(options, name) for name in ("dtype", "device", "tokens", "compile", "packed", "steps")}
    case["optimizer"] = "muon" if options.muon else "adamw"
    for shape in options.cases:
        bench.compare({"shape": shape, **case}, SIDES, threads=options.threads)
    return 0


if __name__ == "__main__":
    raise SystemExit(harness.main(build_parser(), measure, compare))
