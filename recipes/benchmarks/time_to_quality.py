"""
The best model that the same minutes buy: python recipes/benchmarks/time_to_quality.py FILE --seconds 120 [--json].

Same text, same split (the last tenth of the characters is held out), same wall clock. The clock starts before the
tokenizer is trained and stops the training; learning rates follow it, so that each run uses all of its time. Then the
held-out text is scored.

- `llama`: the library's `LlamaForCausalLM` and `Trainer`: fused AdamW, cosine, each of several learning rates and of the
  `--llama` settings; the best one counts. Unless set otherwise, tokenizer, size and batch are those of `hf_lm`.
- `nanogpt`: a plain GPT of nanoGPT's CPU configuration (characters, 4 layers, 128 wide, context 64, batch 12, AdamW 1e-3,
  cosine to a tenth), https://github.com/karpathy/nanoGPT, written with the library's GPT-2.
- `hf_lm`: the recipe of `recipes/moby_dick`, with the `--hf-lm` settings; with the whole time, half of it, and an eighth.

Settings are fields of the configuration or of the training arguments: `hidden_size=192,per_device_train_batch_size=16`.
Every run is a process of its own. `--seeds` repeats all but the tuning.

    python recipes/benchmarks/time_to_quality.py FILE --seconds 600 --by-steps RUNS.jsonl --jobs 2

Long budgets without hours of a silent machine: a few short rounds, which need it, tell how long each contender takes until
its first step and how many steps a second it makes; it then trains as many steps as the budget holds, one thread each and
several at once, however long that takes. What a run gives depends on its steps, not on the clock. Finished runs are
appended to RUNS.jsonl and not repeated, so that a stopped call goes on where it was.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

RECIPE = yaml.safe_load((Path(__file__).parents[1] / "moby_dick" / "config.yaml").read_text(encoding="utf-8"))
LEARNING_RATES = (1e-3, 2e-3, 3e-3, 6e-3)
BLOCK, WARM_UP, ROUNDS = 128, 20, 3


def cosine(share: float) -> float:
    """Down to a tenth, over the whole time."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def stable_then_linear(share: float) -> float:
    """The recipe's shape: level, then linearly to zero over the last part of the time."""
    return min(1.0, (1 - share) / RECIPE["lr_decay_ratio"])


def timed(base, start: float, seconds: float, steps: int, schedule, ends: list[float]):
    """
    A trainer class whose learning rate follows the clock, and whose training stops with it; or both follow the steps,
    where their number is given. The time of each step's end since the start is appended to `ends`.
    """
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.perf_counter() - start)
            control.should_training_stop = state.global_step == steps if steps else ends[-1] >= seconds

    class Timed(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(Clock())

        def create_scheduler(self, num_training_steps, optimizer=None):
            def rate(step: int) -> float:
                share = min(step / steps if steps else (time.perf_counter() - start) / seconds, 1.0)
                return min((step + 1) / WARM_UP, 1.0) * max(schedule(share), 0.0)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
            return self.lr_scheduler

    return Timed


def settings_of(text: str) -> dict:
    """`hidden_size=192,weight_decay=0.1` as a dict."""
    from hf_lm.training.keys import ModelArguments

    return ModelArguments(config_overrides=text).config_fields()


def measure(spec: dict) -> dict:
    """Train one contender for so many seconds, or steps if their number is not 0, in this process, and score it."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, set_seed

    from hf_lm import HfLmConfig, HfLmForCausalLM
    from hf_lm.data.arguments import DataArguments
    from hf_lm.data.collator import PackedCollator
    from hf_lm.data.documents import load_documents
    from hf_lm.data.packing import pack_documents
    from hf_lm.evaluation.text import score_documents
    from hf_lm.hardware import has_fast_bfloat16, keep_freed_memory
    from hf_lm.tokenization import train_tokenizer
    from hf_lm.training.arguments import HfLmTrainingArguments
    from hf_lm.training.device_tuning import fit_to_cpu
    from hf_lm.training.trainer import HfLmTrainer

    kind, seed, seconds, fields = spec["kind"], spec["seed"], spec["seconds"], settings_of(spec["settings"])
    set_seed(seed)
    start = time.perf_counter()
    block = 64 if kind == "nanogpt" else BLOCK
    trained = {name: fields.pop(name) for name in list(fields) if name in HfLmTrainingArguments.__dataclass_fields__}
    batch = trained.pop("per_device_train_batch_size", 12 if kind == "nanogpt" else 8)
    documents = load_documents(DataArguments(train_file=spec["file"], validation_split_percentage=10))
    texts = (row["text"] for row in documents["train"])
    tokenizer = train_tokenizer(texts, fields.get("vocab_size", 2048), "char" if kind == "nanogpt" else "bpe")
    blocks = pack_documents(documents["train"], tokenizer, block)
    shape = {"hidden_size": 128, "num_hidden_layers": 6, **fields}
    shape = {"num_attention_heads": shape["hidden_size"] // 32, "max_position_embeddings": block, **shape}
    shape |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape["vocab_size"] = len(tokenizer)
    keys = {"learning_rate": spec["learning_rate"], "weight_decay": 0.1, "optim": "adamw_torch_fused"}
    base, schedule, ends = Trainer, cosine, []
    if kind == "llama":
        width = -(-shape["hidden_size"] // 3) * 8  # two thirds of four times the width, a multiple of 8
        config = LlamaConfig(**{"intermediate_size": width, "tie_word_embeddings": True, **shape}, use_cache=False)
        model = LlamaForCausalLM(config)
    elif kind == "nanogpt":
        model = GPT2LMHeadModel(GPT2Config(
            **shape | {"num_hidden_layers": 4}, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False
        ))  # fmt: skip
    else:
        keep_freed_memory()
        model = HfLmForCausalLM(HfLmConfig(**RECIPE["config_overrides"] | shape))
        fit_to_cpu(model, batch, block, has_fast_bfloat16("cpu"))
        base, schedule = HfLmTrainer, stable_then_linear
        names = ("learning_rate", "muon_learning_rate", "muon_momentum", "weight_decay")
        keys = {name: RECIPE[name] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        arguments = HfLmTrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, max_steps=10**6, save_strategy="no", report_to="none",
            logging_strategy="no", disable_tqdm=True, seed=seed, adam_beta2=0.95, **keys | trained,
        )  # fmt: skip
        trainer = timed(base, start, seconds, spec["steps"], schedule, ends)(
            model, arguments, PackedCollator(tokenizer.pad_token_id), blocks, processing_class=tokenizer
        )
        trainer.train()
    result = {"steps": len(ends), "tokens": len(ends) * batch * block, "parameters": model.num_parameters()}
    settled = len(ends) // 4
    result["speed"] = (len(ends) - 1 - settled) / (ends[-1] - ends[settled])
    result["until_first_step"] = ends[settled] - (settled + 1) / result["speed"]
    if spec["score"]:
        held_out = (row["text"] for row in documents["validation"])
        scores = score_documents(model.eval(), tokenizer, held_out, block, batch_size=32).summary()
        result["bits_per_byte"] = scores["bits_per_byte"]
        result["interval"] = [scores["bits_per_byte_low"], scores["bits_per_byte_high"]]
    return result


def run(spec: dict, steps: int = 0, score: bool = True) -> dict:
    """`measure` in a new process; with one thread if it counts steps."""
    command = [sys.executable, __file__, "--measure", json.dumps({**spec, "steps": steps, "score": score})]
    threads = {"OMP_NUM_THREADS": "1"} if steps else {}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode:
        raise SystemExit(done.stderr)
    result = {**spec, "file": Path(spec["file"]).name, **json.loads(done.stdout.splitlines()[-1])}
    if score:
        print("{kind:8} {seconds:6.0f} s, rate {learning_rate:g}, seed {seed}, {settings}: {bits_per_byte:.3f} bits per byte after {steps} steps".format(**result), file=sys.stderr)  # fmt: skip
    return result


class BySteps:
    """`run`, as long as speeds measured before say; what the file holds is taken from there."""

    def __init__(self, path: str, first: list[dict]):
        self.path, lines = (
            Path(path),
            Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else [],
        )
        self.lines = [json.loads(line) for line in lines]
        for _ in range(ROUNDS):  # in turn, so that a slow minute hits all alike
            for spec in first:
                if len(self.speeds(spec)) < ROUNDS:
                    self.keep(run({**spec, "seconds": 30.0}, score=False))

    def keep(self, line: dict) -> dict:
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def known(self, spec: dict, *names: str) -> list[dict]:
        wanted = {name: spec[name] for name in ("kind", "settings", *names)} | {"file": Path(spec["file"]).name}
        return [line for line in self.lines if wanted.items() <= line.items()]

    def speeds(self, spec: dict) -> list[dict]:
        return [line for line in self.known(spec) if "bits_per_byte" not in line]

    def __call__(self, spec: dict) -> dict:
        runs = [line for line in self.known(spec, "seconds", "learning_rate", "seed") if "bits_per_byte" in line]
        if runs:
            return runs[0]
        rows = self.speeds(spec)
        speed, wait = (statistics.median(row[name] for row in rows) for name in ("speed", "until_first_step"))
        return self.keep(run(spec, steps=round((spec["seconds"] - wait) * speed)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", nargs="?", metavar="FILE", help="text, or a table with a column text")
    parser.add_argument("--seconds", type=float, default=120, help="the budget (120)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind (1)")
    parser.add_argument("--rates", type=float, nargs="+", default=LEARNING_RATES, help="that llama is tuned over")
    parser.add_argument("--llama", nargs="+", default=[""], metavar="SETTINGS", help="that llama is tuned over")
    parser.add_argument("--hf-lm", default="", metavar="SETTINGS", help="of hf_lm")
    parser.add_argument("--by-steps", metavar="RUNS.jsonl", help="train as many steps as the budget holds; see above")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, with --by-steps (1)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return 0
    if not arguments.file:
        parser.error("FILE is missing")
    seconds, seeds = arguments.seconds, range(1, arguments.seeds + 1)

    def spec(kind: str, settings: str = "", rate: float = 1e-3, seed: int = 1, part: int = 1) -> dict:
        return {"file": arguments.file, "kind": kind, "settings": settings, "learning_rate": rate, "seed": seed,
                "seconds": seconds / part}  # fmt: skip

    def ours(seed: int = 1, part: int = 1) -> dict:
        return spec("hf_lm", arguments.hf_lm, RECIPE["learning_rate"], seed, part)

    one, at_once = run, 1
    if arguments.by_steps:
        first = [spec("llama", settings) for settings in arguments.llama]
        one = BySteps(arguments.by_steps, [*first, spec("nanogpt"), ours()])
        at_once = arguments.jobs
    with ThreadPoolExecutor(at_once) as pool:
        jobs = [spec("llama", settings, rate) for settings in arguments.llama for rate in arguments.rates]
        tuning = list(pool.map(one, jobs))
        best = min(tuning, key=lambda line: line["bits_per_byte"])
        jobs = []
        for seed in seeds:  # in turn, so that a slow minute hits all alike
            jobs += [spec("llama", best["settings"], best["learning_rate"], seed)] if seed > 1 else []
            jobs += [spec("nanogpt", seed=seed)]
            jobs += [ours(seed, part) for part in (1, 2, 8)]
        runs = [best, *pool.map(one, jobs)]

    def median(kind: str, part: int = 1) -> float:
        chosen = [run for run in runs if run["kind"] == kind and run["seconds"] == seconds / part]
        return statistics.median(run["bits_per_byte"] for run in chosen)

    summary = {
        "llama": median("llama"), "llama_settings": best["settings"], "llama_learning_rate": best["learning_rate"],
        "nanogpt": median("nanogpt"), "hf_lm": median("hf_lm"), "hf_lm_in_half_the_time": median("hf_lm", 2),
        "hf_lm_in_an_eighth": median("hf_lm", 8),
    }  # fmt: skip
    if arguments.json:
        print(json.dumps({"summary": summary, "runs": tuning + runs[1:]}))
    else:
        print("\n".join(f"{name}: {value}" for name, value in summary.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
