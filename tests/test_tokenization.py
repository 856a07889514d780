"""Any text survives the round trip; the three special tokens are distinct; mistakes are named."""

import json
import os
import random
import string
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from hf_lm import tokenization
from hf_lm.cli import main
from hf_lm.errors import InputError
from hf_lm.tokenization import KINDS, cut, extend_tokenizer, may_be_cut, train_tokenizer

TEXT = "Call me Ishmael. 白鲸在海里。 Some years ago, never mind how long precisely! 🐋 "
# Every code point that UTF-8 can hold: surrogates cannot be written at all.
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT * 20], vocab_size=400, kind=request.param).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(text=ANY_TEXT)
@settings(max_examples=150, deadline=None)
def test_any_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["", " ", "  two  spaces\n\n\ttab\r\n", "\x00\x01\x1f\x7f", "数学 ∀x∈ℝ", "👩‍👩‍👧‍👦", "a ." ])  # fmt: skip
def test_awkward_texts_survive_with_special_tokens_around(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_special_tokens_are_distinct_and_bos_starts_a_text(tokenizer):
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len(set(special)) == 3 and None not in special
    ids = tokenizer("word")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] != tokenizer.eos_token_id
    assert max(tokenizer(TEXT)["input_ids"]) < len(tokenizer)


def test_kinds_differ_as_their_names_say():
    lengths = {
        kind: len(train_tokenizer([TEXT * 20], 400, kind)(TEXT, add_special_tokens=False)["input_ids"])
        for kind in KINDS
    }
    assert lengths["byte"] == len(TEXT.encode())
    assert lengths["char"] == len(TEXT)
    assert lengths["bpe"] < lengths["char"]
    assert len(train_tokenizer([TEXT], 400, "byte")) == 259


@pytest.mark.slow
def test_the_same_text_gives_the_same_tokenizer_with_any_number_of_threads(tmp_path):
    program = """
import sys
from hf_lm.tokenization import KINDS, train_tokenizer
for kind in KINDS:
    print(train_tokenizer(open(sys.argv[1], encoding="utf-8"), 600, kind).backend_tokenizer.to_str())
"""
    lines = [f"{TEXT} {number} {chr(0x4E00 + number)}\n" for number in range(2000)]
    (tmp_path / "text.txt").write_text("".join(lines), encoding="utf-8")
    results = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "text.txt")],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"},
            capture_output=True,
            check=True,
        ).stdout
        for threads in ("1", "3")
    ]
    assert results[0] == results[1] and results[0]


def test_a_token_of_the_char_kind_is_within_one_character():
    tokenizer = train_tokenizer([TEXT * 20], 400, "char").backend_tokenizer
    text = TEXT + "龍🐳ö"
    alone = [token for character in text for token in tokenizer.encode(character, add_special_tokens=False).ids]
    assert tokenizer.encode(text, add_special_tokens=False).ids == alone


@given(text=st.text(alphabet=st.sampled_from("ab1'. \n\t\r\x0b\x1c\x85\xa0\u3000鲸é_"), max_size=80))
@settings(max_examples=300, deadline=None)
def test_pieces_of_a_text_have_the_tokens_of_the_whole(tokenizer, text):
    assert may_be_cut(tokenizer)
    backend, longest = tokenizer.backend_tokenizer, tokenization.PIECE
    tokenization.PIECE = 3
    try:
        pieces = list(cut(text))
    finally:
        tokenization.PIECE = longest
    assert "".join(pieces) == text
    ids = [index for piece in pieces for index in backend.encode(piece, add_special_tokens=False).ids]
    assert ids == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.slow
@pytest.mark.parametrize("letters", ["ACGT", string.ascii_letters + string.digits + "+/", "春眠不觉晓处闻啼鸟", " "])
def test_text_without_white_space_is_learned_and_read_in_linear_time(letters):
    text = "".join(random.Random(0).choices(letters, k=1_000_000 // len(letters[0].encode())))
    start = time.process_time()
    tokenizer = train_tokenizer([text], 400)
    assert time.process_time() - start < 10
    assert max(map(len, tokenizer.get_vocab())) <= tokenization.LONGEST_WORD
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text and time.process_time() - start < 20


def test_words_up_to_the_bound_are_learned_whole(monkeypatch):
    text = "ab" * (tokenization.LONGEST_WORD // 2 - 1)
    tokens = train_tokenizer([f"{text} {text}"], 300)(f"{text} {text}", add_special_tokens=False).tokens()
    assert tokens == [text, f"\u0120{text}"]
    monkeypatch.setattr(tokenization, "UNSPACED", 3 * tokenization.PIECE)
    pieces = list(tokenization._to_learn_from(["A" * 2 * tokenization.PIECE] * 2 + ["C" * 3 * tokenization.PIECE] * 2))
    assert [piece[0] for piece in pieces] == ["A", "A", "C"]


def test_text_without_white_space_is_cut_all_the_same(monkeypatch):
    monkeypatch.setattr(tokenization, "PIECE", 4)
    monkeypatch.setattr(tokenization, "LONGEST_PIECE", 10)
    assert list(cut("abcdefghijklmn opq")) == ["abcdefghij", "klmn", " opq"]
    assert list(cut("a" * 25)) == ["a" * 10, "a" * 10, "a" * 5]


def test_tokenizers_that_look_across_white_space_are_not_given_pieces():
    def variant(**changes):
        tokenizer = train_tokenizer([TEXT], 300)
        for name, value in changes.items():
            setattr(tokenizer.backend_tokenizer, name, value)
        return tokenizer

    assert may_be_cut(variant())
    assert not may_be_cut(variant(normalizer=normalizers.NFC()))
    assert not may_be_cut(variant(pre_tokenizer=pre_tokenizers.Whitespace()))
    assert not may_be_cut(variant(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)))
    assert not may_be_cut(variant(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)))
    for token in (AddedToken("of the"), AddedToken("<x>", rstrip=True)):
        tokenizer = variant()
        tokenizer.add_tokens([token])
        assert not may_be_cut(tokenizer)


def test_an_extended_tokenizer_keeps_its_tokens_and_learns_a_language(moby_dick, tmp_path):
    base = train_tokenizer([moby_dick[:100_000]], vocab_size=600)
    poem = "春风得意马蹄疾，一日看尽长安花。\n" * 3 + "春眠不觉晓，处处闻啼鸟。\n" * 3
    extended, stands_for = extend_tokenizer(base, [poem], 40)
    assert len(extended) == len(base) + len(stands_for) == 640
    english = moby_dick[100_000:120_000]
    assert extended(english).input_ids == base(english).input_ids
    assert len(extended(poem).input_ids) < len(base(poem).input_ids) / 2
    extended.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = loaded(poem, add_special_tokens=False).input_ids
    assert loaded(poem).input_ids == extended(poem).input_ids and loaded.decode(ids) == poem
    replaced = [old for token in ids for old in (stands_for[token - 600] if token >= 600 else [token])]
    assert replaced == base(poem, add_special_tokens=False).input_ids
    assert loaded.eos_token_id == base.eos_token_id
    with pytest.raises(InputError, match="at least 1"):
        extend_tokenizer(base, [poem], 0)


@pytest.mark.parametrize(
    ("arguments", "message"), [((258, "bpe"), "258.*259"), ((0, "char"), "vocab_size"), ((400, "word"), "bpe, char")]
)
def test_impossible_vocabularies_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        train_tokenizer([TEXT], *arguments)


def test_command_trains_saves_and_protects(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    command = ["tokenizer", str(tmp_path / "text.txt"), "--vocab-size", "300", "--output", str(tmp_path / "out")]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["vocab_size"] == 300 == len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert result["bytes"] == len((TEXT * 20).encode())
    assert main(command) == 2
    assert "already holds a tokenizer" in capsys.readouterr().err
    (tmp_path / "out" / "notes.txt").write_text("stays")
    assert main([*command, "--overwrite"]) == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "stays"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]
    assert main(["tokenizer", str(tmp_path / "text.txt"), "--output", str(tmp_path / "text.txt")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["tokenizer", str(tmp_path / "none.txt"), "--output", str(tmp_path / "other")]) == 2
    assert "none.txt does not exist" in capsys.readouterr().err
