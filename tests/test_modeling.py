"""What the model promises about numbers: the formula, caches, padding, packed documents, losses, files, bad input."""

import math

import pytest
import torch
import transformers
from contract.harness.tested_configs import TESTED_CONFIGS, TINY, tiny_config
from helpers.models import EXACT, build, draw_ids
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_lm import HfLmForCausalLM, HfLmModel
from hf_lm.functional_hf_lm import packed_document_ids
from hf_lm.kernels import varlen
from hf_lm.modeling_hf_lm import HfLmAttention

pytestmark = pytest.mark.filterwarnings("ignore:.*_compile flag:DeprecationWarning", "ignore:flex_attention called")


def plain_attention(attention: HfLmAttention, hidden_states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """The formula, head by head, with rotations as complex numbers; `hidden_states`: `(sequence, hidden)`."""
    length, size = len(hidden_states), attention.head_dim

    def turn(x: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(x[:, : size // 2], x[:, size // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    outputs = []
    for head in range(attention.config.num_attention_heads):
        group = head // attention.num_key_value_groups
        rows, group_rows = (slice(place * size, (place + 1) * size) for place in (head, group))
        q = turn(hidden_states @ attention.q_proj.weight[rows].T)
        k = turn(hidden_states @ attention.k_proj.weight[group_rows].T)
        v = hidden_states @ attention.v_proj.weight[group_rows].T
        scores = q @ k.T / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        outputs.append(torch.softmax(scores, dim=-1) @ v)
    return torch.cat(outputs, dim=-1) @ attention.o_proj.weight.T


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_softmax_of_scaled_products(attention):
    model = build("llama", attention).double()
    layer = model.model.layers[0].self_attn
    hidden_states = torch.randn(1, 11, 32, dtype=torch.float64)
    frequencies = 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = torch.arange(11)[:, None] * frequencies
    twice = torch.cat((angles, angles), dim=-1)[None]
    mask = torch.full((11, 11), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    output, weights = layer(hidden_states, (twice.cos(), twice.sin()), mask)
    torch.testing.assert_close(output[0], plain_attention(layer, hidden_states[0], angles), rtol=1e-10, atol=1e-12)
    if attention == "eager":
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 4, 11, dtype=torch.float64))
    cos, sin = model.model.rotary_emb(hidden_states, torch.arange(11)[None])
    torch.testing.assert_close(cos, twice.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, twice.sin(), rtol=0, atol=1e-6)


SAME_NAMES = {  # families whose weights are called as ours: (their classes, fields of their config, of ours)
    "llama": ("Llama", {"rms_norm_eps": 1e-6}, {}),
    "default": ("Qwen3", {"tie_word_embeddings": True}, {"mlp_type": "gated", "hidden_act": "silu"}),
    "olmo2": ("Olmo2", {"rms_norm_eps": 1e-6}, {"no_rope_layers": None}),
    "gemma2": ("Gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 8}, {"embedding_multiplier": 32**0.5}),
}


@pytest.mark.parametrize("name", SAME_NAMES)
def test_same_weights_give_the_numbers_of_the_family(name):
    """The order of norms, residuals and heads, against implementations that are not ours (all families: interop)."""
    family, their_fields, our_fields = SAME_NAMES[name]
    model = build(name, head_dim=8, **our_fields)
    shared = {field: getattr(model.config, field) for field in TINY if field != "num_labels"}
    soft_caps = {"attn_logit_softcapping": 10.0, "final_logit_softcapping": 20.0} if name == "gemma2" else {}
    config = getattr(transformers, f"{family}Config")(**shared, head_dim=8, **their_fields, **soft_caps)
    theirs = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    theirs.load_state_dict(model.state_dict())
    ids = draw_ids(2, 17)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def uncompiled():
    """FlexAttention without its compiler: the same mask and score functions, in seconds less."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield


@pytest.mark.parametrize("name", TESTED_CONFIGS)
@pytest.mark.usefixtures("uncompiled")
def test_backends_agree(name):
    ids = draw_ids(2, 17)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = build(name, "eager")(ids, attention_mask=mask).logits
    for attention in ["flex_attention"] + ["sdpa"] * (tiny_config(name).attn_logit_softcapping is None):
        logits = build(name, attention)(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits[1], expected[1], **EXACT)
        torch.testing.assert_close(logits[0, 5:], expected[0, 5:], **EXACT)


@pytest.mark.parametrize("name", TESTED_CONFIGS)
def test_a_token_sees_none_after_it_and_all_in_reach_before_it(name):
    model = build(name)
    config = model.config
    ids = draw_ids(1, 12)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[0, 7].sum().backward()
    reach = embeds.grad.abs().sum(dim=-1)[0]
    assert (reach[8:] == 0).all()
    if all(layer_type == "sliding_attention" for layer_type in config.layer_types):
        first = 7 - config.num_hidden_layers * (config.sliding_window - 1)
        assert (reach[:first] == 0).all() and (reach[first:8] > 0).all()
    else:
        assert (reach[:8] > 0).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("name", TESTED_CONFIGS)
@pytest.mark.usefixtures("uncompiled")
def test_cached_equals_uncached(name, attention):
    if attention == "sdpa" and tiny_config(name).attn_logit_softcapping is not None:
        attention = "eager"  # SDPA knows no soft cap
    model = build(name, attention)
    ids = draw_ids(2, 12)
    expected = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        steps = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 3, 2], dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, **EXACT)
        assert int(cache.get_seq_length()) == 12


@pytest.mark.parametrize("positions", ["given", "derived"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TESTED_CONFIGS)
def test_padded_equals_single(name, side, positions):
    model = build(name)
    texts = [draw_ids(length, seed=length) for length in (4, 9, 6)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    places = [slice(9 - len(text), None) if side == "left" else slice(len(text)) for text in texts]
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        ids[row, place], mask[row, place] = text, 1
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1) if positions == "given" else None
    for use_cache in (False, True):
        logits = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=use_cache).logits
        for row, (text, place) in enumerate(zip(texts, places, strict=True)):
            torch.testing.assert_close(logits[row, place], model(text[None]).logits[0], **EXACT)


def test_left_padded_steps_with_a_cache_equal_single():
    model = build("gpt2")
    text = draw_ids(1, 9)
    ids, mask = nn.functional.pad(text, (3, 0)), nn.functional.pad(torch.ones_like(text), (3, 0))
    outputs = model(ids[:, :8], attention_mask=mask[:, :8])
    step = model(ids[:, 8:], attention_mask=mask, past_key_values=outputs.past_key_values)
    torch.testing.assert_close(step.logits, model(text).logits[:, 5:], **EXACT)


# Rows of packed documents (their lengths, 0 for padding in between), and the mask that goes with them.
PACKED = {"no mask": ([4, 5, 3], [12]), "ones": ([4, 5, 3], [1, 1, 10]), "padded": ([4, 5, (3,)], [(2,), 7, 3])}


def lay_packed(rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list]:
    """Ids, mask and positions of `rows`, and where each document lies: `(row, slice)`."""
    ids, mask, positions = draw_ids(len(rows), 12), torch.ones(len(rows), 12, dtype=torch.long), []
    places = []
    for row, lengths in enumerate(rows):
        start, line = 0, []
        for length in lengths:
            is_padding = isinstance(length, tuple)
            length = length[0] if is_padding else length
            place = slice(start, start + length)
            line += [1] * length if is_padding else range(length)
            if is_padding:
                mask[row, place] = 0
            else:
                places.append((row, place))
            start += length
        positions.append(line)
    return ids, mask, torch.tensor(positions), places


@pytest.mark.parametrize("cache", ["no cache", "dynamic", "static"])
@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("name", ["default", "sliding", "gpt2"])
@pytest.mark.usefixtures("uncompiled")
def test_packed_documents_do_not_see_each_other(name, attention, case, cache):
    model = build(name, attention)
    ids, mask, positions, places = lay_packed(PACKED[case])
    past = StaticCache(config=model.config, max_cache_len=20) if cache == "static" else None
    logits = model(
        ids,
        attention_mask=None if case == "no mask" else mask,
        position_ids=positions,
        past_key_values=past,
        use_cache=cache != "no cache",
    ).logits
    for row, place in places:
        torch.testing.assert_close(logits[row, place], model(ids[row : row + 1, place]).logits[0], **EXACT)


@pytest.fixture
def flash_stand_in():
    """
    A plain attention under a flash name, which keeps to the variable lengths it is given as the real kernels do:
    the batch is one flat line, nothing is seen beyond a run's borders.
    """
    calls = []

    def attend(module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
        calls.append({"mask": attention_mask, **kwargs})
        batch, heads, length, size = query.shape
        borders = kwargs["cu_seq_lens_q"]
        flat = [states.transpose(1, 2).reshape(batch * length, -1, size) for states in (query, key, value)]
        assert borders[-1] == batch * length and kwargs["max_length_q"] == borders.diff().max()
        output = torch.empty_like(flat[0])
        for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
            q, k, v = (states[start:end].transpose(0, 1)[None] for states in flat)
            output[start:end] = nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=True
            )[0].transpose(0, 1)
        return output.view(batch, length, heads, size), None

    AttentionInterface.register("flash_stand_in", attend)
    AttentionMaskInterface.register("flash_stand_in", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    yield calls
    AttentionInterface._global_mapping.pop("flash_stand_in")
    AttentionMaskInterface._global_mapping.pop("flash_stand_in")


@pytest.mark.parametrize("case", PACKED)
def test_flash_attention_is_told_where_documents_end(flash_stand_in, case):
    model, plain = build("llama"), build("llama")
    model.config._attn_implementation = "flash_stand_in"
    ids, mask, positions, places = lay_packed(PACKED[case])
    logits = model(ids, attention_mask=None if case == "no mask" else mask, position_ids=positions).logits
    for row, place in places:
        torch.testing.assert_close(logits[row, place], plain(ids[row : row + 1, place]).logits[0], **EXACT)
    assert all(call["mask"] is None for call in flash_stand_in)


def test_lengths_given_for_flash_attention_are_passed_on(flash_stand_in):
    model, plain = build("llama"), build("llama")
    model.config._attn_implementation = "flash_stand_in"
    ids, borders = draw_ids(1, 9), torch.tensor([0, 4, 9], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 5, "max_length_k": 5}
    logits = model(ids, position_ids=torch.tensor([[*range(4), *range(5)]]), **lengths).logits
    torch.testing.assert_close(logits[:, 4:], plain(ids[:, 4:]).logits, **EXACT)
    assert flash_stand_in[0]["cu_seq_lens_q"] is borders


@pytest.fixture
def varlen_stand_in(monkeypatch):
    """PyTorch's kernel for documents of different lengths, written out, where there is none."""
    calls = []

    def attend(query, key, value, starts, other, longest, also, *, scale, window_size):
        calls.append(starts)
        assert starts is other and longest == also >= starts.diff().max() and starts[-1] == len(query)
        index = torch.arange(len(query))
        document, distance = torch.bucketize(index, starts, right=True), index[:, None] - index
        seen = (
            (document[:, None] == document) & (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
        )
        q, k, v = (states.transpose(0, 1) for states in (query, key, value))
        return nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale).transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", attend, raising=False)
    monkeypatch.setattr(varlen, "has_varlen_kernel", lambda *_: True)
    return calls


@pytest.mark.skipif(not varlen.HAS_VARLEN, reason="PyTorch has it from 2.11 on")
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"sliding_window": 3}], ids=str)
@pytest.mark.parametrize("case", PACKED)
def test_documents_are_kept_apart_by_their_lengths(varlen_stand_in, case, changes):
    model, plain = build("llama", "varlen", **changes), build("llama", **changes)
    ids, mask, positions, places = lay_packed(PACKED[case])
    mask = None if case == "no mask" else mask
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for row, place in places:
        torch.testing.assert_close(logits[row, place], plain(ids[row : row + 1, place]).logits[0], **EXACT)
    assert len(varlen_stand_in) == model.config.num_hidden_layers


@pytest.mark.skipif(not varlen.HAS_VARLEN, reason="PyTorch has it from 2.11 on")
def test_lengths_of_a_batch_are_taken_as_they_are_and_without_any_it_is_sdpa(varlen_stand_in):
    model, plain, ids = build("llama", "varlen"), build("llama"), draw_ids(1, 9)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, **EXACT)
    assert not varlen_stand_in
    borders = torch.tensor([0, 4, 9, 9], dtype=torch.int32)  # as the collator fills them up
    lengths = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 9, "max_length_k": 9}
    positions = torch.tensor([[*range(4), *range(5)]])
    logits = model(ids, position_ids=positions, use_cache=False, **lengths).logits
    torch.testing.assert_close(logits[:, 4:], plain(ids[:, 4:]).logits, **EXACT)
    assert all(starts is borders for starts in varlen_stand_in) and varlen_stand_in


def test_engines_own_attention_gets_its_arguments_and_no_mask():
    """What inference engines (vLLM, continuous batching) rely on: layer_idx, scaling, window, their kwargs untouched."""
    calls = []

    def attend(module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
        calls.append((module.layer_idx, attention_mask, scaling, sliding_window, kwargs["attention_instances"]))
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("engine", attend)
    try:
        model, instances = build("everything"), object()
        model.config._attn_implementation = "engine"
        positions = torch.tensor([[*range(4), *range(5)]])
        output = model.model(draw_ids(1, 9), position_ids=positions, use_cache=False, attention_instances=instances)
    finally:
        AttentionInterface._global_mapping.pop("engine")
    assert calls == [(0, None, 0.2, 4, instances), (1, None, 0.2, None, instances)]
    assert output.last_hidden_state.shape == (1, 9, 32)


def test_hole_in_the_mask_over_which_positions_go_on_is_one_document():
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 0, 1]])
    going_on = torch.tensor([[0, 1, 1, 1, 2, 3], [1, 0, 1, 2, 1, 3]])
    assert packed_document_ids(going_on, mask).tolist() == [[0] * 6, [0] * 6]
    anew = torch.tensor([[0, 1, 1, 1, 0, 1], [1, 0, 1, 2, 1, 0]])
    assert packed_document_ids(anew, mask).tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]]
    model, ids = build("llama"), draw_ids(1, 6)
    logits = model(ids, attention_mask=mask[:1], position_ids=going_on[:1]).logits
    kept = mask[0].bool()
    torch.testing.assert_close(logits[0, kept], model(ids[:, kept]).logits[0], **EXACT)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["default", "everything"])
def test_loss_is_mean_negative_log_likelihood(name, training):
    model = build(name).train(training)
    ids = draw_ids(3, 9)
    labels = ids.clone()
    labels[0, :4], labels[2, 6:] = -100, -100
    logits = model(ids).logits.double()
    losses = -torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    losses = losses[labels[:, 1:] != -100]
    close = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(model(ids, labels=labels).loss, losses.mean(), **close)
    shared = model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(shared, losses.sum() / 50, **close)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(ids, labels=labels, shift_labels=shifted).loss, losses.mean(), **close)


def test_gradient_accumulation_equals_one_large_batch(tmp_path):
    rows = []
    for row in range(16):  # ragged: a mean of means would differ
        ids = draw_ids(12, seed=row)
        length = 2 + row % 11
        labels = torch.where(torch.arange(12) < length, ids, -100)
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()})
    weights = {}
    for batch_size, steps in ((16, 1), (2, 8)):
        model = build()
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
            logging_steps=100,
        )
        Trainer(model, arguments, train_dataset=rows).train()
        weights[batch_size] = dict(model.named_parameters())
    for name, weight in weights[16].items():
        torch.testing.assert_close(weights[2][name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["default", "everything"])
def test_gradient_checkpointing_changes_no_gradient(name, use_reentrant):
    ids = draw_ids(2, 9)
    gradients = []
    for checkpointing in (False, True):
        model = build(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TESTED_CONFIGS)
def test_saved_model_loads_with_the_same_logits_and_ties(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = draw_ids(2, 9)
    assert type(loaded) is HfLmForCausalLM and not loaded.training
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    base = HfLmModel.from_pretrained(tmp_path)
    assert torch.equal(base.embed_tokens.weight, model.model.embed_tokens.weight)


ROPE = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("rope_type", [*ROPE, "by layer type"])
def test_loading_rebuilds_every_buffer(rope_type, tmp_path):
    """from_pretrained builds the model without memory; what is not in the file has to be computed again."""
    changes = {}
    if rope_type in ROPE:
        changes = {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e5, **ROPE[rope_type]}, "head_dim": 8}
    model = build("everything", **changes)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    buffers = dict(loaded.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert {name.rsplit(".", 1)[-1] for name in buffers} == {"inv_freq", "original_inv_freq", "embed_scale"}
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    for length in (9, 600):  # 600 is past what it was made for: dynamic and longrope change their frequencies
        ids = draw_ids(1, length)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded(ids[:, :9]).logits, model(ids[:, :9]).logits)


def test_buffers_have_one_order_in_every_process():
    """DistributedDataParallel copies buffers by their order: a set of names would swap rotary bases between ranks."""
    names = [name for name, _ in build("everything").named_buffers() if name.endswith(".inv_freq")]
    assert names == [f"model.rotary_emb.{kind}.inv_freq" for kind in ("full_attention", "sliding_attention")]


def test_default_layers_start_as_the_identity():
    torch.manual_seed(0)
    model = HfLmForCausalLM(tiny_config(zero_init_residual=True)).eval()
    ids = draw_ids(2, 9)
    hidden_states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(hidden_states[0], model.model(ids, output_hidden_states=True).hidden_states[-2])


@pytest.mark.parametrize("name", ["default", "llama", "everything"])
def test_resizing_the_vocabulary_keeps_what_was_learned(name):
    model = build(name)
    ids = draw_ids(1, 9)
    before = model(ids).logits
    model.resize_token_embeddings(120, mean_resizing=False)
    logits = model(ids, labels=ids).logits
    assert logits.shape[-1] == model.config.vocab_size == 120
    torch.testing.assert_close(logits[..., :99], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert type(model.model.embed_tokens) is type(build(name).model.embed_tokens)
    model(torch.tensor([[119]]), labels=torch.tensor([[119]]))
    with pytest.raises(ValueError, match="between 0 and 119, got 120"):
        model(torch.tensor([[120]]))


@pytest.mark.parametrize("name", ["default", "everything", "gpt2"])
def test_bfloat16_runs_and_is_near(name):
    ids = draw_ids(2, 9)
    expected = build(name)(ids).logits
    spread = expected.std()
    for attention in ("eager", "sdpa"):
        logits = build(name, attention).bfloat16()(ids).logits
        assert logits.dtype == torch.bfloat16
        assert (logits - expected).abs().mean() < 0.05 * spread
        mixed = build(name, attention).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = mixed(ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in mixed.parameters())
        assert abs(loss - build(name)(ids, labels=ids).loss) < 0.1


BAD_INPUT = {
    "id too large": ({"input_ids": [[5, 99]]}, "input_ids must be between 0 and 98, got 99"),
    "id negative": ({"input_ids": [[5, -1]]}, "input_ids must be between 0 and 98, got -1"),
    "no rows": ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, r"at least one token, got shape \(0, 4\)"),
    "no tokens": ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"at least one token, got shape \(2, 0\)"),
    "no embeddings": ({"inputs_embeds": torch.zeros(0, 4, 32)}, r"at least one token, got shape \(0, 4, 32\)"),
    "label too large": ({"input_ids": [[5, 6]], "labels": [[5, 99]]}, "labels must be between 0 and 98, got 99"),
    "label negative": ({"input_ids": [[5, 6]], "labels": [[-100, -7]]}, "labels must be between 0 and 98, got -7"),
    "neither": ({}, "exactly one of input_ids or inputs_embeds"),
    "both": ({"input_ids": [[5]], "inputs_embeds": torch.zeros(1, 1, 32)}, "exactly one of input_ids"),
    "positions": ({"input_ids": [[5]], "position_ids": [[512]]}, "position_ids must be between 0 and 511, got 512"),
    "too long": ({"input_ids": [[5] * 513]}, "position_ids must be between 0 and 511, got 512"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_a_clear_error(case):
    inputs, message = BAD_INPUT[case]
    inputs = {name: torch.as_tensor(value) for name, value in inputs.items()}
    for training in (False, True):
        with pytest.raises(ValueError, match=message) as error:
            build("gpt2").train(training)(**inputs)
        assert "\n" not in str(error.value)


def test_pad_label_alone_is_good_input():
    ids = draw_ids(1, 4)
    assert build()(ids, labels=torch.tensor([[-100, 5, -100, 6]])).loss.isfinite()


def test_dropout_is_off_in_evaluation_and_on_in_training():
    ids = draw_ids(1, 9)
    for name in ("embedding_dropout", "residual_dropout", "attention_dropout"):
        model = build("gpt2", **{name: 0.5})
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits), name


@torch.no_grad()
def test_a_cache_is_taken_by_its_newer_name_too(tiny_model):
    ids, cache = torch.randint(2, 90, (1, 8)), DynamicCache(config=tiny_model.config)
    model = tiny_model.eval()
    model(ids[:, :7], cache=cache)
    torch.testing.assert_close(model(ids[:, 7:], cache=cache).logits[:, -1], model(ids).logits[:, -1])
    assert cache.get_seq_length() == 8
