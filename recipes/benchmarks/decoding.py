"""
How fast a Llama checkpoint writes text, read as an hf_lm model, against the library's own LlamaForCausalLM:

    python recipes/benchmarks/decoding.py MODEL_FOLDER [--text FILE] [--threads 1 2] [--json]

    upstream   LlamaForCausalLM, as it comes              plain   HfLmForCausalLM, as it comes
    packed     plain after `optimize_for_inference`       int8    with 8-bit weights

All in one process, in the order A B C D A B C D ...; greedy, the same prompt, the same number of new tokens. A step is
(time of the whole - time with one new token) / (new tokens - 1); prefill is the time with one new token. Both in
seconds of the clock and, since other work on a shared machine stretches those, in CPU seconds (of all threads; with
more than one, waiting threads spin and are counted). Ratios are taken round by round, and their median is printed.
`bandwidth` is the share of the memory-bandwidth limit: bytes of weights read a step over its time, against the speed at
which large tensors are added up. `lookup` is `packed` with prompt-lookup decoding on a prompt to be repeated.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

KINDS = ("upstream", "plain", "packed", "int8")
GOAL = {"packed": {"step": 1.5, "prefill": 1.1}, "int8": {"step": 2.5, "bits_per_byte": 1.01}}
PASSAGE = "The history of the town begins with a small group of settlers who came up the river in the spring of 1790. "


def load(kind: str, folder: str, dtype):
    from transformers import LlamaForCausalLM

    from hf_lm import HfLmForCausalLM
    from hf_lm.generation.packed import optimize_for_inference

    model = (LlamaForCausalLM if kind == "upstream" else HfLmForCausalLM).from_pretrained(folder, dtype=dtype).eval()
    return optimize_for_inference(model, int8=kind == "int8") if kind in ("packed", "int8") else model


def read_speed() -> float:
    """Bytes a second at which the machine reads memory: the best of five sums over 1 GiB."""
    import torch

    values = torch.ones(2**28)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - start)
    return values.numel() * values.itemsize / min(times)


def weight_bytes(model) -> int:
    """Bytes of weights that a step reads: all matrices, tied ones once; of an optimized model those of its products."""
    from hf_lm.generation.packed import PackedLinear

    packed = [module.weight_bytes for module in model.modules() if isinstance(module, PackedLinear)]
    return sum(packed) or sum(p.numel() * p.element_size() for p in model.parameters())


def generate(model, input_ids, new_tokens: int, **how) -> tuple[float, float, list]:
    """Seconds, CPU seconds and the new tokens."""
    import torch

    how = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, **how}
    # So all write that many tokens, without a processor that sees to it at each step.
    model.generation_config.eos_token_id = None
    start, cpu_start = time.perf_counter(), time.process_time()
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **how)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return seconds, cpu_seconds, output[:, input_ids.shape[1] :].tolist()


def measure(models: dict, input_ids, new_tokens: int, repeats: int) -> dict:
    """Medians of each kind, ratios to upstream, the share of tokens that are upstream's."""
    for model in models.values():
        generate(model, input_ids, 2)
    runs = {kind: [] for kind in models}
    for _ in range(repeats):
        for kind, model in models.items():
            one, cpu_one, _ = generate(model, input_ids, 1)
            whole, cpu_whole, tokens = generate(model, input_ids, new_tokens)
            steps = new_tokens - 1
            runs[kind].append(
                {
                    "step": (whole - one) / steps,
                    "step_cpu": (cpu_whole - cpu_one) / steps,
                    "prefill": one,
                    "prefill_cpu": cpu_one,
                }
            )
            runs[kind][-1]["tokens"] = tokens
    results = {}
    for kind, rows in runs.items():
        names = [name for name in rows[0] if name != "tokens"]
        result = {name: statistics.median(row[name] for row in rows) for name in names}
        result["tokens_per_second"] = len(input_ids) / result["step"]
        for name in names:
            ratios = [theirs[name] / mine[name] for theirs, mine in zip(runs["upstream"], rows, strict=True)]
            result[f"{name}_ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
        pairs = zip(sum(rows[0]["tokens"], []), sum(runs["upstream"][0]["tokens"], []), strict=True)
        result["same_tokens"] = statistics.mean(mine == theirs for mine, theirs in pairs)
        results[kind] = result
    return results


def measure_lookup(model, tokenizer, new_tokens: int, repeats: int) -> dict:
    """Prompt-lookup decoding: the text is to be repeated, as in summaries, edits and code."""
    ids = tokenizer(PASSAGE * 3, return_tensors="pt")["input_ids"]
    ratios, same = [], True
    for _ in range(repeats):
        plain, _, want = generate(model, ids, new_tokens)
        lookup, _, got = generate(model, ids, new_tokens, prompt_lookup_num_tokens=8)
        ratios.append(plain / lookup)
        same = same and got == want
    return {"ratio": [statistics.median(ratios), min(ratios), max(ratios)], "same_tokens": same}


def bits_per_byte(models: dict, tokenizer, text: str) -> dict:
    from hf_lm.evaluation.text import score_documents

    scores = {kind: score_documents(model, tokenizer, [text], block_size=512) for kind, model in models.items()}
    return {kind: score.summary()["bits_per_byte"] for kind, score in scores.items()}


def rise_by_steps(models: dict, tokenizer, text: str, window: int = 512) -> float:
    """
    The share by which 8 bits raise the loss of text read as decoding at batch 1 reads it, one token at a time, over that of
    upstream's model, which reads a window at once.
    """
    import torch

    ids = torch.tensor(tokenizer(text)["input_ids"])
    losses = {"upstream": 0.0, "int8": 0.0}
    with torch.no_grad():
        for row in ids[: len(ids) // window * window].view(-1, 1, window):
            cache, logits = None, []
            for at in range(window):
                output = models["int8"](row[:, at : at + 1], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits[0, -1])
            for kind, rows in ("int8", torch.stack(logits)), ("upstream", models["upstream"](row).logits[0]):
                losses[kind] += torch.nn.functional.cross_entropy(rows[:-1].float(), row[0, 1:]).item()
    return losses["int8"] / losses["upstream"] - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="MODEL_FOLDER", help="a Llama checkpoint with its tokenizer")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(bfloat16)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="(1 8)")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="threads to compute with (2)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="(64)")
    parser.add_argument("--new-tokens", type=int, default=48, help="(48)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS[1:], default=KINDS[1:], help="what to compare (all)")
    parser.add_argument("--lookup", action="store_true", help="measure prompt-lookup decoding too")
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="text to compute bits per byte of, with each kind; with int8 token by token, too",
    )
    parser.add_argument("--text-bytes", type=int, default=60_000, help="of its start (60000)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()

    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    dtype = getattr(torch, arguments.dtype)
    models = {kind: load(kind, arguments.folder, dtype) for kind in ("upstream", *arguments.kinds)}
    ids = tokenizer(PASSAGE * (1 + arguments.prompt_tokens // 20))["input_ids"][: arguments.prompt_tokens]
    sizes = {kind: weight_bytes(model) for kind, model in models.items()}
    result = {"goal": GOAL, "weight_bytes": sizes, "dtype": arguments.dtype, "runs": []}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        speed = read_speed()
        for batch in arguments.batch_sizes:
            kinds = measure(models, torch.tensor([ids] * batch), arguments.new_tokens, arguments.repeats)
            for kind, row in kinds.items():
                row["bandwidth"] = sizes[kind] / row["step"] / speed
            result["runs"].append({"threads": threads, "batch": batch, "read_speed": speed, "kinds": kinds})
    if arguments.lookup:
        kind = "packed" if "packed" in models else arguments.kinds[0]
        result["lookup"] = measure_lookup(models[kind], tokenizer, arguments.new_tokens, arguments.repeats)
    if arguments.text:
        text = Path(arguments.text).read_bytes()[: arguments.text_bytes].decode(errors="ignore")
        result["bits_per_byte"] = bits_per_byte(models, tokenizer, text)
        if "int8" in models:
            result["rise_by_steps"] = rise_by_steps(models, tokenizer, text)
    if arguments.json:
        print(json.dumps(result))
        return 0
    for run in result["runs"]:
        print(f"{run['threads']} threads, batch {run['batch']}, {run['read_speed'] / 1e9:.1f} GB/s:")
        print(
            f"  {'':10}{'tokens/s':>9}{'step ms':>9}{'ratio':>7}{'cpu':>7}{'prefill':>9}{'ratio':>7}{'band':>6}{'same':>6}"
        )
        for kind, row in run["kinds"].items():
            print(
                f"  {kind:10}{row['tokens_per_second']:9.1f}{row['step'] * 1e3:9.1f}{row['step_ratio'][0]:7.2f}"
                f"{row['step_cpu_ratio'][0]:7.2f}{row['prefill'] * 1e3:9.0f}{row['prefill_ratio'][0]:7.2f}"
                f"{row['bandwidth']:6.0%}{row['same_tokens']:6.0%}"
            )
    for name in ("lookup", "bits_per_byte", "rise_by_steps"):
        if name in result:
            print(f"{name}: {result[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
