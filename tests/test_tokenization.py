"""Any text survives the round trip; the three special tokens are distinct; mistakes are named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_lm.cli import main
from hf_lm.errors import InputError
from hf_lm.tokenization import KINDS, train_tokenizer

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


def test_the_same_text_gives_the_same_tokenizer():
    first, second = (train_tokenizer([TEXT] * 3, 300).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


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
    assert main([*command, "--overwrite"]) == 0
    assert main(["tokenizer", str(tmp_path / "none.txt"), "--output", str(tmp_path / "other")]) == 2
    assert "none.txt does not exist" in capsys.readouterr().err
