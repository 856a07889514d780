"""
Does each default of a new model pay? See defaults.md.

The Moby-Dick recipe, and the recipe with one choice undone: held-out bits per byte after the same number of steps,
with the same seeds, in pairs; p of a two-sided paired t-test. What is measured depends on the steps, not on the clock:
runs take one thread each and may share the machine. Finished runs are recorded at once and not repeated.
"""

import statistics
from pathlib import Path

import harness

RECIPE = Path(__file__).parents[1] / "moby_dick" / "config.yaml"
CHOICES = {  # the keys of the recipe, or fields of its configuration, that are other; None: left out
    "recipe": {},
    "SwiGLU instead of squared ReLU": {"config_overrides": {"mlp_type": "gated", "hidden_act": "silu"}},
    "GELU instead of squared ReLU": {"config_overrides": {"hidden_act": "gelu"}},
    "no norm of queries and keys": {"config_overrides": {"qk_norm": None}},
    "projections not zero at first": {"config_overrides": {"zero_init_residual": False}},
    "a soft cap of the logits": {"config_overrides": {"final_logit_softcapping": 15}},
    "embedding and head not tied": {"config_overrides": {"tie_word_embeddings": False}},
    "AdamW for all": {"muon_learning_rate": None},
    "cosine instead of constant, then linear to zero": {"lr_scheduler_type": "cosine"},
    "weight decay of 0.1": {"weight_decay": 0.1},
    "linear to zero over 60% of the steps": {"lr_decay_ratio": 0.6},
    "what recipes/addresses sets": {
        "config_overrides": {"embedding_multiplier": 11.3},
        "muon_momentum": 0.8,
        "learning_rate": 0.006,
    },
}


def measure(side: str, choice: str, steps: int, seed: int) -> dict[str, float]:
    """Bits per byte of the recipe with a choice undone."""
    import yaml

    fields = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["config_overrides"]
    changes = dict(CHOICES[choice])
    keys = {"config_overrides": fields | changes.pop("config_overrides", {}), "max_steps": steps, "seed": seed}
    keys |= {"eval_strategy": "no", "forecast": False, **changes}
    return {"bits_per_byte": harness.train_recipe(RECIPE, keys)["bits_per_byte"]}


def summarize(records: list[dict]) -> list[dict]:
    """One row per choice, the most useful first: mean bits per byte, difference to the recipe, and its p."""
    from scipy.stats import ttest_rel

    def by_seed(recipe: str, steps: int, choice: str) -> dict:
        wanted = (recipe, steps, choice)
        return {
            record["seed"]: record["numbers"]["bits_per_byte"]
            for record in records
            if (record["case"].get("state"), record["case"]["steps"], record["case"]["choice"]) == wanted
        }

    rows = {}
    for record in records:
        case = record["case"]
        key = (case.get("state"), case["steps"], case["choice"])
        if key in rows:
            continue
        runs, baseline = by_seed(*key), by_seed(*key[:2], "recipe")
        shared = sorted(set(runs) & set(baseline))
        row = {"bits_per_byte": statistics.mean(runs.values()), "seeds": len(runs)}
        if case["choice"] != "recipe" and shared:
            pairs = [(runs[seed], baseline[seed]) for seed in shared]
            row["worse_by"] = statistics.mean(own - other for own, other in pairs)
            if len(pairs) > 1:
                row["p"] = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
        rows[key] = {**record, "numbers": row}
    return sorted(rows.values(), key=lambda row: -row["numbers"].get("worse_by", float("inf")))


def build_parser():
    parser = harness.build_parser(__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of each run (400)")
    parser.add_argument(
        "--choices", nargs="+", choices=CHOICES, default=[*CHOICES], metavar="NAME", help="which (all)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (2)")
    return parser


def compare(bench: harness.Bench) -> int:
    options = bench.arguments
    choices = dict.fromkeys(["recipe", *options.choices])
    cases = [
        {"choice": choice, "steps": options.steps, "seed": seed}
        for seed in range(1, options.rounds + 1)
        for choice in choices
    ]
    for row in summarize(bench.run_all(cases, side=lambda case: "hf_lm", jobs=options.jobs, threads=1, recipe=RECIPE)):
        print(f"{row['case']['choice']:50}" + "".join(f"  {k} {v:+.3f}" for k, v in row["numbers"].items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(harness.main(build_parser(), measure, compare))
