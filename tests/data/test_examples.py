"""Examples: whole, once, apart; what is learned of them is the same packed or alone."""

import re

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lm import HfLmForCausalLM
from hf_lm.cli import main
from hf_lm.data.collator import PackedCollator
from hf_lm.data.examples import Example, build_examples, pack_rows, show_example
from hf_lm.data.packing import IGNORED
from hf_lm.errors import InputError
from hf_lm.tokenization import train_tokenizer

TOKENIZER = train_tokenizer([], kind="byte")  # what it would say is given
EXAMPLES = Features(
    {
        "input_ids": List(Value("int32")),
        "learned": List(Value("bool")),
        "num_bytes": Value("int64"),
        "label": Value("int64"),
    }
)


def random_examples(count: int, vocab_size: int = 97, longest: int = 14, seed: int = 0) -> list[Example]:
    random = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        prompt, answer = random.integers(1, longest // 2 + 1, size=2).tolist()
        ids = random.integers(3, vocab_size, size=prompt + answer).tolist()
        examples.append(Example(ids, [False] * prompt + [True] * answer, 2 * answer))
    return examples


def as_examples(rows, tokenizer, say):
    return (Example(**row) for row in rows)


def build(examples: list[Example], **arguments):
    rows = Dataset.from_dict({name: [vars(one)[name] for one in examples] for name in EXAMPLES}, features=EXAMPLES)
    return build_examples(rows, as_examples, TOKENIZER, **{"block_size": 16, **arguments})


def parts(block: dict) -> list[tuple]:
    """The examples of a block, as (ids, labels), told apart by their positions alone."""
    starts = np.flatnonzero(np.asarray(block["position_ids"]) == 0).tolist()
    ends = [*starts[1:], len(block["input_ids"])]
    for start, end in zip(starts, ends, strict=True):
        assert list(block["position_ids"][start:end]) == list(range(end - start))
    names = ("input_ids", "labels")
    return [
        tuple(tuple(map(int, block[name][start:end])) for name in names)
        for start, end in zip(starts, ends, strict=True)
    ]


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=300), block_size=st.integers(20, 60))
@settings(max_examples=40, deadline=None)
def test_every_example_is_whole_in_exactly_one_block(lengths, block_size):
    rows = [Example([number] * size, [True] * size, size).row() for number, size in enumerate(lengths, start=1)]
    blocks = list(pack_rows(rows, block_size))
    assert all(len(block["input_ids"]) <= block_size for block in blocks)
    found = [part for block in blocks for part in parts(block)]
    assert sorted(found) == sorted(part for row in rows for part in parts(row))
    assert sum(block["num_bytes"] for block in blocks) == sum(lengths)


def test_blocks_are_full_and_their_examples_in_order():
    examples = random_examples(3000, longest=40)
    blocks = build(examples, block_size=256)
    tokens = sum(len(example.input_ids) for example in examples)
    assert tokens / (len(blocks) * 256) > 0.97
    number = {tuple(example.input_ids): index for index, example in enumerate(examples)}
    for block in blocks:
        order = [number[ids] for ids, _ in parts(block)]
        assert order == sorted(order)
    assert list(map(parts, build(examples, block_size=256))) == list(map(parts, blocks))


def loss_and_gradients(model: HfLmForCausalLM, rows, batch_size: int) -> tuple[float, float, dict]:
    """Summed over all learned tokens: in float64; as the model itself has it, in float32; gradients of the first."""
    model.zero_grad()
    collator, exact, own, rows = PackedCollator(0), 0.0, 0.0, list(rows)
    for start in range(0, len(rows), batch_size):
        batch = collator(rows[start : start + batch_size])
        with torch.no_grad():
            own += model(**batch, num_items_in_batch=1).loss.item()
        labels = batch.pop("labels")[:, 1:].flatten()
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        loss.backward()
        exact += loss.item()
    return exact, own, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("training", "tolerance"), [(False, 1e-10), (True, 1e-5)])  # norms train in float32
def test_packed_examples_have_the_loss_and_the_gradients_of_single_ones(tiny_config, attention, training, tolerance):
    torch.manual_seed(0)
    tiny_config._attn_implementation = attention
    model = HfLmForCausalLM(tiny_config).double().train(training)
    examples = random_examples(40)
    packed, single = build(examples, block_size=32), build(examples, packing=False)
    assert len(single) == 40 and len(packed) < 16
    assert sum(packed["num_bytes"]) == sum(single["num_bytes"])
    expected, _, expected_gradients = loss_and_gradients(model, single, batch_size=1)
    for rows, batch_size in ((packed, 4), (single, 8)):
        loss, own_loss, gradients = loss_and_gradients(model, rows, batch_size)
        assert loss == pytest.approx(expected, rel=tolerance / 1000)
        assert own_loss == pytest.approx(expected, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=tolerance, atol=tolerance)


def test_nothing_predicts_the_first_token_of_an_example():
    row = Example([5, 6, 7], [True, True, True], 3).row()
    assert row["labels"].tolist() == [IGNORED, 6, 7]


LONG = [
    Example(list(range(10)), [False] * 4 + [True] * 6, 12),
    Example(list(range(20)), [False] * 12 + [True] * 8, 16),  # half of its answer fits into 16
    Example(list(range(20)), [False] * 18 + [True] * 2, 4),  # nothing of its answer does
]


def test_long_examples_are_cut_or_left_out_and_counted(caplog):
    cut = build(LONG, packing=False, policy="cut", where="train")
    assert [len(ids) for ids in cut["input_ids"]] == [10, 16]
    assert list(cut["num_bytes"]) == [12, 8]
    assert "train: of 3 examples 1 were cut to block_size 16 and 1 left out." in caplog.text

    dropped = build(LONG, packing=False, policy="drop", where="other")
    assert [len(ids) for ids in dropped["input_ids"]] == [10]
    assert "other: of 3 examples 0 were cut to block_size 16 and 2 left out." in caplog.text

    with pytest.raises(InputError, match="long_examples: example 1 of train has 20 tokens, block_size is 16"):
        build(LONG, policy="error", where="train")


def test_nothing_is_said_where_everything_fits(caplog):
    build(LONG[:1])
    assert not caplog.text


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (LONG[2:], "all 1 examples are longer than block_size 16; nothing is left to learn"),
        ([], "there are no examples"),
    ],
)
def test_without_anything_to_learn_it_is_an_error(examples, message):
    with pytest.raises(InputError, match=f"train: {message}"):
        build(examples, where="train")


def test_shown_examples_tell_what_is_learned():
    tokenizer = train_tokenizer(["yes no maybe"], 300)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ask", "yes", "no")]
    first = Example(ids[0] + ids[1], [False] * len(ids[0]) + [True] * len(ids[1]), 3)
    second = Example(ids[0] + ids[2], [False] * len(ids[0]) + [True] * len(ids[2]), 2)
    block = build([first, second], block_size=64)[0]
    assert show_example(block, tokenizer, color=False) == "⟦ask⟧yes\n⟦ask⟧no"
    assert show_example(block, tokenizer, color=True) == "\x1b[2mask\x1b[22myes\n\x1b[2mask\x1b[22mno"


@pytest.mark.slow
def test_train_shows_examples_before_it_starts(tmp_path, repository, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "task: translation\nlanguage_pairs: [en-de]\nsplit_column_name: split\nvalidation_split_percentage: 0\n"
        "max_train_samples: 20\nmax_eval_samples: 2\nvocab_size: 300\nblock_size: 512\nmax_steps: 1\nsave_strategy: 'no'\n"
        "config_overrides: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}\nreport_to: none\n"
        f"train_file: {repository}/recipes/translation/data/help_en_de_zh.parquet\noutput_dir: {tmp_path}/run\n"
    )
    assert main(["train", str(recipe), "--show-examples", "2"]) == 0
    shown = capsys.readouterr().out.split("\n\n")[:2]
    assert len(shown) == 2
    for line in "\n".join(shown).splitlines():
        assert re.fullmatch(r"⟦<\|bos\|>.+<\|en-de\|>⟧.+<\|eos\|>", line)
