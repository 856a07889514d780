"""
What `generate` promises with any causal language model, kept by ours for every attention and dtype that a CPU has.

The library's own generation tests are not in its source archive; these are ours. The yardstick is `greedy_by_hand`: no
cache, no mask, no batch. Contrastive search, DoLa and forced words are not in transformers 5 (code on the Hub only).
"""

import pytest
import torch
from harness.tested_configs import TESTED_CONFIGS, tiny_config
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig
from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from hf_lm import HfLmForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.*_compile flag:DeprecationWarning", "ignore:flex_attention called")
PROMPT = torch.tensor([[5, 17, 33, 8, 60, 21]])


def case(name: str, attention: str, dtype: str):
    is_quick = name == "default" and (dtype == "float32" or attention == "sdpa")
    is_quick = is_quick or (name, attention, dtype) == ("everything", "sdpa", "float32")
    marks = () if is_quick else pytest.mark.slow
    return pytest.param((name, attention, dtype), id=f"{name}-{attention}-{dtype}", marks=marks)


CASES = [
    case(name, attention, dtype)
    for name in TESTED_CONFIGS
    for attention in ("eager", "sdpa", "flex_attention")
    for dtype in ("float32", "bfloat16")
    if attention != "sdpa" or "attn_logit_softcapping" not in TESTED_CONFIGS[name]
]


def build(name: str, attention: str = "sdpa", dtype: str = "float32", seed: int = 0, **changes) -> HfLmForCausalLM:
    torch.manual_seed(seed)
    config = tiny_config(name, **{"initializer_range": 0.3, "eos_token_id": None, **changes})
    return HfLmForCausalLM._from_config(config, attn_implementation=attention, dtype=getattr(torch, dtype)).eval()


@pytest.fixture(params=CASES)
def model(request):
    """FlexAttention runs without its compiler here: the same functions, in seconds less."""
    with torch.compiler.set_stance("force_eager" if "flex_attention" in request.param else "default"):
        yield build(*request.param)


@torch.no_grad()
def greedy_by_hand(model: HfLmForCausalLM, ids: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return ids


@torch.no_grad()
def assert_greedy(model: HfLmForCausalLM, sequences: torch.Tensor, prompt_length: int) -> None:
    """
    Each new token is the likeliest after those before it. In bfloat16 the way of computing moves logits by rounding:
    there a runner-up within 0.1 standard deviations of the logits counts as well.
    """
    logits = model(sequences, use_cache=False).logits[:, prompt_length - 1 : -1].float()
    slack = 1e-4 if model.dtype == torch.float32 else 0.1
    chosen = logits.gather(-1, sequences[:, prompt_length:, None])[..., 0]
    assert (chosen >= logits.amax(dim=-1) - slack * logits.std()).all()


def generate(model: HfLmForCausalLM, ids: torch.Tensor | None = PROMPT, steps: int = 12, **arguments):
    if ids is not None:
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **arguments}
    return model.generate(**{"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, **arguments})


def test_greedy_takes_the_likeliest_token(model):
    sequences = generate(model)
    assert_greedy(model, sequences, 6)
    if model.dtype == torch.float32:
        assert torch.equal(sequences, greedy_by_hand(model, PROMPT, 12))
    assert_greedy(model, generate(model, use_cache=False), 6)


def test_generation_stops_at_the_end_token_and_pads(model):
    prompts = torch.cat((PROMPT, PROMPT.flip(1)))
    free = generate(model, prompts)
    end = int(free[0, 9])
    stopped = generate(model, prompts, eos_token_id=end, pad_token_id=0, min_new_tokens=None)
    for row, line in enumerate(free.tolist()):
        length = line.index(end, 6) + 1 if end in line[6:] else len(line)
        assert stopped[row, :length].tolist() == line[:length]
        assert not stopped[row, length:].any()


def test_sampling_follows_its_seed(model):
    def draw(seed: int, **arguments) -> torch.Tensor:
        torch.manual_seed(seed)
        return generate(model, do_sample=True, **arguments)

    assert torch.equal(draw(1, temperature=0.9, top_p=0.95), draw(1, temperature=0.9, top_p=0.95))
    assert not torch.equal(draw(1, top_k=0), draw(2, top_k=0))
    assert_greedy(model, draw(3, top_k=1), 6)
    if model.dtype == torch.float32:
        assert torch.equal(draw(1), draw(1, use_cache=False))


def test_beam_search_scores_are_those_of_its_sequences(model):
    arguments = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    found = generate(model, torch.cat((PROMPT, PROMPT.flip(1))), num_return_sequences=2, **arguments)
    with torch.no_grad():
        logits = model(found.sequences, use_cache=False).logits[:, 5:-1].float()
    scores = logits.log_softmax(-1).gather(-1, found.sequences[:, 6:, None])[..., 0].sum(-1)
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if model.dtype == torch.float32 else {"rtol": 0.05, "atol": 0.5}
    torch.testing.assert_close(found.sequences_scores, scores, check_dtype=False, **tolerance)
    assert found.sequences.shape == (4, 18) and not torch.equal(found.sequences[0], found.sequences[1])
    if model.dtype == torch.float32:
        uncached = generate(
            model, torch.cat((PROMPT, PROMPT.flip(1))), num_return_sequences=2, use_cache=False, **arguments
        )
        assert torch.equal(uncached.sequences, found.sequences)


@pytest.mark.parametrize("by", ["draft model", "prompt lookup"])
def test_assisted_generation_equals_greedy(model, by):
    arguments = {"prompt_lookup_num_tokens": 3}
    if by == "draft model":
        attention = model.config._attn_implementation
        draft = build("llama", attention, str(model.dtype).removeprefix("torch."), num_hidden_layers=1)
        arguments = {"assistant_model": draft}
    prompt = PROMPT.repeat(1, 2)
    assert_greedy(model, generate(model, prompt, **arguments), 12)
    same = generate(model, prompt, assistant_model=model)  # every guess is right: several tokens a step
    assert_greedy(model, same, 12)


@pytest.mark.parametrize("cache", ["dynamic", "static", "DynamicCache", "StaticCache"])
def test_any_cache_gives_the_same(model, cache):
    prompts = torch.cat((PROMPT, PROMPT.flip(1)))
    if cache == "DynamicCache":
        arguments = {"past_key_values": DynamicCache(config=model.config)}
    elif cache == "StaticCache":
        arguments = {"past_key_values": StaticCache(config=model.config, max_cache_len=40)}
    else:
        arguments = {"cache_implementation": cache}
    sequences = generate(model, prompts, disable_compile=True, **arguments)
    assert_greedy(model, sequences, 6)
    if model.dtype == torch.float32:
        assert torch.equal(sequences, greedy_by_hand(model, prompts, 12))


@pytest.mark.parametrize(
    "backend",
    [
        "fp8",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("quanto", "hqq")),
    ],
)
@pytest.mark.parametrize("name", ["default", "llama", "gpt2"])
def test_quantized_cache_stays_near(name, backend):
    model = build(name, hidden_size=128, head_dim=32)
    sizes = {"q_group_size": 32, "residual_length": 4, "nbits": 4 if backend == "quanto" else 8}
    cache = QuantizedCache(backend=backend, config=model.config, **({} if backend == "fp8" else sizes))
    sequences = generate(model, steps=20, past_key_values=cache)
    assert cache.get_seq_length() == 25
    assert sequences[0, 6] == generate(model, steps=1)[0, 6]  # the prompt is attended to before it is quantized
    with torch.no_grad():
        logits = model(sequences).logits[0, 5:-1]
    shortfall = logits.amax(dim=-1) - logits.gather(-1, sequences[0, 6:, None])[:, 0]
    assert shortfall.mean() < 0.5 * logits.std()  # a token drawn at random falls short by 2.5


def test_sliding_window_cache_keeps_a_window_only():
    model = build("sliding")
    assert model.config.sliding_window == 4
    cache = DynamicCache(config=model.config)
    sequences = generate(model, steps=20, past_key_values=cache)
    assert torch.equal(sequences, greedy_by_hand(model, PROMPT, 20))
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(1, 2, 3, 8)] * 2
    static = generate(model, steps=20, past_key_values=StaticCache(config=model.config, max_cache_len=40))
    assert torch.equal(static, sequences)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["default", "everything", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_generation_compiles_to_one_graph(name, backend):
    model = build(name)
    compiling = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compiling._compile_all_devices = True  # the library's own tests do the same: by itself it compiles on GPUs only
    prompts = torch.cat((PROMPT, PROMPT.flip(1)))
    torch.compiler.reset()
    sequences = generate(model, prompts, steps=5, cache_implementation="static", compile_config=compiling)
    assert hasattr(model, "_compiled_call")
    assert torch.equal(sequences, greedy_by_hand(model, prompts, 5))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_flex_attention_gives_the_same():
    """One forward pass: for growing lengths and for windows torch 2.13 emits faulty C++, as with any model."""
    model, plain = build("default", "flex_attention"), build("default", "eager")
    torch.compiler.reset()
    torch.testing.assert_close(model(PROMPT).logits, plain(PROMPT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["sliding", "default", "llama", "gpt2"])
def test_continuous_batching_equals_generate(name, attention):
    model = build(name, attention)
    prompts = [[5, 17, 33], [8, 60, 21, 40, 41, 42, 43], [9]]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # by default, a share of the machine's memory
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=room)
    generated = [output.generated_tokens for output in outputs.values()]
    model.set_attn_implementation(attention)
    expected = [greedy_by_hand(model, torch.tensor([prompt]), 8)[0, len(prompt) :].tolist() for prompt in prompts]
    assert generated == expected


def test_left_padded_prompts_continue_as_alone(model):
    prompts = torch.cat((PROMPT, PROMPT.flip(1)))
    mask = torch.ones_like(prompts)
    prompts[0, :3], mask[0, :3] = 0, 0
    sequences = generate(model, prompts, attention_mask=mask)
    assert_greedy(model, sequences[:1, 3:], 3)
    assert_greedy(model, sequences[1:], 6)


@torch.no_grad()
def test_right_padded_texts_score_as_alone(model):
    texts = [PROMPT[0], PROMPT[0, :3], PROMPT[0, 1:]]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    scores = model(ids, attention_mask=mask).logits.float().log_softmax(-1)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if model.dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2}
    for row, text in enumerate(texts):
        alone = model(text[None]).logits.float().log_softmax(-1)[0]
        torch.testing.assert_close(scores[row, : len(text)], alone, **tolerance)


def test_embeddings_in_place_of_ids(model):
    embeds = model.get_input_embeddings()(PROMPT)
    new = generate(model, None, inputs_embeds=embeds, attention_mask=torch.ones_like(PROMPT))
    assert_greedy(model, torch.cat((PROMPT, new), dim=1), 6)


def test_generation_goes_on_from_a_returned_cache(model):
    first = generate(model, steps=5, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, torch.tensor([[7, 9]])), dim=1)  # as in a chat: more is said
    second = generate(model, longer, steps=5, past_key_values=first.past_key_values)
    assert_greedy(model, second, 13)
    if model.dtype == torch.float32:
        assert torch.equal(second, greedy_by_hand(model, longer, 5))


def test_outputs_have_their_shapes(model):
    wanted = {f"output_{name}": True for name in ("hidden_states", "scores", "logits")}
    wanted["output_attentions"] = model.config._attn_implementation == "eager"
    prompts, config = torch.cat((PROMPT, PROMPT.flip(1))), model.config
    output = generate(model, prompts, steps=3, return_dict_in_generate=True, **wanted)
    assert output.sequences.shape == (2, 9)
    assert [tuple(scores.shape) for scores in output.scores + output.logits] == [(2, config.vocab_size)] * 6
    for step, layers in enumerate(output.hidden_states):
        length = 1 if step else 6
        assert [tuple(states.shape) for states in layers] == [(2, length, config.hidden_size)] * 3
    for step, layers in enumerate(output.attentions or ()):
        length, keys = (1, 6 + step) if step else (6, 6)
        for weights, layer_type in zip(layers, config.layer_types, strict=True):
            seen = min(keys, config.sliding_window) if layer_type == "sliding_attention" and step else keys
            assert weights.shape == (2, config.num_attention_heads, length, seen)
            torch.testing.assert_close(weights.float().sum(-1), torch.ones(2, 4, length), rtol=0, atol=0.02)


def test_several_sequences_for_a_prompt(model):
    torch.manual_seed(0)
    drawn = generate(model, torch.cat((PROMPT, PROMPT.flip(1))), do_sample=True, top_k=0, num_return_sequences=3)
    assert drawn.shape == (6, 18)
    assert torch.equal(drawn[:3, :6], PROMPT.expand(3, -1)) and torch.equal(
        drawn[3:, :6], PROMPT.flip(1).expand(3, -1)
    )
    assert len({tuple(line) for line in drawn.tolist()}) == 6


def test_bad_words_stay_out_and_forced_tokens_come_in(model):
    free = generate(model)[0].tolist()
    without = generate(model, bad_words_ids=[[free[6]], free[8:10]], suppress_tokens=[free[7]])[0].tolist()
    assert not {free[6], free[7]} & set(without[6:])
    assert tuple(free[8:10]) not in zip(without[6:], without[7:], strict=False)
    forced = generate(model, forced_eos_token_id=77, min_new_tokens=None)[0].tolist()
    assert forced[-1] == 77 and forced[:17] == free[:17]
    only = generate(model, prefix_allowed_tokens_fn=lambda batch, ids: [10, 11])[0, 6:]
    assert ((only == 10) | (only == 11)).all()


def test_tokens_stream_as_they_come(model):
    class Collector(BaseStreamer):
        tokens, ended = [], False

        def put(self, value):
            self.tokens = self.tokens + value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Collector()
    assert generate(model, streamer=streamer)[0].tolist() == streamer.tokens and streamer.ended
