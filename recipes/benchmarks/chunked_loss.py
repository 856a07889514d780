"""
Chunked cross-entropy: ours against PyTorch's `linear_cross_entropy`, forward and backward, each measurement in its own process.

    python recipes/benchmarks/chunked_loss.py [--rounds 5] [--threads 2]

Prints for each case the median time of a call, the peak of memory over what the inputs take, and the largest difference of loss
and gradients from the plain formula in float64.
"""

import argparse
import json
import statistics
import subprocess
import sys

CASES = {  # rows, hidden, vocabulary, dtype
    "moby_dick": (2048, 128, 2048, "float32"),
    "moby_dick, bfloat16": (2048, 128, 2048, "bfloat16"),
    "SmolLM2-135M": (1024, 576, 49152, "float32"),
    "SmolLM2-135M, bfloat16": (1024, 576, 49152, "bfloat16"),
}
WHICH = ("ours", "torch", "plain")


def measure(which: str, case: str, threads: int) -> dict:
    """Seconds of a call (median of ten), bytes of peak, largest differences; in this process."""
    import time

    import psutil
    import torch
    from torch import nn

    from hf_lm.kernels.loss import linear_cross_entropy

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows, hidden, vocabulary, dtype = CASES[case]
    head = nn.Linear(hidden, vocabulary, bias=False, dtype=getattr(torch, dtype))
    states = torch.randn(1, rows, hidden, dtype=getattr(torch, dtype), requires_grad=True)
    labels = torch.randint(vocabulary, (1, rows))
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()

    def compute() -> torch.Tensor:
        if which == "ours":
            return linear_cross_entropy(states, head, labels)
        if which == "torch":
            options = torch.nn.LinearCrossEntropyOptions(chunking_method="auto")
            return nn.functional.linear_cross_entropy(
                states.flatten(0, 1), head.weight, shifted, ignore_index=-100, options=options
            )
        return nn.functional.cross_entropy(head(states).flatten(0, 1).float(), shifted)

    times, process = [], psutil.Process()
    before = process.memory_info().rss
    for _ in range(10):
        states.grad = head.weight.grad = None
        start = time.perf_counter()
        loss = compute()
        loss.backward()
        times.append(time.perf_counter() - start)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    exact_states = states.detach().double().requires_grad_()
    exact_weight = head.weight.detach().double().requires_grad_()
    exact = nn.functional.cross_entropy((exact_states @ exact_weight.T).flatten(0, 1), shifted)
    exact.backward()
    differences = {
        "loss": abs(loss.item() - exact.item()),
        "states": (states.grad - exact_states.grad).abs().max().item() / exact_states.grad.abs().max().item(),
        "weight": (head.weight.grad - exact_weight.grad).abs().max().item() / exact_weight.grad.abs().max().item(),
    }
    return {"milliseconds": 1000 * statistics.median(times[2:]), "peak_mb": peak / 1e6, **differences}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="each way is measured this often, in turn (5)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("WHICH", "CASE"), help="measure in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one, arguments.threads)))
        return
    for case in CASES:
        found: dict[str, list[dict]] = {which: [] for which in WHICH}
        for _ in range(arguments.rounds):
            for which in WHICH:
                command = [sys.executable, __file__, "--threads", str(arguments.threads), "--one", which, case]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[which].append(json.loads(output))
        for which, results in found.items():
            medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
            numbers = "  ".join(f"{key} {value:.3g}" for key, value in medians.items())
            print(f"{case:24} {which:6} {numbers}", flush=True)


if __name__ == "__main__":
    main()
