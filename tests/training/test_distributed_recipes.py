"""What recipes/distributed ships: configurations of accelerate and DeepSpeed, and a Slurm script."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from hf_lm.errors import InputError

CONFIGS = {"one_gpu": 1, "fsdp2_8_gpus": 8, "two_nodes": 16, "zero3": 8}


def parsed(path: Path):
    """The arguments of `accelerate launch --config_file PATH -m hf_lm train RECIPE.yaml`, as it reads them."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    words = ["--config_file", str(path), "-m", "hf_lm", "train", "RECIPE.yaml"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


@pytest.fixture
def configs(repository, monkeypatch) -> Path:
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(repository)
    return repository / "recipes" / "distributed"


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_takes_each_configuration(configs, name):
    arguments = parsed(configs / f"{name}.yaml")
    assert arguments.num_processes == CONFIGS[name]
    assert arguments.num_machines == (2 if name == "two_nodes" else 1)
    assert arguments.use_fsdp == (name in ("fsdp2_8_gpus", "two_nodes"))
    assert arguments.use_deepspeed == (name == "zero3")
    assert arguments.mixed_precision == "no"  # it would win over the recipe's `bf16: false`
    assert (arguments.training_script, arguments.training_script_args) == ("hf_lm", ["train", "RECIPE.yaml"])
    assert sorted(CONFIGS) == sorted(path.stem for path in configs.glob("*.yaml"))


@pytest.mark.parametrize("name", ["fsdp2_8_gpus", "two_nodes"])
def test_fsdp_shards_each_decoder_layer_and_saves_whole_models(configs, name, monkeypatch, tiny_model):
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = parsed(configs / f"{name}.yaml")
    arguments.main_process_port = 0
    for variable, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    plugin.set_auto_wrap_policy(tiny_model)
    wrap = fsdp2_prepare_auto_wrap_policy(plugin, tiny_model)
    assert [name for name, module in tiny_model.named_modules() if wrap(module)] == [
        "model.layers.0",
        "model.layers.1",
    ]


def test_zero3_leaves_to_the_recipe_what_the_recipe_says(configs):
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    path = configs / "zero3.json"
    assert parsed(configs / "zero3.yaml").deepspeed_config_file == str(path.relative_to(configs.parents[1]))
    config = HfDeepSpeedConfig(str(path))
    assert config.is_zero3() and not config.is_offload()
    assert config.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save")
    for key in ("train_batch_size", "gradient_clipping", "bf16.enabled"):
        assert config.get_value(key) == "auto"
    assert "optimizer" not in config.config and "scheduler" not in config.config


def test_muon_with_deepspeed_is_refused_in_words():
    from hf_lm.training.optimizers import choose_optimizer

    arguments = Namespace(muon_learning_rate=0.02, deepspeed="zero.json")
    with pytest.raises(InputError, match="^muon_learning_rate: needs whole matrices, which DeepSpeed flattens"):
        choose_optimizer(arguments, None, [])


@pytest.mark.parametrize("state", ["optimizer.pt", "optimizer.bin", "global_step4/zero_pp_rank_0_optim_states.pt"])
def test_a_checkpoint_of_each_way_of_sharding_is_complete(tmp_path, state):
    from hf_lm.training.checkpoints import require_complete

    for name in ("trainer_state.json", "model.safetensors", "scheduler.pt", "rng_state_0.pth"):
        (tmp_path / name).touch()
    (tmp_path / "manifest.json").write_text('{"progress": {}}')
    with pytest.raises(InputError, match="lacks the optimizer's state"):
        require_complete(tmp_path, {})
    (tmp_path / state).parent.mkdir(exist_ok=True)
    (tmp_path / state).touch()
    require_complete(tmp_path, {})


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
def test_two_launchers_with_the_configuration_of_two_nodes_find_each_other(recipe, configs, tmp_path):
    path = recipe(max_steps=2, eval_strategy="no", save_strategy="no", sample_prompts=None, muon_learning_rate=None)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    on_two = [*launch, str(configs / "two_nodes.yaml"), "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    on_two += ["--main_process_port", free_port()]
    train = ["-m", "hf_lm", "train", path, "--bf16", "false"]
    nodes = [
        subprocess.Popen([*on_two, "--machine_rank", rank, *train], stderr=subprocess.PIPE, text=True) for rank in "01"
    ]
    said = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "fsdp: not on a CPU" in said[0] and "fsdp: not" not in said[1]  # there are no GPUs here
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["processes"] == 2


# What stands in for Slurm: processes of this machine, with Slurm's variables; the largest exit code is srun's.
SRUN = """#!/bin/bash
[ "$1" = --overlap ] && count=1 || count=$SLURM_NTASKS
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((task = 0; task < count; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" &
    tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do wait "$task"; code=$?; [ $code -gt $worst ] && worst=$code; done
exit $worst
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >>"$SCONTROL_LOG"; fi
"""


@pytest.mark.slow
def test_slurm_script_saves_on_its_signal_requeues_and_goes_on(recipe, configs, tmp_path):
    script = configs / "train.slurm"
    subprocess.run(["bash", "-n", str(script)], check=True)
    tools, log = tmp_path / "bin", tmp_path / "scontrol.log"
    tools.mkdir()
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SCONTROL_LOG": str(log), "SLURM_JOB_ID": free_port(),
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "PYTHONPATH": str(configs.parents[1]),
    }  # fmt: skip
    options = {
        "eval_strategy": "no",
        "save_steps": 10_000,
        "sample_prompts": None,
        "dataloader_num_workers": 1,
        "muon_learning_rate": None,
    }
    path, output = recipe(max_steps=150, **options), tmp_path / "out"
    job = subprocess.Popen(
        ["bash", str(script), path, str(output)], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 180
    while not list(output.glob("runs/**/events*")) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(0.5)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=120)[1]
    assert job.returncode == 143, said
    assert log.read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    (checkpoint,) = output.glob("checkpoint-*")
    assert 0 < int(checkpoint.name.split("-")[1]) < 150
    again = subprocess.run(
        ["bash", str(script), path, str(output)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert again.returncode == 0, again.stderr
    assert json.loads((output / "metrics.json").read_text())["steps"] == 150
    assert log.read_text().count("requeue") == 1
