"""Blocks: nothing lost, nothing twice, documents apart, the tail kept."""

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_lm.data.collator import PackedCollator
from hf_lm.data.packing import (
    IGNORED,
    _blocks,
    encode_documents,
    evaluation_windows,
    pack_documents,
    segment_prefix,
)
from hf_lm.errors import InputError
from hf_lm.functional_hf_lm import packed_document_ids, varlen_arguments
from hf_lm.tokenization import train_tokenizer

TEXTS = ["Call me Ishmael.", "白鲸 🐋 swims", "x", "Some years ago, never mind how long precisely. " * 5]


@pytest.fixture(scope="module")
def with_prefix():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def without_prefix():
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.backend_tokenizer.post_processor = None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|eos|>")


def predicted(blocks, prefix: int) -> list[int]:
    """The labels that some position predicts, in order: what a shifted loss would see."""
    return [
        int(label)
        for block in blocks
        for label in np.asarray(block["labels"])[1:]
        if label != IGNORED
    ]  # fmt: skip


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    block_size=st.integers(3, 30),
)
@settings(max_examples=60, deadline=None)
def test_every_token_is_predicted_once_and_positions_keep_documents_apart(with_prefix, lengths, block_size):
    texts = [chr(ord("a") + number % 26) * length for number, length in enumerate(lengths)]
    rows = [{"text": text} for text in texts]
    blocks = list(_blocks(rows, with_prefix, block_size))
    tokens = [int(token) for ids, _ in encode_documents(texts, with_prefix) for token in ids]
    assert predicted(blocks, 1) == tokens
    assert sum(block["num_bytes"] for block in blocks) == sum(len(text.encode()) for text in texts)
    for number, block in enumerate(blocks):
        assert len(block["input_ids"]) <= block_size
        assert len(block["input_ids"]) >= block_size - 1 or number == len(blocks) - 1
        starts = block["position_ids"] == 0
        assert (block["input_ids"][starts] == with_prefix.bos_token_id).all()
        assert (block["labels"][starts] == IGNORED).all()
        assert ((np.diff(block["position_ids"]) == 1) | starts[1:]).all()
        # a segment never holds tokens of two documents: eos can only end one
        ends = np.flatnonzero(block["input_ids"] == with_prefix.eos_token_id)
        assert all(end + 1 == len(starts) or starts[end + 1] for end in ends)


def test_without_a_prefix_only_first_tokens_of_segments_go_unpredicted(without_prefix):
    assert segment_prefix(without_prefix) == []
    blocks = list(_blocks([{"text": text} for text in TEXTS], without_prefix, 16))
    tokens = [int(token) for ids, _ in encode_documents(TEXTS, without_prefix) for token in ids]
    assert [int(token) for block in blocks for token in block["input_ids"]] == tokens
    segments = sum(int((block["position_ids"] == 0).sum()) for block in blocks)
    assert len(predicted(blocks, 0)) == len(tokens) - segments


def test_bytes_of_tokens_add_up_for_other_kinds_of_tokenizers(with_prefix):
    word_level = Tokenizer(models.WordLevel({"[UNK]": 0, "Call": 1, "me": 2}, unk_token="[UNK]"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=word_level, unk_token="[UNK]")
    for tokenizer in (with_prefix, other):
        for text, (_, sizes) in zip(TEXTS, encode_documents(TEXTS, tokenizer), strict=True):
            assert sizes.sum() == len(text.encode())


def test_bytes_add_up_where_a_normalizer_or_a_prefix_changes_the_text(with_prefix):
    text = "cafe\u0301 and e\u0301lan, 鲸 " * 3  # NFC makes one character of two
    for changed in (normalizers.NFC(), None):
        backend = Tokenizer.from_str(with_prefix.backend_tokenizer.to_str())
        backend.normalizer = changed
        if changed is None:
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")
        ((ids, sizes),) = encode_documents([text], tokenizer)
        assert ids.tolist()[:-1] == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(sizes) == len(ids) and sizes.sum() == len(text.encode()) and (sizes >= 0).all()


def test_long_documents_have_the_tokens_of_the_whole(with_prefix, moby_dick):
    texts = ["short", moby_dick[:200_000], "鲸" * 40_000, "", moby_dick[200_000:300_000]]
    for text, (ids, sizes) in zip(texts, encode_documents(texts, with_prefix), strict=True):
        assert ids.tolist() == [*with_prefix(text, add_special_tokens=False)["input_ids"], with_prefix.eos_token_id]
        assert sizes.sum() == len(text.encode())


def test_special_tokens_in_a_text_are_read_as_the_tokenizer_says_whatever_was_called_before(with_prefix):
    text = "a<|eos|>b"
    expected = with_prefix(text, add_special_tokens=False)["input_ids"]
    with_prefix(text, split_special_tokens=True)
    ((ids, _),) = encode_documents([text], with_prefix)
    assert ids.tolist()[:-1] == expected


def test_an_interrupted_stream_goes_on_where_it_stopped(with_prefix):
    def stream():
        return pack_documents(Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(), with_prefix, 8)

    before, after = stream(), stream()
    rows = iter(before)
    for _ in range(3):
        next(rows)
    after.load_state_dict(before.state_dict())
    assert [row["input_ids"] for row in after] == [row["input_ids"] for row in rows] != []


def test_second_run_reads_the_cache_and_a_changed_input_does_not(with_prefix, monkeypatch):
    documents = Dataset.from_dict({"text": TEXTS})
    first = pack_documents(documents, with_prefix, 8)

    def fail(*arguments):
        raise AssertionError("packed again")

    monkeypatch.setattr("hf_lm.data.packing._encode_pieces", fail)
    again = pack_documents(documents, with_prefix, 8)
    assert [row["input_ids"].tolist() for row in again] == [row["input_ids"].tolist() for row in first]
    monkeypatch.undo()
    assert len(pack_documents(documents, with_prefix, 9)) != len(first)
    changed = pack_documents(Dataset.from_dict({"text": [*TEXTS, "more"]}), with_prefix, 8)
    assert len(changed) > len(first)


def test_a_stream_gives_the_same_blocks(with_prefix):
    documents = Dataset.from_dict({"text": TEXTS})
    stream = pack_documents(documents.to_iterable_dataset(), with_prefix, 8)
    assert isinstance(stream, IterableDataset)
    for one, other in zip(stream, pack_documents(documents, with_prefix, 8), strict=True):
        for key in one:
            assert np.array_equal(one[key], other[key])


def test_text_shorter_than_a_block_is_refused_with_both_numbers(with_prefix):
    documents = Dataset.from_dict({"text": ["x"]})
    with pytest.raises(InputError, match="3 tokens, less than one block of 64"):
        pack_documents(documents, with_prefix, 64)
    with pytest.raises(InputError, match="block_size: 1 "):
        pack_documents(documents, with_prefix, 1)


@given(length=st.integers(1, 60), block_size=st.integers(3, 20), data=st.data())
@settings(max_examples=60, deadline=None)
def test_windows_score_every_token_once_with_the_context_before_it(length, block_size, data):
    stride = data.draw(st.integers(1, block_size - 1))
    ids = np.arange(10, 10 + length, dtype=np.int32)
    windows = list(evaluation_windows(ids, block_size, stride, prefix=[7]))
    assert [label for window in windows for label in window["labels"] if label != IGNORED] == ids.tolist()
    for window in windows:
        assert len(window["input_ids"]) <= block_size
        assert window["input_ids"][0] == 7
        assert (np.diff(window["input_ids"][1:]) == 1).all()


def test_windows_without_overlap_are_the_packed_blocks(with_prefix):
    documents = Dataset.from_dict({"text": TEXTS[3:]})
    ids, _ = next(encode_documents(TEXTS[3:], with_prefix))
    windows = evaluation_windows(ids, 16, prefix=segment_prefix(with_prefix))
    for window, block in zip(windows, pack_documents(documents, with_prefix, 16), strict=True):
        assert np.array_equal(window["input_ids"], block["input_ids"])
        assert np.array_equal(window["labels"], block["labels"])


def test_batches_are_padded_and_need_positions_only_where_documents_meet(with_prefix):
    collate = PackedCollator(with_prefix.pad_token_id)
    plain = {"input_ids": [0, 5, 6], "labels": [-100, 5, 6], "position_ids": [0, 1, 2], "num_bytes": 2}
    packed = {"input_ids": [0, 5, 0, 6], "labels": [-100, 5, -100, 6], "position_ids": [0, 1, 0, 1], "num_bytes": 2}
    longer = {"input_ids": [0, 5, 6, 7], "labels": [-100, 5, 6, 7], "position_ids": [0, 1, 2, 3], "num_bytes": 3}
    assert set(collate([plain, plain])) == set(collate([plain, longer])) == {"input_ids", "labels"}
    batch = collate([plain, packed])
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [[0, 5, 6, with_prefix.pad_token_id], [0, 5, 0, 6]]
    assert batch["labels"].tolist() == [[-100, 5, 6, -100], [-100, 5, -100, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]


def test_padding_changes_no_loss(tiny_model):
    """What is on the right is seen by nobody, where rows are whole and where documents are packed."""
    rows = [
        {"input_ids": [0, 5, 6], "labels": [-100, 5, 6], "position_ids": [0, 1, 2]},
        {"input_ids": [0, 5, 0, 6, 7], "labels": [-100, 5, -100, 6, 7], "position_ids": [0, 1, 0, 1, 2]},
    ]
    for chosen in (rows[:1], rows[1:], rows):
        plain, filled = PackedCollator(0)(chosen), PackedCollator(3, pad_to_multiple_of=8, fill_to_rows=4)(chosen)
        assert filled["input_ids"].shape == filled["labels"].shape == (4, 8)
        assert (filled["labels"] != -100).sum() == (plain["labels"] != -100).sum()
        torch.testing.assert_close(tiny_model(**filled).loss, tiny_model(**plain).loss, rtol=1e-6, atol=1e-6)


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3))
def test_lengths_of_a_batch_are_those_found_in_its_positions(rows):
    rows = [{"input_ids": [7] * sum(sizes), "labels": [7] * sum(sizes), "position_ids": [position for size in sizes for position in range(size)]} for sizes in rows]  # fmt: skip
    batch = PackedCollator(0, lengths=True)(rows)
    if "position_ids" not in batch:
        assert set(batch) == {"input_ids", "labels"}
        return
    found = varlen_arguments(packed_document_ids(batch["position_ids"], None), None)
    given_lengths, total = batch["cu_seq_lens_q"], batch["input_ids"].numel()
    assert given_lengths[: len(found["cu_seq_lens_q"])].tolist() == found["cu_seq_lens_q"].tolist()
    assert (given_lengths[len(found["cu_seq_lens_q"]) - 1 :] == total).all() and given_lengths.dtype == torch.int32
    assert len(given_lengths).bit_count() == 1 and batch["max_length_q"] >= found["max_length_q"]
