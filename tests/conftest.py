"""What all tests share: no network, pinned threads, tiny models."""

import os
import shutil
from functools import partial

os.environ["HF_HUB_OFFLINE"] = "1"
# A thread a process, also of the commands that tests start: with more, processes side by side wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from pathlib import Path

import pytest
import torch
from helpers.recipes import write_recipe

import hf_lm  # noqa: F401  registers the Auto classes
from hf_lm import HfLmConfig, HfLmForCausalLM

torch.set_num_threads(1)
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def moby_dick() -> str:
    """The novel, as the default recipe ships it."""
    return (REPOSITORY / "recipes" / "moby_dick" / "data" / "moby_dick.txt").read_text(encoding="utf-8")


@pytest.fixture
def tiny_config() -> HfLmConfig:
    """A model of a few thousand parameters whose output depends on every one of them."""
    return HfLmConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        zero_init_residual=False,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


@pytest.fixture
def tiny_model(tiny_config: HfLmConfig) -> HfLmForCausalLM:
    """`tiny_config` with seeded weights, in evaluation mode."""
    torch.manual_seed(0)
    return HfLmForCausalLM(tiny_config).eval()


@pytest.fixture
def recipe(tmp_path: Path, moby_dick: str):
    """`recipe(key=value, ...)` writes a small recipe with these keys changed and returns its path."""
    (tmp_path / "book.txt").write_text(moby_dick[:60_000], encoding="utf-8")
    return partial(write_recipe, tmp_path)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, moby_dick: str) -> tuple[Path, dict]:
    """Folder and metrics of one run of the small recipe, with checkpoints at steps 4, 8 and 12. Not to be changed."""
    from hf_lm.app.run import train
    from hf_lm.tasks.recipe import parse_recipe

    folder = tmp_path_factory.mktemp("small")
    (folder / "book.txt").write_text(moby_dick[:60_000], encoding="utf-8")
    return folder / "run", train(*parse_recipe(write_recipe(folder), []))


@pytest.fixture
def finished_run(recipe, small_run, tmp_path: Path) -> str:
    """A recipe in `tmp_path` whose run, in `tmp_path / "run"`, has finished: a copy of `small_run` to change."""
    shutil.copytree(small_run[0], tmp_path / "run")
    return recipe(train_file=str(small_run[0].parent / "book.txt"))
