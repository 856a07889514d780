"""
How fast does a Llama checkpoint write text as an hf_lm model, against transformers' class? See decoding.md.

    transformers   LlamaForCausalLM, as it comes              hf_lm   HfLmForCausalLM, as it comes
    prepacked      hf_lm after `optimize_for_inference`       int8    with 8-bit weights

Greedy, the same prompt, the same number of new tokens. A step is (time of the whole - time with one new token) / (new
tokens - 1); prefill is the time with one new token. Both are given in seconds of the clock and in CPU seconds, because
other work on a shared machine stretches the former. `bandwidth` is the share of the memory-bandwidth limit: bytes of
weights read a step over its time, against the speed at which large tensors are added up.
"""

import statistics
import time
from pathlib import Path

import harness

SIDES = ("transformers", "hf_lm", "prepacked", "int8")
PASSAGE = "The history of the town begins with a small group of settlers who came up the river in the spring of 1790. "


def load(side: str, folder: str, dtype: str):
    """The model of one side."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    from hf_lm import HfLmForCausalLM
    from hf_lm.generation.packed import optimize_for_inference

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model_class = LlamaForCausalLM if side == "transformers" else HfLmForCausalLM
    model = model_class.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return optimize_for_inference(model, int8=side == "int8") if side in ("prepacked", "int8") else model


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
    """Bytes of weights that a step reads: all matrices, tied ones once; of an optimized model those of its matmuls."""
    from hf_lm.generation.packed import PackedLinear

    packed = [module.weight_bytes for module in model.modules() if isinstance(module, PackedLinear)]
    return sum(packed) or sum(p.numel() * p.element_size() for p in model.parameters())


def generate(model, input_ids, new_tokens: int, **options) -> tuple[float, float, list]:
    """Seconds, CPU seconds and the new tokens."""
    import torch

    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, **options}
    # So all write that many tokens, without a processor that sees to it at each step.
    model.generation_config.eos_token_id = None
    start, cpu_start = time.perf_counter(), time.process_time()
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return seconds, cpu_seconds, output[:, input_ids.shape[1] :].tolist()


def measure(side: str, model: str, what: str, folder: str, dtype: str, **case) -> dict:
    """One side's speed, its bits per byte, or the speed of prompt lookup."""
    from transformers import AutoTokenizer

    loaded, tokenizer = load(side, folder, dtype), AutoTokenizer.from_pretrained(folder)
    if what == "speed":
        return measure_speed(loaded, tokenizer, **case)
    if what == "prompt lookup":
        return measure_lookup(loaded, tokenizer, case["new_tokens"])
    text = Path(case["text"]).read_bytes()[: case["text_bytes"]].decode(errors="ignore")
    return measure_quality(loaded, tokenizer, text, by_token=side == "int8")


def measure_speed(model, tokenizer, batch: int, prompt_tokens: int, new_tokens: int, repeats: int) -> dict:
    """Medians of `repeats` texts, after one that is not counted."""
    import torch

    ids = tokenizer(PASSAGE * (1 + prompt_tokens // 20))["input_ids"][:prompt_tokens]
    input_ids, rows, tokens = torch.tensor([ids] * batch), [], []
    generate(model, input_ids, 2)
    for _ in range(repeats):
        one, cpu_one, _ = generate(model, input_ids, 1)
        whole, cpu_whole, tokens = generate(model, input_ids, new_tokens)
        steps = new_tokens - 1
        rows.append((steps / (whole - one), steps / (cpu_whole - cpu_one), 1 / one, 1 / cpu_one))
    names = ("steps_per_second", "steps_per_cpu_second", "prefills_per_second", "prefills_per_cpu_second")
    result = dict(zip(names, map(statistics.median, zip(*rows, strict=True)), strict=True))
    size = weight_bytes(model)
    result |= {"step_ms": 1000 / result["steps_per_second"], "prefill_ms": 1000 / result["prefills_per_second"]}
    return {
        **result,
        "weight_mb": size / 1e6,
        "bandwidth": size * result["steps_per_second"] / read_speed(),
        "tokens": [token for row in tokens for token in row],
    }


def measure_lookup(model, tokenizer, new_tokens: int) -> dict:
    """Prompt-lookup decoding against plain decoding, of a text that repeats itself, as summaries and edits do."""
    ids = tokenizer(PASSAGE * 3, return_tensors="pt")["input_ids"]
    plain, _, wanted = generate(model, ids, new_tokens)
    lookup, _, got = generate(model, ids, new_tokens, prompt_lookup_num_tokens=8)
    return {"times_as_fast": plain / lookup, "same_tokens": float(got == wanted)}


def measure_quality(model, tokenizer, text: str, by_token: bool, window: int = 512) -> dict:
    """
    Bits per byte; and the mean loss, of windows read at once or (`by_token`) one token at a time, as decoding at
    batch 1 reads them.
    """
    import torch

    from hf_lm.evaluation.text import score_documents

    bits = score_documents(model, tokenizer, [text], block_size=window).summary()["bits_per_byte"]
    ids, loss = torch.tensor(tokenizer(text)["input_ids"]), 0.0
    count = max(1, len(ids) // window)
    with torch.no_grad():
        for row in ids[: count * window].view(count, 1, -1):
            if by_token:
                cache, steps = None, []
                for at in range(row.shape[1]):
                    output = model(row[:, at : at + 1], past_key_values=cache, use_cache=True)
                    cache = output.past_key_values
                    steps.append(output.logits[0, -1])
                logits = torch.stack(steps)
            else:
                logits = model(row).logits[0]
            loss += torch.nn.functional.cross_entropy(logits[:-1].float(), row[0, 1:]).item()
    return {"bits_per_byte": bits, "decoding_loss": loss / count}


def build_parser():
    parser = harness.build_parser(__doc__, rounds=5)
    parser.add_argument("folder", metavar="MODEL_FOLDER", help="a Llama checkpoint with its tokenizer")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(bfloat16)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="(1 8)")
    parser.add_argument("--threads", type=int, default=2, help="threads to compute with (2)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="(64)")
    parser.add_argument("--new-tokens", type=int, default=48, help="(48)")
    parser.add_argument("--repeats", type=int, default=2, help="texts per measurement (2)")
    parser.add_argument("--sides", nargs="+", choices=SIDES[1:], default=SIDES[1:], help="what to compare (all)")
    parser.add_argument("--lookup", action="store_true", help="measure prompt-lookup decoding too")
    parser.add_argument("--text", metavar="FILE", help="text to compute bits per byte of, with each side")
    parser.add_argument("--text-bytes", type=int, default=60_000, help="of its start (60000)")
    return parser


def compare(bench: harness.Bench) -> int:
    options, folder = bench.arguments, Path(bench.arguments.folder).resolve()
    sides, private = ("transformers", *options.sides), {"folder": str(folder)}
    model = {"model": folder.name, "dtype": options.dtype}
    speed = {"what": "speed", "prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens}
    for batch in options.batch_sizes:
        case = {**model, **speed, "batch": batch, "repeats": options.repeats}
        record = bench.compare(case, sides, private=private, threads=options.threads)
        wanted = record["rounds"][0]["transformers"]["tokens"]
        for side in options.sides:
            written = record["rounds"][0][side]["tokens"]
            same = statistics.mean(own == other for own, other in zip(written, wanted, strict=True))
            print(f"  {side}: {same:.0%} of the tokens are those of transformers")
    if options.lookup:
        side = "prepacked" if "prepacked" in sides else options.sides[0]
        case = {**model, "what": "prompt lookup", "new_tokens": options.new_tokens}
        bench.compare(case, [side], private=private, threads=options.threads)
    if options.text:
        case = {**model, "what": "quality", "text": Path(options.text).name, "text_bytes": options.text_bytes}
        private |= {"text": str(Path(options.text).resolve())}
        bench.compare(case, sides, private=private, threads=options.threads)
    return 0


if __name__ == "__main__":
    raise SystemExit(harness.main(build_parser(), measure, compare))
