"""The types of weights in GGUF files, judged by llama.cpp."""

import json

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from hf_lm.cli import main
from hf_lm.cli.export import DTYPES
from hf_lm.interop.gguf_types import TYPES
from hf_lm.interop.llama_cpp import ask, greedy_request
from hf_lm.interop.parity import default_text

# number of the type of a file -> in the order of what they lose
FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7, "q5_1": 9, "q5_0": 8, "q4_1": 3, "q4_0": 2}
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}


@pytest.fixture
def source(checkpoint):
    return checkpoint(**SIZES)


def test_all_types_are_offered():
    assert set(DTYPES) == {"auto", *TYPES} and TYPES.keys() == FILE_TYPES.keys()


@pytest.mark.slow
def test_llama_cpp_runs_each_type_and_loses_as_much_as_expected(source, tokenizer, tmp_path):
    pytest.importorskip("xllamacpp")
    original = AutoModelForCausalLM.from_pretrained(source)
    ids = tokenizer(default_text())["input_ids"][:40]
    wanted = original(torch.tensor([ids])).logits[0].log_softmax(-1)
    losses = {}
    for dtype in TYPES:
        file = tmp_path / f"{dtype}.gguf"
        assert main(["export", str(source), str(file), "--dtype", dtype]) == 0
        report = json.loads((tmp_path / f"{dtype}.parity.json").read_text())
        assert report["max_logit_difference"] <= 1e-5
        requests = [greedy_request(ids, 12, tokenizer.all_special_ids)]
        for length in range(1, len(ids)):
            path, body = greedy_request(ids[:length], 1, [])
            requests.append((path, body | {"n_probs": 330}))
        written, *answers = ask(file, requests)
        assert len(written["tokens"]) == 12
        differences = []
        for logprobs, answer in zip(wanted, answers, strict=False):
            for place in answer.get("completion_probabilities", []):
                differences += [token["logprob"] - logprobs[token["id"]] for token in place["top_logprobs"]]
        losses[dtype] = torch.stack(differences).abs().mean().item()
    assert losses["float32"] < 0.01
    assert losses["float32"] < losses["float16"] < losses["bfloat16"] / 2 < losses["q8_0"] / 4
    for bits in ("5", "4"):  # two forms each: with a smallest value for each block, or without
        fewer, more = ([loss for name, loss in losses.items() if name[1] == one] for one in (bits, str(int(bits) + 1)))
        assert min(fewer) > 1.5 * max(more or [losses["q8_0"]])


@pytest.mark.parametrize("dtype", TYPES)
def test_a_file_says_its_types(dtype, source, tmp_path):
    file = tmp_path / "model.gguf"
    assert main(["export", str(source), str(file), "--dtype", dtype]) == 0
    reader = GGUFReader(file)
    assert reader.fields["general.file_type"].contents() == FILE_TYPES[dtype]
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    wanted = TYPES[dtype][0]
    assert types["blk.0.attn_q.weight"] == types["blk.1.ffn_down.weight"] == types["token_embd.weight"] == wanted
    assert types["output_norm.weight"] == types["blk.0.attn_norm.weight"] == "F32"
    assert types["output.weight"] == ("Q8_0" if dtype.startswith(("q4", "q5")) else wanted)


def test_the_embedding_of_a_tied_model_keeps_eight_bits(checkpoint, tmp_path):
    source = checkpoint(**SIZES, tie_word_embeddings=True)
    assert main(["export", str(source), str(tmp_path / "model.gguf"), "--dtype", "q4_0"]) == 0
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["token_embd.weight"] == "Q8_0" and types["blk.0.ffn_up.weight"] == "Q4_0"


def test_rows_that_do_not_fill_blocks_stay_in_float32(checkpoint, tmp_path):
    source = checkpoint(**SIZES | {"intermediate_size": 40})
    assert main(["export", str(source), str(tmp_path / "model.gguf"), "--dtype", "q5_1"]) == 0
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F32" and types["blk.0.ffn_up.weight"] == "Q5_1"


def test_other_formats_and_unknown_types_are_refused(source, tmp_path, capsys):
    assert main(["export", str(source), str(tmp_path / "native"), "--dtype", "q4_0"]) == 2
    assert "--dtype q4_0 is for --to gguf only, got --to native" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "llama-quantize model.gguf" in " ".join(capsys.readouterr().out.split())
