"""
Which model do the same minutes buy, against a tuned Llama and nanoGPT? See time_to_quality.md.

Same text, same split (the last tenth of the characters is held out), same wall clock. The clock starts before the
tokenizer is trained and stops the training; learning rates follow it, so that each run uses all of its time. Then the
held-out text is scored.

- `llama`: `LlamaForCausalLM` and `Trainer` of transformers: fused AdamW, cosine, each of several learning rates and of
  the `--llama` settings; the best one counts. Unless set otherwise, tokenizer, size and batch are those of `hf_lm`.
- `nanogpt`: a plain GPT of nanoGPT's CPU configuration (characters, 4 layers, 128 wide, context 64, batch 12, AdamW
  1e-3, cosine to a tenth), https://github.com/karpathy/nanoGPT, written with the GPT-2 of transformers.
- `hf_lm`: the recipe of `recipes/moby_dick`, with the `--hf-lm` settings; with the whole time, half of it, and an
  eighth.

Settings are fields of the configuration or of the training arguments:
`hidden_size=192,per_device_train_batch_size=16`.

`--by-steps` is for long budgets without hours of an idle machine: a few short rounds, which need one, measure how long
each contender takes until its first step and how many steps a second it makes; it then trains as many steps as the
budget holds, one thread each and `--jobs` at once, however long that takes. What a run gives depends on its steps, not
on the clock.
"""

import math
import statistics
import tempfile
import time
from pathlib import Path

import harness

RECIPE = Path(__file__).parents[1] / "moby_dick" / "config.yaml"
LEARNING_RATES = (1e-3, 2e-3, 3e-3, 6e-3)
BLOCK, WARM_UP, SPEED_SECONDS = 128, 20, 30.0
SHARES = {"whole": 1, "half": 2, "eighth": 8}


def recipe() -> dict:
    import yaml

    return yaml.safe_load(RECIPE.read_text(encoding="utf-8"))


def cosine(share: float) -> float:
    """Down to a tenth, over the whole time."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def stable_then_linear(share: float) -> float:
    """The recipe's shape: level, then linearly to zero over the last part of the time."""
    return min(1.0, (1 - share) / recipe()["lr_decay_ratio"])


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


def build_model(side: str, fields: dict, block: int, batch: int):
    """The contender's model: `fields` has its size, vocabulary and token ids."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from hf_lm import HfLmConfig, HfLmForCausalLM
    from hf_lm.hardware import has_fast_bfloat16, keep_freed_memory
    from hf_lm.training.device_tuning import fit_to_cpu

    if side == "llama":
        width = -(-fields["hidden_size"] // 3) * 8  # two thirds of four times the width, a multiple of 8
        shape = {"intermediate_size": width, "tie_word_embeddings": True, **fields}
        return LlamaForCausalLM(LlamaConfig(**shape, use_cache=False))
    if side == "nanogpt":
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(**fields | no_dropout | {"num_hidden_layers": 4}, use_cache=False))
    keep_freed_memory()
    model = HfLmForCausalLM(HfLmConfig(**recipe()["config_overrides"] | fields))
    fit_to_cpu(model, batch, block, has_fast_bfloat16("cpu"))
    return model


def measure(side: str, path: str, settings: str, seed: int, learning_rate: float = 1e-3, seconds: float = 0.0,
            steps: int = 0, score: bool = True, **labels) -> dict:  # fmt: skip
    """Train one contender for `seconds`, or for `steps` if their number is not 0, and score it."""
    from transformers import Trainer, set_seed

    from hf_lm.data.arguments import DataArguments
    from hf_lm.data.collator import PackedCollator
    from hf_lm.data.documents import load_documents
    from hf_lm.data.packing import pack_documents
    from hf_lm.evaluation.text import score_documents
    from hf_lm.tokenization import train_tokenizer
    from hf_lm.training.arguments import HfLmTrainingArguments
    from hf_lm.training.trainer import HfLmTrainer

    fields, own = settings_of(settings), recipe()
    set_seed(seed)
    start = time.perf_counter()
    block = 64 if side == "nanogpt" else BLOCK
    trained = {name: fields.pop(name) for name in list(fields) if name in HfLmTrainingArguments.__dataclass_fields__}
    batch = trained.pop("per_device_train_batch_size", 12 if side == "nanogpt" else 8)
    documents = load_documents(DataArguments(train_file=path, validation_split_percentage=10))
    texts = (row["text"] for row in documents["train"])
    tokenizer = train_tokenizer(texts, fields.get("vocab_size", 2048), "char" if side == "nanogpt" else "bpe")
    blocks = pack_documents(documents["train"], tokenizer, block)
    shape = {"hidden_size": 128, "num_hidden_layers": 6, **fields}
    shape = {"num_attention_heads": shape["hidden_size"] // 32, "max_position_embeddings": block, **shape}
    shape |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = build_model(side, shape | {"vocab_size": len(tokenizer)}, block, batch)
    keys = {"learning_rate": learning_rate, "weight_decay": 0.1, "optim": "adamw_torch_fused"}
    base, schedule, ends = Trainer, cosine, []
    if side == "hf_lm":
        base, schedule = HfLmTrainer, stable_then_linear
        keys = {name: own[name] for name in ("learning_rate", "muon_learning_rate", "muon_momentum", "weight_decay")}
    with tempfile.TemporaryDirectory() as folder:
        arguments = HfLmTrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, max_steps=10**6, save_strategy="no",
            report_to="none", logging_strategy="no", disable_tqdm=True, seed=seed, adam_beta2=0.95, **keys | trained,
        )  # fmt: skip
        trainer = timed(base, start, seconds, steps, schedule, ends)(
            model, arguments, PackedCollator(tokenizer.pad_token_id), blocks, processing_class=tokenizer
        )
        trainer.train()
    result = {"steps": len(ends), "tokens": len(ends) * batch * block, "parameters": model.num_parameters()}
    settled = len(ends) // 4
    if len(ends) - settled < 2:
        raise SystemExit(f"{side}: {len(ends)} steps are too few to tell its speed; give it more seconds")
    result["steps_per_second"] = (len(ends) - 1 - settled) / (ends[-1] - ends[settled])
    result["until_first_step"] = ends[settled] - (settled + 1) / result["steps_per_second"]
    if score:
        held_out = (row["text"] for row in documents["validation"])
        scores = score_documents(model.eval(), tokenizer, held_out, block, batch_size=32).summary()
        names = ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high")
        result |= {name: scores[name] for name in names}
    return result


def describe(settings: str) -> str:
    """Settings in words, for the tables."""
    fields = dict(part.partition("=")[::2] for part in settings.split(",") if part)
    words = {
        "hidden_size": "{} wide", "num_hidden_layers": "{} layers", "vocab_size": "vocabulary {}",
        "per_device_train_batch_size": "batch {}", "residual_dropout": "dropout {}",
        "embedding_multiplier": "settings of the addresses", "final_logit_softcapping": "no soft cap",
    }  # fmt: skip
    return ", ".join(text.format(fields[name]) for name, text in words.items() if name in fields) or "as in the recipe"


def summarize(records: list[dict]) -> list[dict]:
    """
    One row per machine, text, budget and seed: the lowest bits per byte of each contender, and how far hf_lm is ahead
    of `llama` in half the time and of `nanogpt` in an eighth (bits per byte, positive is better).
    """
    rows = {}
    for record in records:
        case = record["case"]
        if case["what"] == "quality":
            key = (record["machine"], case["text"], case["budget"], record["seed"])
            rows.setdefault(key, []).append(record)
    result = []
    for _, found in sorted(rows.items()):
        numbers = {"seed": found[0]["seed"]}
        for name in ("llama", "nanogpt", *SHARES):
            contender, share = ("hf_lm", name) if name in SHARES else (name, "whole")
            own = [run for run in found if (run["case"]["contender"], run["case"]["share"]) == (contender, share)]
            if own:
                best = min(own, key=lambda run: run["numbers"]["bits_per_byte"])
                numbers |= {
                    name: best["numbers"]["bits_per_byte"],
                    f"{name}_model": describe(best["case"]["settings"]),
                }
                numbers[f"{name}_rate"] = best["case"]["learning_rate"]
        for ahead, own, other in (("half_ahead", "half", "llama"), ("eighth_ahead", "eighth", "nanogpt")):
            if own in numbers and other in numbers:
                numbers[ahead] = numbers[other] - numbers[own]
        result.append({**found[-1], "raw": all(run["raw"] for run in found), "numbers": numbers})
    return result


def tuning(records: list[dict]) -> list[dict]:
    """One row per machine, text, budget and settings of `llama`: bits per byte at each learning rate, and steps."""
    rows = {}
    for record in records:
        case = record["case"]
        if case["contender"] != "llama" or record["seed"] != 1:
            continue
        key = (record["machine"], case["text"], case["settings"])
        if case["what"] == "quality":
            numbers = {"model": describe(case["settings"]), "rates": {}}
            row = rows.setdefault((*key, case["budget"]), {**record, "numbers": numbers})
            rates, rate, bits = (
                row["numbers"]["rates"],
                f"{case['learning_rate']:g}",
                record["numbers"]["bits_per_byte"],
            )
            rates[rate] = min(bits, rates.get(rate, bits))
            row["numbers"]["counted"] = "the clock" if case.get("by") == "clock" else "steps"
            if steps := record["numbers"].get("steps"):
                row["numbers"]["steps"] = steps
    return [row for _, row in sorted(rows.items(), key=lambda item: (item[0][1], item[0][3], item[0][2]))]


def own_runs(records: list[dict]) -> list[dict]:
    """One row per run of hf_lm, sorted by text, budget and share of the time."""
    runs = []
    for record in records:
        case = record["case"]
        if case["what"] == "quality" and case["contender"] == "hf_lm":
            runs.append({**record, "numbers": {**record["numbers"], "model": describe(case["settings"])}})
    order = list(SHARES)
    return sorted(
        runs, key=lambda run: (run["case"]["text"], run["case"]["budget"], order.index(run["case"]["share"]))
    )


def speeds(records: list[dict]) -> list[dict]:
    """One row per machine, text, contender and settings: the median of the steps a second of its rounds."""
    rows = {}
    for record in records:
        case = record["case"]
        if case["what"] == "speed":
            key = (record["machine"], case["text"], case["contender"], case["settings"], case.get("state", ""))
            rows.setdefault(key, []).append(record)
    return [
        {
            **found[-1],
            "numbers": {
                "model": describe(found[0]["case"]["settings"]),
                "steps_per_second": statistics.median(run["numbers"]["steps_per_second"] for run in found),
                "rounds": found[0].get("repeats") or len(found),
            },
        }
        for _, found in sorted(rows.items())
    ]


def build_parser():
    parser = harness.build_parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="text, or a table with a column text")
    parser.add_argument("--seconds", type=float, default=120, help="the budget (120)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each contender but the tuning (1)")
    parser.add_argument("--rates", type=float, nargs="+", default=LEARNING_RATES, help="that llama is tuned over")
    parser.add_argument("--llama", nargs="+", default=[""], metavar="SETTINGS", help="that llama is tuned over")
    parser.add_argument("--hf-lm", default="", metavar="SETTINGS", help="of hf_lm")
    parser.add_argument("--by-steps", action="store_true", help="train as many steps as the budget holds; see above")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, with --by-steps (1)")
    return parser


def contender_of(case: dict) -> str:
    return case["contender"]


class Contest:
    """The runs of one call: by the clock, or by steps whose number speeds measured before tell."""

    def __init__(self, bench: harness.Bench):
        self.bench, self.options = bench, bench.arguments
        self.path = str(Path(self.options.file).resolve())
        self.labels = {"text": Path(self.path).name, "by": "steps" if self.options.by_steps else "clock"}
        self.steps_of: dict[tuple, tuple[float, float]] = {}  # of a contender and settings: steps a second, wait

    def case(
        self, contender: str, settings: str = "", rate: float = 1e-3, seed: int = 1, share: str = "whole"
    ) -> dict:
        return {**self.labels, "what": "quality", "contender": contender, "settings": settings, "learning_rate": rate,
                "budget": self.options.seconds, "share": share, "seed": seed}  # fmt: skip

    def measure_speeds(self, contenders: list[tuple[str, str]]) -> None:
        """Some rounds of each contender, in turn, so that a slow minute hits all alike."""
        found: dict[tuple, list[dict]] = {}
        seconds = min(SPEED_SECONDS, self.options.seconds)
        for number in range(self.options.rounds):
            for contender, settings in contenders:
                case = {"text": self.labels["text"], "what": "speed", "contender": contender, "settings": settings}
                case |= {"round": number, "seed": 1}
                private = {"path": self.path, "seconds": seconds, "score": False}
                made = self.bench.run_all([case], side=contender_of, recipe=RECIPE, private=lambda _, p=private: p)
                found.setdefault((contender, settings), []).append(made[0]["numbers"])
        for key, rows in found.items():
            self.steps_of[key] = tuple(
                statistics.median(row[name] for row in rows) for name in ("steps_per_second", "until_first_step")
            )

    def private(self, case: dict) -> dict:
        seconds = case["budget"] / SHARES[case["share"]]
        if not self.options.by_steps:
            return {"path": self.path, "seconds": seconds}
        speed, wait = self.steps_of[case["contender"], case["settings"]]
        return {"path": self.path, "steps": max(1, round((seconds - wait) * speed))}

    def run(self, cases: list[dict]) -> list[dict]:
        """Run the cases in turn, or several at once where steps count."""
        by_steps = self.options.by_steps
        return self.bench.run_all(
            cases, side=contender_of, recipe=RECIPE, private=self.private,
            jobs=self.options.jobs if by_steps else 1, threads=1 if by_steps else 0,
        )  # fmt: skip


def compare(bench: harness.Bench) -> int:
    options, contest = bench.arguments, Contest(bench)
    if options.by_steps:
        first = [("llama", settings) for settings in options.llama]
        contest.measure_speeds([*first, ("nanogpt", ""), ("hf_lm", options.hf_lm)])
    rates = [(settings, rate) for settings in options.llama for rate in options.rates]
    tuned = contest.run([contest.case("llama", settings, rate) for settings, rate in rates])
    best = min(tuned, key=lambda record: record["numbers"]["bits_per_byte"])["case"]
    own_rate, cases = recipe()["learning_rate"], []
    for seed in range(1, options.seeds + 1):
        cases += [contest.case("llama", best["settings"], best["learning_rate"], seed)] if seed > 1 else []
        cases += [contest.case("nanogpt", seed=seed)]
        cases += [contest.case("hf_lm", options.hf_lm, own_rate, seed, share) for share in SHARES]
    for row in summarize([*tuned, *contest.run(cases)]):
        print("\n".join(f"{name}: {value}" for name, value in row["numbers"].items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(harness.main(build_parser(), measure, compare))
