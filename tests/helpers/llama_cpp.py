"""What llama.cpp's server makes of texts and conversations."""

from pathlib import Path

import pytest

from hf_lm.interop.llama_cpp import ask


def tokens(file: Path, texts: list[str]) -> list[list[int]]:
    """The tokens of prompts, special ones read as such."""
    pytest.importorskip("xllamacpp")
    bodies = [{"content": text, "add_special": True, "parse_special": True} for text in texts]
    return [answer["tokens"] for answer in ask(file, [("/tokenize", body) for body in bodies])]


def prompts(file: Path, conversations: list[list[dict[str, str]]]) -> list[list[int]]:
    """The tokens of conversations, ready for the next answer."""
    pytest.importorskip("xllamacpp")
    rendered = ask(file, [("/apply-template", {"messages": messages}) for messages in conversations])
    return tokens(file, [answer["prompt"] for answer in rendered])
