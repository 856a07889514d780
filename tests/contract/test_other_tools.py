"""Tools that trace a model or take its gradients apart get from ours what they get from Llama."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = ["llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "loguru", "nvidia-ml-py", "opacus==1.6.0"]


@pytest.mark.slow
def test_llm_compressor_and_opacus_are_exact(repository, tmp_path):
    """Installed aside and without what they ask for, which is older than what is here."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), *TOOLS]
    subprocess.run(install, check=True)
    path = os.pathsep.join((str(tmp_path), str(repository)))
    command = [sys.executable, str(Path(__file__).with_name("other_tools.py"))]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 8 and max(errors.values()) < 1e-5, errors
