"""The heads for tasks: each is found by its Auto class, learns its task, and works in the library's pipelines."""

import pytest
import torch
import transformers
from contract.harness.tested_configs import tiny_config
from helpers.models import draw_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

import hf_lm
from hf_lm.training.arguments import HfLmTrainingArguments
from hf_lm.training.trainer import HfLmTrainer

HEADS = {
    "AutoModel": hf_lm.HfLmModel,
    "AutoModelForCausalLM": hf_lm.HfLmForCausalLM,
    "AutoModelForSequenceClassification": hf_lm.HfLmForSequenceClassification,
    "AutoModelForTokenClassification": hf_lm.HfLmForTokenClassification,
    "AutoModelForQuestionAnswering": hf_lm.HfLmForQuestionAnswering,
}
WORDS = ["<pad>", "<bos>", "<eos>", "the", "whale", "is", "white", "and", "swims", "deep", "ship", "sails", "?"]


def build(head, name: str = "default", **changes):
    torch.manual_seed(0)
    return head(tiny_config(name, **{"initializer_range": 0.2, **changes})).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="?"
    )


@pytest.mark.parametrize("auto_class", HEADS)
def test_each_head_is_found_by_its_auto_class(auto_class, tmp_path):
    auto = getattr(transformers, auto_class)
    model = build(HEADS[auto_class])
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(auto.from_config(model.config)) is HEADS[auto_class]
    ids = draw_ids(2, 7)
    for one, other in zip(model(ids).to_tuple(), loaded(ids).to_tuple(), strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("head", list(HEADS.values())[2:])
def test_head_starts_from_a_language_model(head, tmp_path):
    language_model = build(hf_lm.HfLmForCausalLM)
    language_model.save_pretrained(tmp_path)
    model = head.from_pretrained(tmp_path)
    ids = draw_ids(1, 7)
    hidden_states = language_model.model(ids).last_hidden_state
    torch.testing.assert_close(model.model(ids).last_hidden_state, hidden_states)


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_is_judged_by_its_last_token_on_either_side_of_padding(side):
    model = build(hf_lm.HfLmForSequenceClassification)
    texts = [draw_ids(length, seed=length) for length in (4, 9)]
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(9 - len(text), None) if side == "left" else slice(len(text))
        ids[row, place], mask[row, place] = text, 1
    logits = model(ids, attention_mask=mask).logits
    assert logits.shape == (2, 3)
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row], model(text[None]).logits[0], rtol=1e-4, atol=1e-5)
        expected = model.score(model.model(text[None]).last_hidden_state[0, -1])
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)


def test_batch_without_a_padding_token_is_refused():
    with pytest.raises(ValueError, match="no padding token is defined"):
        build(hf_lm.HfLmForSequenceClassification, pad_token_id=None)(draw_ids(2, 5))


LABELS = {
    "single_label_classification": torch.tensor([0, 2, 1]),
    "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]]),
    "regression": torch.tensor([[0.5, 1, 2], [0, -1, 0], [3, 2, 1]]),
}


@pytest.mark.parametrize("problem", LABELS)
def test_loss_of_a_text_fits_the_problem(problem):
    model = build(hf_lm.HfLmForSequenceClassification, problem_type=problem)
    labels = LABELS[problem]
    output = model(draw_ids(3, 6), labels=labels)
    expected = {
        "single_label_classification": torch.nn.functional.cross_entropy,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
        "regression": torch.nn.functional.mse_loss,
    }[problem](output.logits, labels)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.score.weight.grad.abs().sum() > 0


def test_one_number_for_a_text_is_regression():
    model = build(hf_lm.HfLmForSequenceClassification, num_labels=1)
    output = model(draw_ids(3, 6), labels=torch.tensor([0.5, 1.0, -1.0]))
    assert output.logits.shape == (3, 1) and model.config.problem_type == "regression"
    torch.testing.assert_close(output.loss, ((output.logits[:, 0] - torch.tensor([0.5, 1.0, -1.0])) ** 2).mean())


def test_each_token_gets_a_label():
    model = build(hf_lm.HfLmForTokenClassification)
    ids = draw_ids(2, 6)
    labels = ids % 3
    labels[0, :2] = -100
    output = model(ids, labels=labels)
    assert output.logits.shape == (2, 6, 3)
    expected = torch.nn.functional.cross_entropy(output.logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(output.loss, expected)


def test_answer_has_a_start_and_an_end():
    model = build(hf_lm.HfLmForQuestionAnswering)
    ids, start, end = draw_ids(2, 8), torch.tensor([2, 0]), torch.tensor([4, 7])
    output = model(ids, start_positions=start, end_positions=end)
    assert output.start_logits.shape == output.end_logits.shape == (2, 8)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(output.start_logits, start) + cross_entropy(output.end_logits, end)) / 2
    torch.testing.assert_close(output.loss, expected)


MASKED = {
    "AutoModelForSequenceClassification": {"labels": torch.tensor([-100, -100])},
    "AutoModelForTokenClassification": {"labels": torch.full((2, 6), -100)},
    "AutoModelForQuestionAnswering": {
        "start_positions": torch.tensor([-100, 6]),
        "end_positions": torch.tensor([9, 6]),
    },
}


@pytest.mark.parametrize("name", MASKED)
def test_without_labels_loss_and_gradients_of_a_head_are_zero(name):
    model = build(HEADS[name]).train()
    loss = model(draw_ids(2, 6), **MASKED[name]).loss
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def rows_for(head) -> list[dict]:
    rows = [{"input_ids": draw_ids(8, seed=row)} for row in range(16)]
    for row in rows:
        if head is hf_lm.HfLmForSequenceClassification:
            row["labels"] = row["input_ids"][-1] % 3
        elif head is hf_lm.HfLmForTokenClassification:
            row["labels"] = row["input_ids"] % 3
        else:
            row["start_positions"], row["end_positions"] = row["input_ids"][0] % 4, row["input_ids"][1] % 8
    return rows


@pytest.mark.parametrize("head", list(HEADS.values())[2:])
def test_gradient_accumulation_does_not_multiply_the_loss(head, tmp_path):
    models = []
    for batch_size, steps in ((16, 1), (2, 8)):
        model = build(head)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=rows_for(head)).train()
        models.append(model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainer_class", [Trainer, HfLmTrainer])
def test_label_smoothing_shifts_the_labels(trainer_class, tmp_path):
    arguments_class = HfLmTrainingArguments if trainer_class is HfLmTrainer else TrainingArguments
    arguments = arguments_class(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    model, ids = build(hf_lm.HfLmForCausalLM).train(), draw_ids(2, 7)
    labels = ids.masked_fill(ids % 3 == 0, -100)
    trainer = trainer_class(model, arguments)
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": labels})
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    if trainer_class is HfLmTrainer:
        nothing = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
        loss = trainer.compute_loss(model, nothing, num_items_in_batch=torch.tensor(0))
        assert loss == 0 and not torch.autograd.grad(loss, model.lm_head.weight)[0].any()


def test_pipeline_generates_text(tokenizer):
    model = build(hf_lm.HfLmForCausalLM, vocab_size=len(WORDS))
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    outputs = generator(["the whale", "the white ship sails"], max_new_tokens=5, do_sample=False, batch_size=2)
    alone = generator("the whale", max_new_tokens=5, do_sample=False)
    assert outputs[0][0]["generated_text"] == alone[0]["generated_text"]
    assert outputs[1][0]["generated_text"].startswith("the white ship sails")


def test_pipeline_classifies_texts_and_tokens(tokenizer):
    labels = {"id2label": {0: "low", 1: "mid", 2: "high"}, "vocab_size": len(WORDS)}
    texts = ["the whale", "the white ship sails and the whale swims"]
    model = build(hf_lm.HfLmForSequenceClassification, **labels)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    for batched, text in zip(classify(texts, batch_size=2), texts, strict=True):
        assert {entry["label"] for entry in batched} == {"low", "mid", "high"}
        assert sum(entry["score"] for entry in batched) == pytest.approx(1.0, abs=1e-5)
        assert [entry["score"] for entry in batched] == pytest.approx(
            [e["score"] for e in classify([text])[0]], abs=1e-5
        )
    tagger = pipeline(
        "token-classification", model=build(hf_lm.HfLmForTokenClassification, **labels), tokenizer=tokenizer
    )
    tags = tagger(texts[1])
    assert [tag["word"] for tag in tags] == texts[1].split() and {tag["entity"] for tag in tags} <= {
        "low",
        "mid",
        "high",
    }


def test_pipeline_extracts_features(tokenizer):
    model = build(hf_lm.HfLmModel, vocab_size=len(WORDS))
    features = pipeline("feature-extraction", model=model, tokenizer=tokenizer)("the whale", return_tensors=True)
    torch.testing.assert_close(features, model(torch.tensor([[3, 4]])).last_hidden_state)


def test_pipeline_judges_labels_it_was_not_trained_on(tokenizer):
    names = ["contradiction", "neutral", "entailment"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    model = build(hf_lm.HfLmForSequenceClassification, vocab_size=len(WORDS), **labels)
    judge = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)
    output = judge("the whale swims deep", candidate_labels=["white", "deep"])
    assert sorted(output["labels"]) == ["deep", "white"] and sum(output["scores"]) == pytest.approx(1.0)
