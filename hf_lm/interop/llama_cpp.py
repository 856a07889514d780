"""
What stock llama.cpp makes of a GGUF file, through the wheel `xllamacpp` (pip install xllamacpp), where it is installed.

It runs in a process of its own: llama.cpp ends the process on some damaged files, and logs to its standard error. That
process imports nothing of this package, which would take longer than its work.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen


def is_installed() -> bool:
    return find_spec("xllamacpp") is not None


def ask(file: str | Path, requests: list[tuple[str, dict[str, Any]]], context: int = 512) -> list[dict[str, Any]]:
    """
    Load a file in float32 arithmetic and send requests to llama.cpp's own server.

    Args:
        requests: pairs of an end point, such as "/completion" or "/tokenize", and the body of the request.
        context: number of tokens of a prompt and what is generated.

    Returns:
        The answers.

    Raises:
        Failure: llama.cpp cannot read the file, or refuses a request; with its last lines.
    """
    from ..errors import Failure

    question = {"file": str(file), "requests": requests, "context": context}
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"]
    result = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        raise Failure(f"{file}: llama.cpp cannot run it: {' '.join(result.stderr.splitlines()[-3:])}")
    return json.loads(result.stdout)


def greedy_request(prompt: list[int], number: int, without: list[int]) -> tuple[str, dict[str, Any]]:
    """
    Let llama.cpp append the `number` most likely tokens to a prompt, one after the other.

    Args:
        without: tokens that are not chosen: those that end a text, above all.

    Returns:
        A request; the answer has the tokens under "tokens".
    """
    banned = [[token, False] for token in without]
    body = {"prompt": prompt, "n_predict": number, "temperature": 0, "return_tokens": True, "logit_bias": banned}
    return "/completion", body


def _answer(file: str, requests: list[tuple[str, dict[str, Any]]], context: int) -> list[dict[str, Any]]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = file, context, False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    answers = []
    for path, body in requests:
        headers = {"Content-Type": "application/json"}
        request = Request(server.listening_address + path, json.dumps(body).encode(), headers)
        with urlopen(request) as response:
            answers.append(json.load(response))
    return answers


if __name__ == "__main__":
    print(json.dumps(_answer(**json.load(sys.stdin))))
