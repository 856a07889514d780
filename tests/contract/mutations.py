"""
Break the model in one way after the other and see whether the quick model tests notice. They must, every time.

Each mutation is a line of the package, replaced in a temporary copy; the working tree is never touched.

    python tests/contract/mutations.py [NAME ...]
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# The quick ones first: the first failure ends a run.
TESTS = tuple(f"tests/test_{name}.py" for name in ("loss", "functional", "modeling", "heads"))
MODEL, FUNCTIONS = "modeling_hf_lm.py", "functional_hf_lm.py"
LOSS, GRADIENTS = "kernels/loss.py", "kernels/gradients.py"

# What is broken: (file, the line as it is, the line in its place). The line must occur exactly once.
MUTATIONS = {
    "no rotary embedding": (MODEL, "if self.use_rope:", "if False:"),
    "mask off by one": (
        FUNCTIONS,
        "    masks = create_masks_for_generate(",
        '    mask_kwargs["or_mask_function"] = lambda b, h, q, k: k <= q + 1\n    masks = create_masks_for_generate(',
    ),
    "window ignored": (
        FUNCTIONS,
        "    masks = create_masks_for_generate(",
        "    config = copy(config)\n    config.sliding_window = 10**6\n    masks = create_masks_for_generate(",
    ),
    "padding seen": (
        FUNCTIONS,
        "inputs_embeds, attention_mask, past_key_values, **mask_kwargs)",
        "inputs_embeds, None, past_key_values, **mask_kwargs)",
    ),
    "documents see each other": (
        FUNCTIONS,
        'mask_kwargs["and_mask_function"] = packed_sequence_mask_function(documents)',
        "pass",
    ),
    "cache not updated": (MODEL, "key, value = cache.update(", "cache.update("),
    "cached positions not counted": (FUNCTIONS, "device=inputs_embeds.device) + seen)", "device=inputs_embeds.device))"),
    "left padding shifts positions": (FUNCTIONS, "if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:", "if False:"),
    "wrong scale": (MODEL, "config.head_dim**-0.5", "config.hidden_size**-0.5"),
    "heads grouped in the wrong order": (
        FUNCTIONS,
        "hidden_states.repeat_interleave(repeats, dim=1)",
        "hidden_states.repeat(1, repeats, 1, 1)",
    ),
    "soft cap of the scores left out": (FUNCTIONS, "    if softcap is not None:\n        scores", "    if False:\n        scores"),
    "norm in the wrong place": (
        MODEL,
        "attention_output = self._branch(self._norm(1, attention_output))",
        "attention_output = self._norm(1, self._branch(attention_output) + hidden_states) - hidden_states",
    ),
    "norm before the MLP left out": (MODEL, "self.mlp(self._norm(2, hidden_states))))", "self.mlp(hidden_states)))"),
    "final norm left out": (MODEL, "BaseModelOutputWithPast(self.norm(hidden_states),", "BaseModelOutputWithPast(hidden_states,"),
    "untied head": (MODEL, '{"lm_head.weight": "model.embed_tokens.weight"}', "{}"),
    "loss not divided by num_items_in_batch": (FUNCTIONS, ".sum() if given is None else given", ".sum()"),
    "labels not shifted": (LOSS, "labels, (0, 1), value=ignore_index)[..., 1:]", "labels, (0, 1), value=ignore_index)[..., :-1]"),
    "loss of a head multiplied by accumulation": (MODEL, "    accepts_loss_kwargs = False\n\n    def __init__(self, config: HfLmConfig):\n        HfLmPreTrainedModel.__init__(self, config)\n        self.num_labels = config.num_labels\n        self.model = HfLmModel(config)\n        self.dropout", "    def __init__(self, config: HfLmConfig):\n        HfLmPreTrainedModel.__init__(self, config)\n        self.num_labels = config.num_labels\n        self.model = HfLmModel(config)\n        self.dropout"),
    "buffer not rebuilt on load": (MODEL, "init.constant_(module.embed_scale, module.scalar_embed_scale)", "pass"),
    "wrong gradient of the norm": (GRADIENTS, "dot, value=-1.0 / normed.shape[-1]", "dot, value=1.0 / normed.shape[-1]"),
}  # fmt: skip


def mutate(folder: Path, name: str) -> None:
    """
    Break the copy of the package in `folder`.

    Raises:
        ValueError: the line to replace is not there exactly once: the model has moved on, so must the mutation.
    """
    file, line, replacement = MUTATIONS[name]
    path = folder / "hf_lm" / file
    source = path.read_text(encoding="utf-8")
    if source.count(line) != 1:
        raise ValueError(f"{name}: {line!r} occurs {source.count(line)} times in {file}, must be once.")
    path.write_text(source.replace(line, replacement), encoding="utf-8")


def failing_tests(name: str | None) -> list[str]:
    """
    The first test that fails, if any, with the mutation called `name`; with None the model is as it is.

    What only compiles is left out: it takes longest and computes what the others do.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in ("hf_lm", "tests"):
            shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / "pyproject.toml", folder)
        if name is not None:
            mutate(folder, name)
        environment = {**os.environ, "PYTHONPATH": temporary, "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
        environment.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=no", "--maxfail=1", *TESTS]
        command += ["-k", "not compile"]
        finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if finished.returncode not in (0, 1):
            raise RuntimeError(f"The tests did not run:\n{finished.stdout[-2000:]}{finished.stderr[-2000:]}")
        return re.findall(r"^FAILED \S+::(\S+)", finished.stdout, flags=re.MULTILINE)


def main(names: list[str]) -> int:
    """Print the table and return the number of mutations that nothing noticed; 1 if the unbroken model fails."""
    if failing := failing_tests(None):
        print(f"The model fails as it is: {', '.join(failing)}")
        return 1
    missed = 0
    print(f"{'what is broken':<44}{'seconds':>8}  noticed by")
    for name in names or MUTATIONS:
        start = time.perf_counter()
        failing = failing_tests(name)
        missed += not failing
        print(
            f"{name:<44}{time.perf_counter() - start:>8.1f}  {failing[0] if failing else '-- NOTHING --'}", flush=True
        )
    print(f"{len(names or MUTATIONS)} mutations, {missed} not noticed")
    return missed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    sys.exit(main(parser.parse_args().names))
