"""The composite optimizer does what its two halves do, and survives a checkpoint."""

import copy
from argparse import Namespace

import pytest
import torch

from hf_lm import HfLmForCausalLM
from hf_lm.errors import InputError
from hf_lm.tasks import task_class
from hf_lm.tasks.recipe import parse_recipe
from hf_lm.training.arguments import HfLmTrainingArguments
from hf_lm.training.optimizers import MuonAdamW, choose_optimizer, orthogonalize, with_muon
from hf_lm.training.trainer import HfLmTrainer


def some_parameters(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"square": (16, 16), "square2": (16, 16), "tall": (32, 16), "wide": (16, 32), "vector": (16,)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def set_gradients(parameters: dict, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def build(parameters: dict) -> MuonAdamW:
    matrices = [parameter for parameter in parameters.values() if parameter.ndim == 2]
    others = [parameter for parameter in parameters.values() if parameter.ndim != 2]
    groups = [{"params": matrices, "muon": True, "lr": 0.02, "weight_decay": 0.1}, {"params": others}]
    return MuonAdamW(groups, lr=1e-3, weight_decay=0.01)


def test_update_equals_torchs_muon_and_adamw(monkeypatch):
    # torch.optim.Muon always iterates in bfloat16: do the same whatever this CPU is good at
    monkeypatch.setattr("hf_lm.training.optimizers.has_fast_bfloat16", lambda device_type: True)
    ours, theirs = some_parameters(), some_parameters()
    optimizer = build(ours)
    matrices = [parameter for parameter in theirs.values() if parameter.ndim == 2]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95)
    adamw = torch.optim.AdamW([theirs["vector"]], lr=1e-3, weight_decay=0.01)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        muon.step()
        adamw.step()
    torch.testing.assert_close(ours["vector"], theirs["vector"], rtol=0, atol=1e-6)
    for name in ("square", "square2", "tall", "wide"):
        # an update has entries near lr / 4; bfloat16 keeps about two digits of it
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-3)


def test_orthogonalized_matrices_have_singular_values_near_one():
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(3, 24, 48, generator=torch.Generator().manual_seed(0))))
    assert singular.min() > 0.5 and singular.max() < 1.5


@pytest.mark.parametrize("shape", [(3, 64, 256), (3, 256, 64), (3, 64, 64)])
@pytest.mark.parametrize("kind", ["any", "of rank 20", "of singular values down to 1e-7"])
def test_newton_schulz_in_float32_is_exact_enough_by_way_of_the_gram_matrix(monkeypatch, shape, kind):
    monkeypatch.setattr("hf_lm.training.optimizers.has_fast_bfloat16", lambda device_type: False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, singular, vt = torch.linalg.svd(x, full_matrices=False)
    if kind != "any":
        singular[:] = torch.logspace(0, -7, 64) if kind.endswith("7") else (torch.arange(64) < 20).double()
    x = u @ singular.diag_embed() @ vt
    exact = orthogonalize(x)  # in float64: the plain iteration
    error = torch.linalg.matrix_norm(orthogonalize(x.float()) - exact) / torch.linalg.matrix_norm(exact)
    assert error.max() < 1e-3


def test_training_goes_on_exactly_from_a_state_dict():
    straight, resumed = some_parameters(), some_parameters()
    first, second = build(straight), build(resumed)
    for step in range(3):
        set_gradients(straight, step)
        first.step()
        set_gradients(resumed, step)
        second.step()
    state = copy.deepcopy(second.state_dict())
    third = build(resumed)
    third.load_state_dict(state)
    for step in range(3, 6):
        set_gradients(straight, step)
        first.step()
        set_gradients(resumed, step)
        third.step()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_muon_group_refuses_a_vector():
    with pytest.raises(ValueError, match="matrices.*16"):
        MuonAdamW([{"params": [torch.nn.Parameter(torch.zeros(16))], "muon": True}])


def test_the_trainer_hands_rate_and_momentum_to_the_layers_matrices(tiny_model, tmp_path):
    arguments = HfLmTrainingArguments(
        output_dir=str(tmp_path), learning_rate=0.003, muon_learning_rate=0.02, muon_momentum=0.7, report_to="none"
    )
    optimizer = HfLmTrainer(tiny_model, arguments).create_optimizer()
    muon, *others = optimizer.param_groups
    assert (muon["muon"], muon["lr"], muon["momentum"]) == (True, 0.02, 0.7)
    assert {id(p) for p in muon["params"]} == {id(p) for p in tiny_model.model.layers.parameters() if p.ndim == 2}
    assert [group["lr"] for group in others] == [0.003, 0.003]


@pytest.mark.parametrize("muon", [None, 0.02])
def test_states_that_are_there_from_the_beginning_change_nothing(tiny_config, tmp_path, muon):
    ids, outcomes = torch.randint(0, tiny_config.vocab_size, (2, 12)), []
    for early in (True, False):
        torch.manual_seed(0)
        arguments = HfLmTrainingArguments(
            output_dir=str(tmp_path), learning_rate=0.003, muon_learning_rate=muon, report_to="none"
        )
        model = HfLmForCausalLM(tiny_config)
        optimizer = HfLmTrainer(model, arguments).create_optimizer()
        assert optimizer.state.keys() == set(model.parameters())  # before the first gradients
        if not early:
            optimizer.state.clear()
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append((optimizer.state_dict()["state"], model.state_dict()))
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adagrad", "adafactor", "adamw_torch"])
def test_optim_trains_what_muon_does_not(tiny_config, tmp_path, name):
    """The rest is updated as by that optimizer alone, the layers' matrices by Muon; a checkpoint holds both."""
    ids = torch.randint(0, tiny_config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    outcomes = {}
    for muon in (None, 0.02, 0.03):
        torch.manual_seed(0)
        options = {"optim": name, "learning_rate": 0.003, "muon_learning_rate": muon, "report_to": "none"}
        model = HfLmForCausalLM(tiny_config)
        trainer = HfLmTrainer(model, HfLmTrainingArguments(output_dir=str(tmp_path), **options))
        optimizer = trainer.create_optimizer()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        outcomes[muon] = {key: weight.clone() for key, weight in model.state_dict().items()}
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        optimizer.step()
    by_muon = {key for key, weight in outcomes[None].items() if ".layers." in key and weight.ndim == 2}
    for key, weight in outcomes[None].items():
        assert torch.equal(outcomes[0.02][key], weight) == (key not in by_muon), key
        assert torch.equal(outcomes[0.02][key], outcomes[0.03][key]) == (key not in by_muon), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adamw_bnb_8bit", "muon_learning_rate": 0.02}, "optim: adamw_bnb_8bit: .*bitsandbytes"),
        ({"optim": "galore_adamw"}, "optim: galore_adamw: "),
        ({"optim": "sgd", "optim_args": "momentum=0.9,nmesterov=true"}, "optim_args: nmesterov is not read.* sgd"),
        ({"optim_args": "eps=1e-6"}, "optim_args: eps is not read"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim: sgd: "),
        ({"adam_beta1": 1.5}, "optim: Invalid beta"),
    ],
)
def test_what_an_optimizer_does_not_do_is_refused(tiny_model, tmp_path, changes, message):
    arguments = HfLmTrainingArguments(output_dir=str(tmp_path), report_to="none", **changes)
    with pytest.raises(InputError, match=message) as refusal:
        HfLmTrainer(tiny_model, arguments).create_optimizer()
    assert "\n" not in str(refusal.value)


def test_an_optimizer_that_is_not_known_to_go_with_muon_is_refused():
    with pytest.raises(InputError, match="muon_learning_rate: Own cannot train the rest; .* sgd"):
        with_muon(type("Own", (torch.optim.SGD,), {"__module__": "own"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler_kwargs": {"num_decay_steps": 500}}, "num_decay_steps must be 0 to 100 .*, got 500"),
        ({"lr_scheduler_kwargs": {"decay_steps": 5}}, "lr_scheduler_kwargs: .*decay_steps"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 5}}, "lr_scheduler_kwargs: .*cycles"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1}},
            "the learning rate 1.* times its value",
        ),
    ],
)
def test_schedules_that_make_no_sense_are_refused(tiny_model, tmp_path, changes, message):
    trainer = HfLmTrainer(tiny_model, HfLmTrainingArguments(output_dir=str(tmp_path), report_to="none", **changes))
    trainer.create_optimizer()
    with pytest.raises(InputError, match=message):
        trainer.create_scheduler(100)


def test_an_optimizer_of_the_registry_trains_beside_muon(recipe, tmp_path):
    keys = {"optim": "nadam", "optim_args": "momentum_decay=0.01", "max_steps": 2, "eval_strategy": "no"}
    parsed = parse_recipe(recipe(**keys, save_strategy="no", report_to="none", muon_learning_rate=0.02), [])
    task = task_class("causal-lm")(*parsed)
    trainer = task.build_trainer(task.prepare())
    assert trainer.train().training_loss > 0
    optimizer = trainer.optimizer.optimizer  # inside of accelerate's
    assert isinstance(optimizer, torch.optim.NAdam) and type(optimizer).__name__ == "MuonNAdam"
    assert {group.get("muon") for group in optimizer.param_groups} == {True, False}
    assert optimizer.param_groups[-1]["momentum_decay"] == 0.01


def test_an_unknown_optimizer_is_refused_with_those_there_are(recipe):
    with pytest.raises(InputError, match="optim: must be one of adamw_torch, .*nadam, got 'nadm'"):
        parse_recipe(recipe(optim="nadm"), [])


@pytest.mark.parametrize("fp16", [True, False])
def test_in_float16_the_scaler_decides_for_muon_too(fp16):
    """A fused optimizer would be called with infinite gradients, and skip them for its own parameters only."""
    arguments = Namespace(
        muon_learning_rate=0.02, muon_momentum=0.95, weight_decay=0.0, fp16=fp16, deepspeed=None, learning_rate=0.01
    )
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4)})
    model.matrix_parameters = lambda: [model["layer"].weight]
    kind, options = choose_optimizer(arguments, model, [], (torch.optim.AdamW, {"lr": 0.01, "fused": True}))
    assert options["fused"] is not fp16 and issubclass(kind, MuonAdamW)
