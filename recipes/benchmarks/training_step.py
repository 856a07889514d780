"""
Tokens a second and peak memory of a training step, against the library's LlamaForCausalLM of the same shape:

    python recipes/benchmarks/training_step.py [--cases 17M-8k-512 135M-49k-512 ...] [--compile] [--json]
    python recipes/benchmarks/training_step.py --device cuda --cases 124M-50k-1024 --tokens 65536 --compile

The model is a Llama in both cases (the hf_lm side: `hf_lm` with that architecture), random weights in float32, bfloat16
autocast as the Trainer does it with `bf16: true` (`--dtype float32` without), fused AdamW, one batch of random tokens,
forward, backward, step. Upstream runs as it comes; hf_lm as `hf-lm train` sets it up (`hf_lm.training.device_tuning`; on a
CPU: attention written out for short contexts in bfloat16, what is large and cheap computed twice, freed memory kept,
the last two not where it is compiled, and the optimizer's states there from the beginning; on a GPU, compiled: norms
and sums of the residual stream computed twice).

Every measurement is a process of its own, in the order A B A B ...; the peak is that of the private memory above what
the process had before the model. Ratios are taken round by round; their median is printed. CPU seconds are given beside
those of the clock, for other work on a shared machine stretches the latter; on a GPU of a known kind the model-FLOPs
utilisation (`hf_lm.planning.plan`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import psutil
import torch
from accelerate.utils import send_to_device
from data_pipeline import PeakMemory
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lm import HfLmConfig, HfLmForCausalLM
from hf_lm.anatomy import matrix_parameters, model_flops_utilization
from hf_lm.data.collator import PackedCollator
from hf_lm.hardware import keep_freed_memory
from hf_lm.training.device_tuning import fit_to_cpu, fit_to_gpu
from hf_lm.training.optimizers import MuonAdamW, lay_out_states

GOAL = {"eager": 1.4, "compiled": 1.15, "memory at 49k": 0.6}
SHAPES = {  # hidden, MLP, layers, heads, key/value heads
    "17M": (384, 1024, 8, 6, 6),
    "124M": (768, 2048, 12, 12, 12),
    "135M": (576, 1536, 30, 9, 3),
}
VOCABULARIES = {"8k": 8192, "49k": 49152, "50k": 50304}
CASES = ("17M-8k-512", "17M-8k-2048", "17M-49k-512", "17M-49k-2048", "135M-49k-512")


def build(
    kind: str, case: str, tokens: int = 2048, dtype: str = "bfloat16", device: str = "cpu", compiles: bool = False
):
    """The model of one case, and its vocabulary and context."""
    size, vocabulary, context = case.split("-")
    hidden, mlp, layers, heads, kv_heads = SHAPES[size]
    shape = {
        "vocab_size": VOCABULARIES[vocabulary],
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": int(context),
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    if kind == "upstream":
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        choices = {"mlp_type": "gated", "hidden_act": "silu", "norm_position": "pre", "qk_norm": None}
        if size == "124M":
            choices = {"intermediate_size": mlp * 3 // 2}  # not gated: two matrices instead of three
        model = HfLmForCausalLM(HfLmConfig(**shape | choices))
        if device == "cpu":
            if not compiles:
                keep_freed_memory()
            mixed = dtype == "bfloat16"
            fit_to_cpu(model, max(1, tokens // int(context)), int(context), mixed, recompute=not compiles)
        else:
            fit_to_gpu(model, dtype == "bfloat16", recompute=compiles)
    return model.train().to(device), VOCABULARIES[vocabulary], int(context)


def draw_batch(vocabulary: int, rows: int, context: int, document: int, device: str) -> dict[str, torch.Tensor]:
    """Random tokens; with `document`, of documents of so many on average (geometric), as training packs them."""
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


def measure(kind: str, case: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds and CPU seconds a step, tokens, peak memory in MB, in this process."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    with PeakMemory(psutil.Process()) as memory:
        setting = arguments.tokens, arguments.dtype, arguments.device, arguments.compile
        model, vocabulary, context = build(kind, case, *setting)
        parameters = sum(p.numel() for p in model.parameters())
        if arguments.muon and kind == "hf_lm":
            matrices = {id(parameter): parameter for parameter in matrix_parameters(model)}
            others = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
            groups = [{"params": list(matrices.values()), "muon": True, "lr": 0.02}, {"params": others}]
            optimizer = MuonAdamW(groups, lr=1e-4, fused=True)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if kind == "hf_lm" and device.type == "cpu":
            lay_out_states(optimizer)
        forward = torch.compile(model) if arguments.compile else model
        rows = max(1, arguments.tokens // context)
        batch = draw_batch(vocabulary, rows, context, arguments.packed, arguments.device)
        mixed = torch.autocast(device.type, torch.bfloat16, enabled=arguments.dtype == "bfloat16")
        options = {"use_cache": False} | ({"skip_logits": True} if kind == "hf_lm" else {})
        times, cpu_times = [], []
        for _ in range(arguments.steps + 1):
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
    seconds, peak = statistics.median(times[1:]), memory.peak
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {
        "seconds": seconds,
        "cpu_seconds": statistics.median(cpu_times[1:]),
        "first_step": times[0],
        "tokens": rows * context,
        "peak_memory_mb": peak / 2**20,
        "mfu": model_flops_utilization(model, context, rows * context / seconds, device) or 0.0,
        "parameters": parameters,
        "loss": float(loss),
    }


def run(kind: str, case: str, words: list[str]) -> dict[str, float]:
    """`measure` in a new process."""
    command = [sys.executable, __file__, *words, "--measure", kind, case]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", default=CASES, help="size-vocabulary-context, such as 17M-8k-512")
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch (2048)")
    parser.add_argument("--steps", type=int, default=3, help="steps measured, after a first one (3)")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind (3)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(bfloat16, autocast)")
    parser.add_argument("--threads", type=int, default=0, help="threads to compute with (all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    parser.add_argument("--packed", type=int, default=0, help="mean tokens of packed documents (none are packed)")
    parser.add_argument("--muon", action="store_true", help="hf_lm: Muon for matrices, as the recipes have it")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure, arguments)))
        return 0

    names = ("tokens", "steps", "dtype", "threads", "device", "packed")
    words = [word for name in names for word in (f"--{name}", str(getattr(arguments, name)))]
    words += [f"--{name}" for name in ("compile", "muon") if getattr(arguments, name)]
    results = {"goal": GOAL, "compile": arguments.compile, "dtype": arguments.dtype, "cases": {}}
    for case in arguments.cases:
        pairs = [(run("upstream", case, words), run("hf_lm", case, words)) for _ in range(arguments.repeats)]
        result = {}
        for kind, rows in zip(("upstream", "hf_lm"), zip(*pairs, strict=True), strict=True):
            result[kind] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for name in ("seconds", "cpu_seconds", "peak_memory_mb"):
            ratios = [theirs[name] / mine[name] for theirs, mine in pairs]
            result[f"{name}_ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
        results["cases"][case] = result
        if arguments.json:
            continue
        for kind in ("upstream", "hf_lm"):
            row = result[kind]
            print(
                f"{case:14}{kind:10}{row['tokens'] / row['seconds']:9.0f} tokens/s{row['cpu_seconds']:8.2f} CPU s"
                f"{row['peak_memory_mb']:8.0f} MB  {row['parameters'] / 1e6:.1f}M"
                + (f"  MFU {row['mfu']:.1%}" if row["mfu"] else "")
            )
        speed, cpu, memory = (result[f"{name}_ratio"][0] for name in ("seconds", "cpu_seconds", "peak_memory_mb"))
        print(f"{'':14}{speed:.2f} times as fast (CPU seconds: {cpu:.2f}), {1 / memory:.2f} of the memory", flush=True)
    if arguments.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
