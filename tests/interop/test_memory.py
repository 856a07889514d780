"""Reading a foreign checkpoint takes no more memory than the library's own class needs for it."""

import json
import subprocess
import sys

import pytest
import transformers


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_peak_memory_is_that_of_the_library(family, repository, tmp_path):
    config_class = transformers.CONFIG_MAPPING[family]
    sizes = {"hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12, "intermediate_size": 3072}
    sizes = {config_class.attribute_map.get(name, name): value for name, value in sizes.items()}
    config = config_class(**sizes, vocab_size=8000)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    script = repository / "recipes" / "benchmarks" / "import_speed.py"

    def peak(kind: str) -> float:
        command = [sys.executable, str(script), "--measure", json.dumps({"side": kind, "folder": str(tmp_path)})]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])["peak_mb"]

    library = peak("transformers")
    assert library > 200
    assert peak("hf_lm") <= 1.15 * library
