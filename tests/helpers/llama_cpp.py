"""Stock llama.cpp, as the package xllamacpp runs it: a server in this process."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest


class LlamaCpp:
    """A model in llama.cpp, in one thread and with a cache in float32."""

    def __init__(self, file: Path, context: int = 256) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.warmup, params.cpuparams.n_threads = str(file), context, False, 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **fields) -> dict[str, Any]:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(fields).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokens(self, text: str, add_special: bool = True) -> list[int]:
        return self.post("/tokenize", content=text, add_special=add_special, parse_special=True)["tokens"]

    def prompt_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, ready for the next answer."""
        return self.tokens(self.post("/apply-template", messages=messages)["prompt"])
