"""
How long does converting a checkpoint of another family take, against transformers loading and saving it?
See import_speed.md.

Time and memory are counted from after the imports. `hf-lm import` also runs both models on a text: its time is the
side `hf-lm import`.
"""

import tempfile
import time
from pathlib import Path

import harness

SIDES = ("transformers", "hf_lm", "hf-lm import")
LIMITS = {"seconds": 1.3, "peak_mb": 1.15}


def measure(side: str, folder: str, **case) -> dict[str, float]:
    """Seconds and peak memory of one conversion."""
    import psutil
    from transformers import AutoModelForCausalLM

    from hf_lm import HfLmForCausalLM
    from hf_lm.hardware import peak_memory
    from hf_lm.interop.convert import import_checkpoint

    model_class = {"transformers": AutoModelForCausalLM, "hf_lm": HfLmForCausalLM}.get(side)
    with tempfile.TemporaryDirectory() as target:
        before = psutil.Process().memory_info().rss
        start = time.perf_counter()
        if model_class is None:
            import_checkpoint(folder, Path(target) / "model")
        else:
            model_class.from_pretrained(folder).save_pretrained(Path(target) / "model")
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": (peak_memory() - before) / 2**20}


def build_parser():
    parser = harness.build_parser(__doc__, rounds=5)
    parser.add_argument("folder", metavar="MODEL_FOLDER", help="a local checkpoint of another family")
    return parser


def compare(bench: harness.Bench) -> int:
    folder = Path(bench.arguments.folder).resolve()
    record = bench.compare({"model": folder.name}, SIDES, private={"folder": str(folder)}, warm_up=True)
    ratio = record["numbers"]["ratio"]["hf_lm"]
    return int(any(ratio[name]["median"] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    raise SystemExit(harness.main(build_parser(), measure, compare))
