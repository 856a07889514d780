"""What the machine is good at decides how a model is trained, not what comes out."""

import pytest

from hf_lm import HfLmForCausalLM
from hf_lm.training import hardware


@pytest.mark.parametrize(("mlp_type", "kept"), [("plain", 1), ("gated", 2)])
def test_only_models_whose_mlps_keep_much_compute_it_twice(tiny_config, monkeypatch, mlp_type, kept):
    tiny_config.mlp_type = mlp_type
    model = HfLmForCausalLM(tiny_config)
    size = kept * 64 * tiny_config.intermediate_size * tiny_config.num_hidden_layers * 4
    for limit, expected in ((size, False), (size - 1, True)):
        monkeypatch.setattr(hardware, "KEPT_BY_MLPS", limit)
        hardware.recompute_if_large(model, 64, 4)
        assert [layer.mlp.recompute for layer in model.model.layers] == [expected, expected]


def test_attention_is_written_out_where_that_is_faster():
    assert hardware.best_attention("cpu", 512, bfloat16=True) == "eager"
    others = [("cpu", 513, True), ("cpu", 128, False), ("cuda", 128, True)]
    assert [hardware.best_attention(*other) for other in others] == [None] * 3
