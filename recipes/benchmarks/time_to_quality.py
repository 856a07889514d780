"""
The best model that the same minutes buy: python recipes/benchmarks/time_to_quality.py FILE --seconds 120 [--json].

Same text, same split (the last tenth of the characters is held out), same wall clock. The clock starts before the
tokenizer is trained and stops the training; learning rates follow it, so that each run uses all of its time. Then the
held-out text is scored.

- `llama`: the library's `LlamaForCausalLM` and `Trainer`: fused AdamW, cosine, each of several learning rates; the best
  one counts. Tokenizer, size and batch as in `hf_lm`.
- `nanogpt`: a plain GPT of nanoGPT's CPU configuration (characters, 4 layers, 128 wide, context 64, batch 12, AdamW 1e-3,
  cosine to a tenth), https://github.com/karpathy/nanoGPT, written with the library's GPT-2.
- `hf_lm`: the recipe of `recipes/moby_dick`; with the whole time, half of it, and an eighth.

Every run is a process of its own. `--seeds` repeats all but the tuning.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "moby_dick" / "config.yaml"
LEARNING_RATES = (1e-3, 2e-3, 3e-3, 6e-3)
VOCABULARY, BLOCK, BATCH, WARM_UP = 2048, 128, 8, 20


def cosine(share: float) -> float:
    """Down to a tenth, over the whole time."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def stable_then_linear(share: float) -> float:
    """The recipe's shape: level, then linearly to zero over the last 60% of the time."""
    return min(1.0, (1 - share) / 0.6)


def timed(base, start: float, seconds: float, shape):
    """A trainer class whose learning rate follows the clock, and whose training stops with it."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = time.perf_counter() - start >= seconds

    class Timed(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(Clock())

        def create_scheduler(self, num_training_steps, optimizer=None):
            def rate(step: int) -> float:
                share = min((time.perf_counter() - start) / seconds, 1.0)
                return min((step + 1) / WARM_UP, 1.0) * max(shape(share), 0.0)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
            return self.lr_scheduler

    return Timed


def measure(kind: str, file: str, seconds: float, learning_rate: float, seed: int) -> dict:
    """Train one contender for so many seconds, in this process, and score it."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, set_seed

    from hf_lm import HfLmConfig, HfLmForCausalLM
    from hf_lm.data.arguments import DataArguments
    from hf_lm.data.collator import PackedCollator
    from hf_lm.data.documents import load_documents
    from hf_lm.data.packing import pack_documents
    from hf_lm.evaluation.text import score_documents
    from hf_lm.tokenization import train_tokenizer
    from hf_lm.training.arguments import HfLmTrainingArguments
    from hf_lm.training.hardware import best_attention, keep_freed_memory
    from hf_lm.training.trainer import HfLmTrainer

    set_seed(seed)
    start = time.perf_counter()
    block, batch = (64, 12) if kind == "nanogpt" else (BLOCK, BATCH)
    documents = load_documents(DataArguments(train_file=file, validation_split_percentage=10))
    texts = (row["text"] for row in documents["train"])
    tokenizer = train_tokenizer(texts, VOCABULARY, "char" if kind == "nanogpt" else "bpe")
    blocks = pack_documents(documents["train"], tokenizer, block)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    special["vocab_size"] = len(tokenizer)
    keys = {"learning_rate": learning_rate, "weight_decay": 0.1, "adam_beta2": 0.95, "optim": "adamw_torch_fused"}
    base, shape = Trainer, cosine
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=128, intermediate_size=344, num_hidden_layers=6, num_attention_heads=4,
            max_position_embeddings=block, tie_word_embeddings=True, use_cache=False, **special,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    elif kind == "nanogpt":
        config = GPT2Config(
            n_layer=4, n_head=4, n_embd=128, n_positions=block, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            use_cache=False, **special,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        keep_freed_memory()
        config = HfLmConfig(
            hidden_size=128, num_hidden_layers=6, num_attention_heads=4, final_logit_softcapping=15,
            max_position_embeddings=block, attn_implementation=best_attention("cpu", block), **special,
        )  # fmt: skip
        model = HfLmForCausalLM(config)
        base, shape = HfLmTrainer, stable_then_linear
        keys = {"learning_rate": 3e-3, "muon_learning_rate": 0.02, "adam_beta2": 0.95, "weight_decay": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        arguments = HfLmTrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, max_steps=10**6, save_strategy="no", report_to="none",
            logging_strategy="no", disable_tqdm=True, seed=seed, **keys,
        )  # fmt: skip
        trainer = timed(base, start, seconds, shape)(
            model, arguments, PackedCollator(tokenizer.pad_token_id), blocks, processing_class=tokenizer
        )
        trainer.train()
    held_out = (row["text"] for row in documents["validation"])
    score = score_documents(model.eval(), tokenizer, held_out, block, batch_size=32).summary()
    interval = [score["bits_per_byte_low"], score["bits_per_byte_high"]]
    steps = trainer.state.global_step
    return {"kind": kind, "learning_rate": learning_rate, "seed": seed, "seconds": seconds, "steps": steps,
            "tokens": steps * batch * block, "parameters": model.num_parameters(),
            "bits_per_byte": score["bits_per_byte"], "interval": interval}  # fmt: skip


def run(file: str, kind: str, seconds: float, learning_rate: float, seed: int) -> dict:
    """`measure` in a new process."""
    command = [sys.executable, __file__, file, "--seconds", str(seconds), "--measure", kind]
    command += ["--learning-rate", str(learning_rate), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    print("{kind:8} {seconds:6.0f} s, rate {learning_rate:g}, seed {seed}: {bits_per_byte:.3f} bits per byte after {steps} steps".format(**result), file=sys.stderr)  # fmt: skip
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", metavar="FILE", help="text, or a table with a column text")
    parser.add_argument("--seconds", type=float, default=120, help="the budget (120)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind (1)")
    parser.add_argument("--rates", type=float, nargs="+", default=LEARNING_RATES, help="that llama is tuned over")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--measure", choices=("llama", "nanogpt", "hf_lm"), help=argparse.SUPPRESS)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.file, arguments.seconds, arguments.learning_rate, arguments.seed)))  # fmt: skip
        return 0
    file, seconds = arguments.file, arguments.seconds
    runs = [run(file, "llama", seconds, rate, 1) for rate in arguments.rates]
    best = min(runs, key=lambda result: result["bits_per_byte"])["learning_rate"]
    for seed in range(1, arguments.seeds + 1):  # in turn, so that a slow minute hits all alike
        if seed > 1:
            runs.append(run(file, "llama", seconds, best, seed))
        runs.append(run(file, "nanogpt", seconds, 1e-3, seed))
        runs += [run(file, "hf_lm", seconds / part, 3e-3, seed) for part in (1, 2, 8)]

    def median(kind: str, budget: float) -> float:
        chosen = [r for r in runs if r["kind"] == kind and r["seconds"] == budget]
        chosen = [r for r in chosen if kind != "llama" or r["learning_rate"] == best]
        return statistics.median(r["bits_per_byte"] for r in chosen)

    summary = {
        "llama": median("llama", seconds), "llama_learning_rate": best, "nanogpt": median("nanogpt", seconds),
        "hf_lm": median("hf_lm", seconds), "hf_lm_in_half_the_time": median("hf_lm", seconds / 2),
        "hf_lm_in_an_eighth": median("hf_lm", seconds / 8),
    }  # fmt: skip
    if arguments.json:
        print(json.dumps({"summary": summary, "runs": runs}))
    else:
        print("\n".join(f"{name}: {value:.4g}" for name, value in summary.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
