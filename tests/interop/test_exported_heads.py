"""Classifiers of tokens and texts and question answering keep their heads, into hf_lm and back to every family."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import OPTIONS, set_constants, tiny_config

from hf_lm import HfLmConfig
from hf_lm.cli import main
from hf_lm.errors import InputError
from hf_lm.interop.convert import auto_class, our_class, to_native
from hf_lm.interop.families import FAMILIES, choose_family
from hf_lm.interop.heads import HEADS

CASES = [(family, head) for head in HEADS for family in FAMILIES if FAMILIES[family].native_class(head)]
LABELS = {0: "bad", 1: "fair", 2: "good"}


def native_model(family: str, head: str, **options):
    """A tiny classifier of transformers in which every weight is drawn at random."""
    config = tiny_config(family, **OPTIONS[family][0], **options)
    config.id2label, config.label2id, config.pad_token_id = LABELS, {name: i for i, name in LABELS.items()}, 0
    torch.manual_seed(0)
    model = FAMILIES[family].native_class(head)(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.2
    set_constants(model)
    return model.eval()


def outputs(model, ids, mask) -> list[torch.Tensor]:
    output = model(input_ids=ids, attention_mask=mask)
    return [output.start_logits, output.end_logits] if hasattr(output, "start_logits") else [output.logits]


@pytest.mark.parametrize(("family", "head"), CASES)
def test_head_comes_back_bit_for_bit(family, head, tmp_path):
    native = native_model(family, head)
    native.save_pretrained(tmp_path / "source")
    ours = our_class(head).from_pretrained(tmp_path / "source").eval()
    assert ours.config.id2label == LABELS
    ids = torch.arange(2 * 9).reshape(2, 9) + 3
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    for mine, theirs in zip(outputs(ours, ids, mask), outputs(native, ids, mask), strict=True):
        kept = mask.bool() if mine.shape[:2] == ids.shape else slice(None)
        torch.testing.assert_close(mine[kept], theirs[kept], rtol=0, atol=1e-5)
    back = to_native(ours, family)
    assert type(back) is type(native) and back.config.id2label == LABELS and back.config.pad_token_id == 0
    back.save_pretrained(tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def classifier(tokenizer, tmp_path):
    """`classifier(head)`: the folder of a tiny Llama with this head."""

    def make(head: str):
        native_model("llama", head, vocab_size=330).save_pretrained(tmp_path / "source")
        tokenizer.save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    return make


@pytest.mark.parametrize("head", HEADS)
def test_import_and_export_compare_what_the_head_says(head, classifier, tmp_path, capsys):
    source = str(classifier(head))
    assert main(["import", source, str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "native")]) == 0
    lines = capsys.readouterr().out
    assert lines.count(HEADS[head].removeprefix("a ")) == 2 and "bits per byte" not in lines
    for name, kind in (("ours", "HfLm"), ("native", "Llama")):
        report = json.loads((tmp_path / name / "parity.json").read_text())
        assert report["head"] == head and report["max_logit_difference"] < 1e-4 and report["top1_agreement"] == 1.0
        model = auto_class(head).from_pretrained(tmp_path / name)
        assert type(model).__name__ == kind + head and model.config.id2label == LABELS
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "gguf"), "--to", "gguf"]) == 2
    error = capsys.readouterr().err.strip()
    assert HEADS[head] in error and f"HfLm{head}" in error and "\n" not in error
    assert not (tmp_path / "gguf").exists()


def test_checkpoint_without_its_head_is_refused(classifier, tmp_path, capsys):
    source = classifier("ForSequenceClassification")
    tensors = load_file(source / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for command in ("import", "export"):
        assert main([command, str(source), str(tmp_path / "new")]) == 2
        assert "missing: score.weight" in capsys.readouterr().err
    assert main(["import", str(source), str(tmp_path / "new"), "--allow-missing"]) == 0
    assert "random weights, not compared: score.weight" in capsys.readouterr().out


def test_class_with_an_unknown_head_is_refused(classifier, tmp_path, capsys):
    source = classifier("ForSequenceClassification")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForRewardModeling"]}))
    assert main(["import", str(source), str(tmp_path / "new")]) == 2
    assert "is a LlamaForRewardModeling" in capsys.readouterr().err


def test_family_without_such_a_class_is_passed_over():
    config = HfLmConfig(**FAMILIES["granite"].to_hf_lm(tiny_config("granite", **OPTIONS["granite"][0])))
    with pytest.raises(InputError, match="a class for a token classifier and all options"):
        choose_family(config, head="ForTokenClassification")
    with pytest.raises(InputError, match="no granite class for a token classifier"):
        choose_family(config, "granite", "ForTokenClassification")


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_onnx_file_gives_what_the_head_says(head, classifier, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    source = classifier(head)
    assert main(["export", str(source), str(tmp_path / "onnx"), "--to", "onnx", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["head"] == head and report["max_logit_difference"] < 1e-4 and report["top1_agreement"] == 1.0
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert config["id2label"] == {str(number): name for number, name in LABELS.items()}
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    ids = torch.arange(3 * 11).reshape(3, 11) + 3
    mask = torch.ones_like(ids)
    ids[0, 6:], mask[0, 6:] = 0, 0
    found = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    expected = outputs(our_class(head).from_pretrained(source).eval(), ids, mask)
    for mine, theirs in zip(map(torch.from_numpy, found), expected, strict=False):
        kept = mask.bool() if mine.shape[:2] == ids.shape else slice(None)
        torch.testing.assert_close(mine[kept], theirs[kept], rtol=0, atol=1e-4)
