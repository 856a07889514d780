"""Scores of texts and sentences: the same however they are computed."""

import math

import pytest
import torch

from hf_lm import HfLmConfig, HfLmForCausalLM
from hf_lm.data.packing import encode_documents
from hf_lm.errors import InputError
from hf_lm.evaluation.sentences import score_sentences
from hf_lm.evaluation.text import score_documents
from hf_lm.tokenization import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(moby_dick):
    return train_tokenizer([moby_dick[:50_000]], 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = HfLmConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2,
        zero_init_residual=False, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return HfLmForCausalLM(config).eval()


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
    # with a stride of one, each token is scored by a forward of its own
    text = [moby_dick[:60]]
    single = score_documents(model, tokenizer, text, 64, 1)
    whole = score_documents(model, tokenizer, text, 64)
    assert math.isclose(single.loss, whole.loss, rel_tol=1e-5)  # the text fits one window


def test_tokenizers_without_a_prefix_are_scored_from_their_eos(model, tokenizer, moby_dick):
    from transformers import PreTrainedTokenizerFast

    backend = train_tokenizer([moby_dick[:50_000]], 300).backend_tokenizer
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
