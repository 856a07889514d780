"""llama.cpp reads the tokenizers of exported GGUF files as they are."""

import json

import pytest
from gguf import GGUFReader
from helpers.llama_cpp import prompts, tokens
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer
from transformers.models.llama.tokenization_llama import LlamaTokenizer

from hf_lm.cli import main
from hf_lm.errors import InputError
from hf_lm.interop.gguf_pre_tokenizers import NEARLY, RULES, Rule, probe, rule_of
from hf_lm.interop.gguf_tokenizers import kind_of, merges_by_score, notes_on
from hf_lm.interop.parity import default_text
from hf_lm.tasks.chat import CHAT_TEMPLATE, use_chat_template
from hf_lm.tokenization import extend_tokenizer, train_tokenizer

TEXT = (
    "I've  been there,   we'LL see: it's 3 33 333 4444 55555!\n\n\tx = [1.5, -2]\r\n    return \"naïve\" — Größe, 你好世界，"
    "人工智能。 こんにちは 안녕하세요 Здравствуй 😀👩‍👩‍👧🇩🇪 <|eos|>after<|eos|> x <|eos|>\n  \n end\u00a0. "
)
LEARNED = [default_text(), TEXT, *probe(number=200)]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(pre_tokenizer=None, normalizer=None, ignore_merges: bool = False, vocab_size: int = 800):
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LEARNED, trainer)
    return backend


def with_bos(backend: Tokenizer, **tokens) -> PreTrainedTokenizerFast:
    tokens = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"} | tokens
    bos = tokens["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """A vocabulary as SentencePiece learns it, with all merges that its scores imply, in the classes of transformers."""
    learner = Tokenizer(models.BPE(byte_fallback=True))
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    special = ["<unk>", "<|bos|>", "<|eos|>", *BYTE_TOKENS]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    learner.train_from_iterator(LEARNED, trainer)
    definition = json.loads(learner.to_str())["model"]
    scores = {"".join(merge): -float(rank) for rank, merge in reversed(list(enumerate(definition["merges"])))}
    vocab = definition["vocab"]
    lowest = -float(len(vocab))
    merges = merges_by_score({token: scores.get(token, lowest) for token in vocab})
    names = {"unk_token": "<unk>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    if kind == "gemma":
        return GemmaTokenizer(vocab=vocab, merges=merges, pad_token="<|eos|>", mask_token="<|eos|>", **names)
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, **names)
    if kind == "llama-legacy":
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    return tokenizer


def raw_merges(*steps: normalizers.Normalizer) -> PreTrainedTokenizerFast:
    """Merges of characters with byte fallback, as the package tokenizers learns them: not all pairs of tokens merge."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<|bos|>", "<|eos|>", *BYTE_TOKENS]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
    backend.train_from_iterator([*LEARNED, "x q"], trainer)
    definition = json.loads(backend.to_str()) | {"pre_tokenizer": None}
    vocab = definition["model"]["vocab"]
    vocab |= {token: len(vocab) + index for index, token in enumerate(("xq", "qx", "qxq"))}
    definition["model"]["merges"] = [["x", "q"], *definition["model"]["merges"], ["q", "x"], ["qx", "q"]]
    return with_bos(Tokenizer.from_str(json.dumps(definition)), unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "<|bos|>", "<|eos|>"]
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(LEARNED, trainer)
    return with_bos(backend, unk_token="<unk>")


def extended() -> PreTrainedTokenizerFast:
    tokenizer, _ = extend_tokenizer(train_tokenizer([default_text()], 400), [TEXT], 40)
    return tokenizer


def added() -> PreTrainedTokenizerFast:
    tokenizer = with_bos(byte_level())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["<think>", "    "])
    return tokenizer


def ends_with_eos() -> PreTrainedTokenizerFast:
    tokenizer = with_bos(byte_level())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|eos|>", special_tokens=[("<|eos|>", 1)]
    )
    return tokenizer


DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
TOKENIZERS = {
    "ours: bpe": lambda: train_tokenizer(LEARNED, 600),
    "ours: char": lambda: train_tokenizer(LEARNED, 600, kind="char"),
    "ours: byte": lambda: train_tokenizer([], kind="byte"),
    "ours: extended": extended,
    "added tokens": added,
    "eos at the end": ends_with_eos,
    "smollm": lambda: with_bos(byte_level(DIGITS)),
    "qwen2: NFC": lambda: with_bos(byte_level(pre("qwen2"), normalizers.NFC())),
    "gemma": lambda: sentencepiece("gemma"),
    "llama": lambda: sentencepiece("llama"),
    "llama-legacy": lambda: sentencepiece("llama-legacy"),
    "merges of characters": raw_merges,
    "unigram": unigram,
}
NO_SPACE_AFTER_SPECIAL = ("llama", "unigram")  # nor in front of one


def pre(name: str):
    return next(rule for rule in RULES if rule.name == name).pre_tokenizer()


@pytest.fixture
def exported(checkpoint, tmp_path):
    """`exported(tokenizer)`: a GGUF file of a tiny model with this tokenizer."""

    def export(tokenizer, **options):
        folder = checkpoint(vocab_size=len(tokenizer) + 3, **options)
        for file in (*folder.glob("tokenizer*"), *folder.glob("chat*")):
            file.unlink()
        tokenizer.save_pretrained(folder)
        assert main(["export", str(folder), str(tmp_path / "model.gguf")]) == 0
        return tmp_path / "model.gguf"

    return export


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_exported_tokenizer_gives_the_same_tokens(name, exported):
    tokenizer = TOKENIZERS[name]()
    texts = [TEXT, default_text(), "", "a", *probe(number=40)]
    if name in NO_SPACE_AFTER_SPECIAL:
        texts = [text.lstrip(" ").replace("<|eos|>", "eos") for text in texts]
    assert tokens(exported(tokenizer), texts) == tokenizer(texts)["input_ids"]


@pytest.fixture(scope="module")
def crossing() -> Tokenizer:
    """Merges that cross every word: each split shows in the tokens."""
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), vocab_size=2000)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_is_what_llama_cpp_does_under_its_name(rule, crossing, exported):
    tokenizer = with_bos(rule.applied_to(json.loads(crossing.to_str())))
    file = exported(tokenizer)
    assert GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == rule.name
    texts = [TEXT, *probe(number=150, length=7)]
    assert tokens(file, texts) == tokenizer(texts)["input_ids"]


def test_names_are_chosen_by_what_a_tokenizer_does(crossing):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for name, split in GGUF_PRE_TOKENIZER_SPLITS.items():
        known = next((rule for rule in RULES if name in (rule.name, *rule.aliases)), None)
        if known is None:
            continue
        backend = crossing.from_str(crossing.to_str())
        backend.pre_tokenizer = Rule(name, (split,)).pre_tokenizer()
        found, _ = rule_of(backend)
        assert found.name in {rule.name for rule in RULES if rule.splits == known.splits}, name
    assert rule_of(byte_level(DIGITS))[0].name == "smollm"
    assert rule_of(byte_level(pre("dbrx"), ignore_merges=True))[0].name == "llama-bpe"


@pytest.mark.parametrize("rule", NEARLY, ids=lambda rule: rule.name)
def test_published_pre_tokenizers_that_llama_cpp_nearly_follows_are_told(rule, crossing):
    kind = kind_of(rule.applied_to(json.loads(crossing.to_str())))
    assert kind.keys["tokenizer_pre"] == rule.name
    assert f"{rule.name} follows this tokenizer for most texts, not for all" in kind.notes[0]


def unigram_with_bytes() -> Tokenizer:
    vocab = [("<unk>", 0.0), *((token, -1.0) for token in BYTE_TOKENS)]
    return Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))


def prefixed() -> Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))


def whole_text() -> Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


def incomplete() -> Tokenizer:
    vocab = {token: index for index, token in enumerate(BYTE_TOKENS[1:])}
    return Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "this one is WordLevel"),
        (lambda: Tokenizer(models.BPE()), "this one is BPE"),
        (unigram_with_bytes, "this one is Unigram with byte fallback"),
        (prefixed, r"splits as this byte-level BPE tokenizer does \(ByteLevel\)"),
        (whole_text, r"splits as this byte-level BPE tokenizer does \(ByteLevel\)"),
        (lambda: byte_level(normalizer=normalizers.Lowercase()), r"byte-level BPE tokenizer does \(ByteLevel\)"),
        (incomplete, "has no token <0x00>"),
        (
            lambda: raw_merges(normalizers.Prepend("▁")).backend_tokenizer,
            "this BPE tokenizer with byte fallback does neither",
        ),
    ],
)
def test_what_llama_cpp_cannot_do_is_named(build, message):
    with pytest.raises(InputError, match=message):
        kind_of(build())


def test_differences_around_a_text_are_told():
    (note,) = notes_on(sentencepiece("llama"), kind_of(sentencepiece("llama").backend_tokenizer))
    assert "beside special tokens, llama.cpp treats white space in another way" in note and "'a<unk>a'" in note
    assert notes_on(sentencepiece("gemma"), kind_of(sentencepiece("gemma").backend_tokenizer)) == []
    tokenizer = with_bos(byte_level())
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True)]})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|eos|> <|bos|> $A", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
    )
    assert "does not normalize texts" in kind_of(byte_level(normalizer=normalizers.NFC())).notes[0]
    notes = notes_on(tokenizer, kind_of(tokenizer.backend_tokenizer))
    assert "'a<|end|> a'" in notes[0] and "puts other tokens around a text" in notes[1]


def test_tokens_have_their_types(exported):
    tokenizer = sentencepiece("gemma")
    tokenizer.add_tokens(["<think>"])
    fields = {key: field.contents() for key, field in GGUFReader(exported(tokenizer)).fields.items()}
    names = ("tokens", "token_type", "scores")
    contents, types, scores = (fields[f"tokenizer.ggml.{name}"] for name in names)
    kinds = dict(zip(contents, types, strict=True))
    wanted = {"<unk>": 2, "<|bos|>": 3, "<0x41>": 6, "▁a": 1, "<think>": 4, "[PAD1001]": 5}
    assert {token: kinds[token] for token in wanted} == wanted
    ranks = {"".join(merge): rank for rank, merge in reversed(list(enumerate(merges_of_backend(tokenizer))))}
    assert all(scores[contents.index(token)] == -rank for token, rank in ranks.items())
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is False


def merges_of_backend(tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def test_a_file_that_transformers_would_split_otherwise_is_imported_as_it_is(exported, tmp_path):
    tokenizer = with_bos(byte_level(DIGITS, vocab_size=2000))
    exported(tokenizer)
    assert main(["import", str(tmp_path / "model.gguf"), str(tmp_path / "ours")]) == 0
    read = AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in (TEXT, "in  1984   2001", *probe(number=100)):
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"], text


CONVERSATIONS = [
    [("user", "What is 2 + 2?")],
    [("system", "Be brief.\nBe kind."), ("user", "你好，世界 😀")],
    [("user", "a"), ("assistant", "b  b\n"), ("user", "  c <|eos|> d\n\n")],
    [("system", "s"), ("user", "a"), ("assistant", "{{ b }}"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + "
    "'\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)


def chat(template: str, **tokens) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **({"eos_token": "<|eos|>"} | tokens))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def chat_with_bos() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(LEARNED, 600)
    use_chat_template(tokenizer)
    return tokenizer


CHATS = {
    "ours": chat_with_bos,
    "ours, without bos": lambda: chat(CHAT_TEMPLATE),
    "ours, bos not in front of texts": lambda: chat(CHAT_TEMPLATE, bos_token="<|bos|>"),
    "SmolLM2": lambda: chat(SMOLLM2_TEMPLATE, bos_token="<|im_start|>", eos_token="<|im_end|>"),
}


def as_messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHATS)
def test_chat_templates_give_the_same_prompt(name, exported):
    tokenizer = CHATS[name]()
    conversations = [as_messages(turns) for turns in CONVERSATIONS]
    wanted = tokenizer.apply_chat_template(conversations, add_generation_prompt=True)["input_ids"]
    assert prompts(exported(tokenizer), conversations) == wanted
