"""
Does PyTorch's `linear_cross_entropy` replace our chunked cross-entropy? See chunked_loss.md.

Forward and backward. Errors are those of the loss and of both gradients (largest difference, relative to the largest
gradient) from the plain formula in float64.
"""

import statistics
import time

import harness

SHAPES = {  # rows, hidden size, vocabulary
    "moby_dick": (2048, 128, 2048),
    "SmolLM2-135M": (1024, 576, 49152),
}
SIDES = ("all logits", "hf_lm", "torch")


def measure(side: str, shape: str, dtype: str, calls: int = 10) -> dict[str, float]:
    """Median time of a call, peak memory above that of the inputs, errors."""
    import psutil
    import torch
    from torch import nn

    from hf_lm.hardware import peak_memory
    from hf_lm.kernels.loss import linear_cross_entropy

    torch.manual_seed(0)
    rows, hidden, vocabulary = SHAPES[shape]
    head = nn.Linear(hidden, vocabulary, bias=False, dtype=getattr(torch, dtype))
    states = torch.randn(1, rows, hidden, dtype=getattr(torch, dtype), requires_grad=True)
    labels = torch.randint(vocabulary, (1, rows))
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()

    def compute() -> torch.Tensor:
        if side == "hf_lm":
            return linear_cross_entropy(states, head, labels)
        if side == "torch":
            options = torch.nn.LinearCrossEntropyOptions(chunking_method="auto")
            return nn.functional.linear_cross_entropy(
                states.flatten(0, 1), head.weight, shifted, ignore_index=-100, options=options
            )
        return nn.functional.cross_entropy(head(states).flatten(0, 1).float(), shifted)

    times, before = [], psutil.Process().memory_info().rss
    for _ in range(calls):
        states.grad = head.weight.grad = None
        start = time.perf_counter()
        loss = compute()
        loss.backward()
        times.append(time.perf_counter() - start)
    peak = peak_memory() - before
    exact_states = states.detach().double().requires_grad_()
    exact_weight = head.weight.detach().double().requires_grad_()
    exact = nn.functional.cross_entropy((exact_states @ exact_weight.T).flatten(0, 1), shifted)
    exact.backward()

    def error(gradient: torch.Tensor, wanted: torch.Tensor) -> float:
        return (gradient - wanted).abs().max().item() / wanted.abs().max().item()

    return {
        "milliseconds": 1000 * statistics.median(times[2:] or times),
        "peak_mb": peak / 1e6,
        "loss_error": abs(loss.item() - exact.item()),
        "states_error": error(states.grad, exact_states.grad),
        "weight_error": error(head.weight.grad, exact_weight.grad),
    }


def build_parser():
    parser = harness.build_parser(__doc__, rounds=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES], help="(all)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="(float32 bfloat16)")
    parser.add_argument("--threads", type=int, default=2, help="threads to compute with (2)")
    return parser


def compare(bench: harness.Bench) -> int:
    for shape in bench.arguments.shapes:
        for dtype in bench.arguments.dtypes:
            bench.compare({"shape": shape, "dtype": dtype}, SIDES, threads=bench.arguments.threads)
    return 0


if __name__ == "__main__":
    raise SystemExit(harness.main(build_parser(), measure, compare))
