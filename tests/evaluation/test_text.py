"""Scores of texts and sentences: the same however they are computed."""

import math

import pytest
import torch
from helpers.models import book_tokenizer

from hf_lm.data.packing import encode_documents
from hf_lm.errors import InputError
from hf_lm.evaluation.sentences import score_sentences
from hf_lm.evaluation.text import score_documents
from hf_lm.tokenization import train_tokenizer


def test_numbers_do_not_depend_on_the_batch_size(model, tokenizer, moby_dick):
    texts = [moby_dick[:700], moby_dick[1000:1100], "x", moby_dick[2000:2500]]
    scores = [score_documents(model, tokenizer, texts, batch_size=size) for size in (1, 3, 8)]
    for score in scores[1:]:
        assert math.isclose(score.loss, scores[0].loss, rel_tol=1e-6)
        assert score.tokens == scores[0].tokens
    assert sum(scores[0].num_bytes) == sum(len(text.encode()) for text in texts)
    assert sum(scores[0].tokens) == sum(len(ids) for ids, _ in encode_documents(texts, tokenizer))


def test_loss_is_the_plain_sum_over_one_forward(model, tokenizer):
    text = "Call me Ishmael."
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    expected = model(ids, labels=ids).loss.item()
    score = score_documents(model, tokenizer, [text])
    assert math.isclose(score.loss, expected, rel_tol=1e-5)
    assert math.isclose(score.perplexity, math.exp(expected), rel_tol=1e-5)
    bits = expected * (ids.shape[1] - 1) / math.log(2) / len(text)
    assert math.isclose(score.bits_per_byte, bits, rel_tol=1e-5)


def test_a_stride_scores_the_same_tokens_with_more_context(model, tokenizer, moby_dick):
    text = [moby_dick[:3000]]
    plain, strided = (score_documents(model, tokenizer, text, 64, stride) for stride in (None, 16))
    assert sum(plain.tokens) == sum(strided.tokens) and sum(plain.num_bytes) == sum(strided.num_bytes)
    assert plain.loss != strided.loss
    # with a stride of one, each token is scored by a forward of its own, after all that fits before it
    text, log_probability = moby_dick[:200], 0.0
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    for place, token in enumerate(ids):
        window = torch.tensor([[tokenizer.bos_token_id, *ids[max(0, place - 62) : place]]])
        with torch.no_grad():
            log_probability += model(window).logits[0, -1].log_softmax(-1)[token].item()
    assert len(ids) > 80
    single = score_documents(model, tokenizer, [text], 64, 1)
    assert math.isclose(single.loss, -log_probability / len(ids), rel_tol=1e-5)


def test_tokenizers_without_a_prefix_are_scored_from_their_eos(model, tokenizer, moby_dick):
    from transformers import PreTrainedTokenizerFast

    backend = book_tokenizer().backend_tokenizer
    backend.post_processor = None
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")
    text = moby_dick[:300]
    score = score_documents(model, bare, [text])
    assert sum(score.num_bytes) == len(text.encode())


def test_interval_holds_the_estimate_and_narrows_with_more_text(model, tokenizer, moby_dick):
    widths = []
    for size in (2_000, 20_000):
        score = score_documents(model, tokenizer, [moby_dick[:size]])
        low, high = score.interval()
        assert low < score.bits_per_byte < high
        widths.append(high - low)
    assert widths[1] < widths[0]


def test_sentence_probability_is_the_product_of_its_tokens(model, tokenizer):
    sentences = ["Call me Ishmael.", "Some years ago", "x"]
    batched = score_sentences(model, tokenizer, sentences)
    alone = [score_sentences(model, tokenizer, [sentence])[0] for sentence in sentences]
    for one, other, sentence in zip(batched, alone, sentences, strict=True):
        assert math.isclose(one.log_probability, other.log_probability, rel_tol=1e-5)
        assert math.isclose(math.fsum(one.token_log_probabilities), one.log_probability, rel_tol=1e-9)
        assert "".join(one.tokens) == sentence
    ids = torch.tensor([tokenizer(sentences[0])["input_ids"]])
    log_probabilities = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).sum().item()
    assert math.isclose(batched[0].log_probability, log_probabilities, rel_tol=1e-5)


def test_probabilities_of_all_next_tokens_add_up_to_one(model, tokenizer):
    ids = torch.tensor([tokenizer("Call me")["input_ids"]])
    assert math.isclose(model(ids).logits[0, -1].softmax(-1).sum().item(), 1, rel_tol=1e-5)


def test_what_cannot_be_scored_is_named(model, tokenizer, moby_dick):
    with pytest.raises(InputError, match="no tokens"):
        score_sentences(model, tokenizer, [""])
    with pytest.raises(InputError, match="the model takes 64"):
        score_sentences(model, tokenizer, [moby_dick[:1000]])
    with pytest.raises(InputError, match="stride.*between 1 and 63.*64"):
        score_documents(model, tokenizer, ["text"], 64, 64)
    with pytest.raises(InputError, match="no text"):
        score_documents(model, tokenizer, [])


def test_without_a_stride_the_number_is_the_one_a_training_run_reports(model, tokenizer, moby_dick, tmp_path):
    from datasets import Dataset

    from hf_lm.data.collator import PackedCollator
    from hf_lm.data.packing import pack_documents
    from hf_lm.training.arguments import HfLmTrainingArguments
    from hf_lm.training.trainer import HfLmTrainer

    texts = [moby_dick[start : start + 37 * number] for number, start in enumerate(range(0, 30_000, 1500), 1)]
    blocks = pack_documents(Dataset.from_dict({"text": texts}), tokenizer, 48)
    trainer = HfLmTrainer(
        model=model,
        args=HfLmTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False),
        eval_dataset=blocks,
        eval_bytes=[int(row["num_bytes"]) for row in blocks],
        data_collator=PackedCollator(tokenizer.pad_token_id),
    )
    expected = trainer.evaluate()
    score = score_documents(model, tokenizer, texts, 48)
    assert sum(score.tokens) == expected["eval_tokens"]
    assert math.isclose(score.loss, expected["eval_loss"], rel_tol=1e-6)
    assert math.isclose(score.bits_per_byte, expected["eval_bits_per_byte"], rel_tol=1e-6)


def test_documents_add_up_to_the_whole_and_the_worst_comes_first(model, tokenizer, moby_dick):
    texts = [moby_dick[:900], "\N{WHALE}" * 40, moby_dick[2000:2300]]
    score = score_documents(model, tokenizer, texts)
    rows = score.by_document()
    assert [row["bytes"] for row in sorted(rows, key=lambda row: row["document"])] == [
        len(text.encode()) for text in texts
    ]
    assert rows[0]["bits_per_byte"] == max(row["bits_per_byte"] for row in rows)
    bits = math.fsum(row["bits_per_byte"] * row["bytes"] for row in rows)
    assert math.isclose(bits / sum(score.num_bytes), score.bits_per_byte, rel_tol=1e-9)
    alone = score_documents(model, tokenizer, texts[:1])
    assert math.isclose(
        alone.bits_per_byte, [row for row in rows if not row["document"]][0]["bits_per_byte"], rel_tol=1e-6
    )


def test_models_with_other_tokenizers_are_compared_on_the_same_pieces(model, tokenizer, moby_dick):

    text = [moby_dick[:6000], "Ein Wal ist kein Fisch. \N{WHALE} 鲸鱼不是鱼。" * 9]
    bytewise = train_tokenizer([], kind="byte")
    score, other = (score_documents(model, one, text) for one in (tokenizer, bytewise))
    assert score.num_bytes == other.num_bytes and score.tokens != other.tokens
    paired = score.compared_to(other)
    assert math.isclose(paired["difference"], score.bits_per_byte - other.bits_per_byte)
    assert paired["low"] <= paired["difference"] <= paired["high"]
    same = score.compared_to(score)
    assert same == {"difference": 0, "low": 0, "high": 0}
    # paired: what makes a passage hard for both does not widen the interval
    (low, high), (own_low, own_high) = (paired["low"], paired["high"]), score.interval()
    (other_low, other_high) = other.interval()
    assert high - low < (own_high - own_low) + (other_high - other_low)
    with pytest.raises(InputError, match="different texts"):
        score.compared_to(score_documents(model, tokenizer, [moby_dick[:5000]]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_of_other_families_are_scored_as_they_score_themselves(family, tokenizer, moby_dick):
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.2}
    config = (
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, **sizes)
        if family == "llama"
        else GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **sizes)
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    texts = [moby_dick[:400], moby_dick[900:940], moby_dick[1000:1200]]
    score = score_documents(model, tokenizer, texts)
    from hf_lm.data.packing import segments

    nats = tokens = 0
    for segment in segments(texts, tokenizer, 64, [tokenizer.bos_token_id]):
        ids = torch.as_tensor(segment["input_ids"])[None].long()
        nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert sum(score.tokens) == tokens
    assert math.isclose(score.loss, nats / tokens, rel_tol=1e-5)


def test_parts_of_a_character_are_shown_as_bytes(model, tokenizer):
    (score,) = score_sentences(model, tokenizer, ["the 鲸"])
    assert "".join(score.tokens) == "the <0xE9><0xB2><0xB8>"
