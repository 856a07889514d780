"""Models that take 16 to 200 tokens, and bytes that are not UTF-8: an answer that fits, or one line."""

import io
import re

import pytest
from helpers.models import book_tokenizer, save_small_model

from hf_lm.cli import main
from hf_lm.generation.conversation import fit_conversation

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, str]:
    """A model for each number of tokens it takes."""
    tokenizer = book_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|en-de|>"]})
    sizes = {"num_hidden_layers": 1, "initializer_range": 0.02}
    return {
        limit: save_small_model(
            tmp_path_factory.mktemp(f"model{limit}"), tokenizer, max_position_embeddings=limit, **sizes
        )
        for limit in (16, 200)
    }


def typed(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


@pytest.mark.parametrize("limit", [16, 200])
@pytest.mark.parametrize(
    "words",
    [
        ["chat"], ["chat", "--max-new-tokens", "4"], ["generate", "--prompt", "Call"], ["translate", "the white whale " * 9],
        ["score", "whale"], ["evaluate", "--data", "BOOK"], ["inspect", "--text", "whale", "--html", "PAGE"],
    ],
    ids=lambda words: " ".join(words[:2]),
)  # fmt: skip
def test_every_command_fits_its_answer(folders, limit, words, tmp_path, moby_dick, monkeypatch, capsys):
    (tmp_path / "book.txt").write_text(moby_dick[:2000], encoding="utf-8")
    places = {"BOOK": str(tmp_path / "book.txt"), "PAGE": str(tmp_path / "page.html")}
    words = [words[0], folders[limit], *(places.get(word, word) for word in words[1:])]
    typed(monkeypatch, b"Call me.\nWhale?\nAye.\n")
    code, said = main(words), capsys.readouterr()
    assert (code, "Traceback" in said.err) == (0, False), said.err
    assert "the model takes" not in said.err or words[0] == "generate"
    if words[0] == "chat" and limit == 16:  # the second question has no room beside the first and its answer
        assert re.search("outgrows the model: its oldest 2 messages are left out", said.err)


def test_a_conversation_is_cut_to_what_fits(folders):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[16])
    turns = [
        {"role": "system", "content": "a"},
        *({"role": role, "content": "b"} for role in ("user", "assistant") * 9),
    ]
    turns = turns[:-1]
    kept, ids, room = fit_conversation(tokenizer, turns, 16, 200)
    assert kept[0]["role"] == "system" and kept[-1]["role"] == "user" and len(kept) % 2 == 0
    assert 8 <= room == 16 - len(ids)
    assert fit_conversation(tokenizer, turns, None, 200)[::2] == (turns, 200)
    long = [{"role": "user", "content": "b " * 7}]
    assert fit_conversation(tokenizer, long, 16, 200)[2] in range(1, 8)  # less than half: what is left
    with pytest.raises(ValueError, match="the message has .* tokens; the model takes 16"):
        fit_conversation(tokenizer, [{"role": "user", "content": "b " * 30}], 16, 200)


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--prompt", "a\udcff"], ["score", "a\udcff"], ["translate", "a\udcff"], ["chat", "--system", "a\udcff"],
        ["inspect", "--html", "page.html", "--text", "a\ud800"], ["translate"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_bytes_that_are_no_text_are_named(folders, words, monkeypatch, capsys):
    typed(monkeypatch, b"a\xff\n")
    assert main([words[0], folders[200], *words[1:]]) == 2
    said = capsys.readouterr().err
    assert re.search(
        r"(--prompt|SENTENCE|TEXT|--system|--text|line 1): is not UTF-8: (byte 0xff|\\ud800) after 'a'", said
    )
    assert len(said.splitlines()) == 1


def test_a_wrong_byte_does_not_end_a_conversation(folders, monkeypatch, capsys):
    typed(monkeypatch, b"a\xff\nWhale?\n")
    assert main(["chat", folders[200], "--max-new-tokens", "3"]) == 0
    said = capsys.readouterr()
    assert "the message: is not UTF-8: byte 0xff" in said.err and len(said.out) >= 2  # the second is answered
