"""`hf-lm push`, `push_to_hub` and `Trainer(push_to_hub=True)` against the emulated Hub."""

import json
import re
from pathlib import Path

import pytest
from hub_server import OWNER, READER, Fault
from hub_server.client import RemoteError

from hf_lm.cli import main
from hf_lm.errors import InputError
from hf_lm.hub.push import plan_push
from hf_lm.training.checkpoints import UNCOMMITTED
from hf_lm.training.manifest import MANIFEST

PUSH = "import hf_lm.cli\nresult = hf_lm.cli.main(['push', *map(str, arguments)])"
# Planned once: the checks of the folder need seconds that a test of faults would spend at each of its pushes.
PLAN = "import hf_lm\nfrom hf_lm.hub.push import plan_push, push\nplan = plan_push(folder)\n"
PLANNED = "import builtins\nfrom hf_lm.hub.push import push\nresult = push(builtins.plan, 'owner/m')"
# The client waits seconds between two tries. It still tries as often here.
IMPATIENT = "import time, builtins\nbuiltins.sleep = time.sleep\ntime.sleep = lambda seconds: builtins.sleep(min(seconds, 0.01))"
PATIENT = "import time, builtins\ntime.sleep = builtins.sleep"
ALL_CALLS = (
    "repos/create",
    "GET /api/models/owner/m",
    "validate-yaml",
    "preupload",
    "batch",
    "PUT",
    "verify",
    "commit",
)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def impatient_client(client, model_folder):
    client("import builtins\n" + PLAN + "builtins.plan = plan", folder=model_folder)
    client(IMPATIENT)
    yield client
    client(PATIENT)


def test_a_push_is_one_commit_of_all_files_of_the_model(hub, client, model_folder):
    expected = contents(model_folder)
    (model_folder / "training_args.bin").write_bytes(b"pickle")
    (model_folder / ".cache").mkdir()
    (model_folder / "checkpoint-5").mkdir()
    (model_folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"pickle")
    assert client(PUSH, arguments=[model_folder.as_posix(), "owner/m"]) == 0
    assert hub.files("owner/m") == expected
    assert len(hub.repositories["owner/m"].commits) == 2
    for line in ("training_args.bin", "checkpoint-5/", ".cache/"):
        assert f"stays at home  {line}" in client.output
    assert f"{len(expected['model.safetensors']):,}  model.safetensors" in client.output
    assert OWNER not in client.output


def test_a_pushed_model_loads_without_a_word_about_hf_lm(hub, client, model_folder):
    client(PUSH, arguments=[model_folder.as_posix(), "owner/m", "--private"])
    assert hub.repositories["owner/m"].private
    same = client(
        "import torch, hf_lm\nfrom transformers import AutoModelForCausalLM\n"
        "left, right = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ('owner/m', folder))\n"
        "result = all(torch.equal(left[key], right[key]) for key in right)",
        folder=model_folder,
    )
    assert same


def test_a_push_to_a_branch_or_as_a_pull_request_leaves_main_alone(hub, client, model_folder):
    folder = model_folder.as_posix()
    assert client(PUSH, arguments=[folder, "owner/m", "--revision", "dev"]) == 0
    assert client(PUSH, arguments=[folder, "owner/m", "--create-pr"]) == 0
    assert client.output.splitlines()[-1].endswith("/owner/m/discussions/1")
    assert hub.files("owner/m") == {}
    assert hub.files("owner/m", "dev") == hub.files("owner/m", "refs/pr/1") == contents(model_folder)
    assert client(PUSH, arguments=[folder, "owner/m", "--create-pr", "--revision", "dev"]) == 2


def test_a_dry_run_sends_nothing(hub, client, model_folder):
    assert client(PUSH, arguments=[model_folder.as_posix(), "owner/m", "--dry-run"]) == 0
    assert "model.safetensors" in client.output
    assert hub.calls == []


@pytest.mark.parametrize("repo", ["a b/c", "name", "a/b/c", "x/y--z", "owner/n.git", f"owner/{'n' * 100}"])
def test_a_name_that_the_hub_does_not_take_is_refused_before_anything_is_looked_at(repo, capsys):
    assert main(["push", "nowhere", repo, "--dry-run"]) == 2
    assert "OWNER/NAME: " in capsys.readouterr().err


def test_private_files_do_not_go_to_a_public_repository(hub, client, model_folder):
    hub.create("owner/m")
    before = hub.state()
    assert client(PUSH, arguments=[model_folder.as_posix(), "owner/m", "--private"]) == 2
    assert "is public" in client.output and hub.state() == before


def test_a_folder_that_is_not_ready_is_not_pushed(model_folder, capsys):
    (model_folder / "generation_config.json").unlink()
    (model_folder / "notes.txt").write_text(f"token: {OWNER}")
    metrics = json.loads((model_folder / "metrics.json").read_text()) | {"bits_per_byte": 1.0}
    (model_folder / "metrics.json").write_text(json.dumps(metrics))
    readme = model_folder / "README.md"
    readme.write_text(readme.read_text().replace("license: mit\n", ""))
    with pytest.raises(InputError) as error:
        plan_push(model_folder)
    for part in (
        "no generation_config.json",
        "no license",
        "bits_per_byte is not what",
        "notes.txt holds a secret",
    ):
        assert part in str(error.value)
    assert OWNER not in str(error.value)
    assert main(["push", str(model_folder), "owner/m"]) == 2
    assert "not ready" in capsys.readouterr().err


@pytest.mark.parametrize(
    "secret", ["sk-" + "a" * 40, "ghp_" + "b" * 36, "-----BEGIN RSA PRIVATE KEY-----", "my own token"]
)
def test_secrets_are_found_wherever_they_lie(model_folder, secret):
    (model_folder / "config.json").write_text((model_folder / "config.json").read_text()[:-2] + f', "x": "{secret}"}}')
    with pytest.raises(InputError, match="config.json holds a secret"):
        plan_push(model_folder, token="my own token")


def test_a_token_without_the_right_to_write_changes_nothing_and_is_not_shown(hub, client, model_folder):
    hub.create("owner/m")
    before = hub.state()
    code = PLAN + "push(plan, 'owner/m', token=token)"
    with pytest.raises(RemoteError, match="403.*It is unchanged; .*hf auth login") as error:
        client(code, folder=model_folder, token=READER)
    assert hub.state() == before and READER not in str(error.value) + client.output


@pytest.mark.parametrize("kind", ["503", "cut", "lost"])
@pytest.mark.parametrize("call", ALL_CALLS)
def test_nothing_is_lost_or_half_committed_whatever_breaks_once(hub, impatient_client, model_folder, call, kind):
    hub.create("owner/m")
    before = hub.state()
    hub.faults = [Fault(kind, call)]
    try:
        impatient_client(PLANNED)
    except RemoteError as error:
        arrived = hub.state() != before
        assert arrived == (kind == "lost" and call == "commit")
        assert re.search("Yet it is now at commit" if arrived else "Nothing was sent|is unchanged", str(error))
        assert "run the same command again" in str(error)
        assert impatient_client(PLANNED)
    assert hub.files("owner/m") == contents(model_folder)
    assert len(hub.repositories["owner/m"].commits) == 2


@pytest.mark.parametrize("call", ALL_CALLS)
def test_a_hub_that_stays_down_leaves_the_remote_as_it_was(hub, impatient_client, model_folder, call):
    hub.create("owner/m")
    before = hub.state()
    hub.faults = [Fault("503", call, times=100)]
    try:
        impatient_client(PLANNED)
    except RemoteError as error:
        assert "503" in str(error) and hub.state() == before
        hub.faults = []
        impatient_client(PLANNED)
    assert hub.files("owner/m") == contents(model_folder)


def test_an_interrupted_upload_goes_on_where_it_stopped(hub, impatient_client, model_folder):
    hub.create("owner/m")
    hub.faults = [Fault("503", "commit")]
    with pytest.raises(RemoteError, match="not sent again"):
        impatient_client(PLANNED)
    assert any(call.startswith("PUT") for call in hub.calls)
    hub.calls.clear()
    impatient_client(PLANNED)
    assert not any(call.startswith("PUT") for call in hub.calls)
    assert hub.files("owner/m") == contents(model_folder)


def test_a_slow_hub_is_waited_for(hub, client, model_folder):
    hub.faults = [Fault("slow", times=100, seconds=0.2)]
    assert client(PUSH, arguments=[model_folder.as_posix(), "owner/m"]) == 0
    assert hub.files("owner/m") == contents(model_folder)


@pytest.mark.slow
def test_a_push_over_xet(hub, xet_client, model_folder, tmp_path):
    pytest.importorskip("hf_xet")
    assert xet_client(PUSH, arguments=[model_folder.as_posix(), "owner/m"]) == 0
    folder = xet_client(
        "from huggingface_hub import snapshot_download\nresult = snapshot_download('owner/m', cache_dir=cache)",
        cache=tmp_path / "cache",
    )
    arrived = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".gitattributes"}
    assert arrived == contents(model_folder)
    assert not any("/storage/" in call for call in hub.calls)


def test_push_to_hub_forgets_no_file_and_sends_no_pickle(hub, client, model_folder):
    client(
        "import hf_lm\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "AutoModelForCausalLM.from_pretrained(folder).push_to_hub('owner/m')\n"
        "AutoTokenizer.from_pretrained(folder).push_to_hub('owner/m')",
        folder=model_folder,
    )
    expected = contents(model_folder)
    assert set(hub.files("owner/m")) == set(expected) - {"metrics.json"}
    for name in ("model.safetensors", "modeling_hf_lm.py", "configuration_hf_lm.py", "tokenizer.json"):
        assert hub.files("owner/m")[name] == expected[name]
    assert (
        json.loads(hub.files("owner/m")["config.json"])["auto_map"] == json.loads(expected["config.json"])["auto_map"]
    )


TRAINERS = {
    "stock": "from transformers import Trainer, TrainingArguments\n",
    "ours": "from hf_lm.training.arguments import HfLmTrainingArguments as TrainingArguments\n"
    "from hf_lm.training.trainer import HfLmTrainer as Trainer\n",
}


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
@pytest.mark.parametrize(
    ("protocol", "trainer"),
    [("client", "stock"), pytest.param("xet_client", "stock", marks=pytest.mark.slow), ("client", "ours")],
)
def test_every_push_of_the_trainer_is_complete_and_free_of_its_pickles(
    hub, request, protocol, trainer, strategy, model_folder
):
    client = request.getfixturevalue(protocol)
    client(
        "import hf_lm, torch\nfrom hf_lm.hub.push import PushCallback\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        + TRAINERS[trainer]
        + "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)\n"
        "arguments = TrainingArguments(out, max_steps=2, save_steps=1, push_to_hub=True, hub_model_id='owner/m',"
        " hub_strategy=strategy, hub_always_push=True, report_to='none', use_cpu=True, disable_tqdm=True)\n"
        "rows = [{'input_ids': torch.arange(8), 'labels': torch.arange(8)}] * 8\n"
        "trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[PushCallback()])\n"
        "trainer.train()\ntrainer.push_to_hub()",
        folder=model_folder,
        out=model_folder.parent / "out",
        strategy=strategy,
    )
    repository = hub.repositories["owner/m"]
    pushes = [c for c in repository.commits.values() if "model.safetensors" in c.tree]
    assert len(pushes) >= 2  # the one after training, and one or more before (in the background)
    for commit in pushes:
        assert {"modeling_hf_lm.py", "configuration_hf_lm.py", "config.json", "tokenizer.json"} <= set(commit.tree)
        assert not any(path.endswith("training_args.bin") for path in commit.tree)
        assert not any(path.startswith(("_", ".saving")) for path in commit.tree)  # a checkpoint that is being saved
        assert not any(path.endswith((".bin", ".pt", ".pth")) for path in commit.tree if "/" not in path)
    if trainer == "ours":
        assert b"Every number on this page was read from a file" in hub.files("owner/m")["README.md"]
        assert b"# owner/m" in hub.files("owner/m")["README.md"]
    if strategy == "checkpoint":
        pushed = set(repository.resolve("main").tree)
        assert {"last-checkpoint/optimizer.pt", "last-checkpoint/modeling_hf_lm.py"} <= pushed
        if trainer == "ours":  # uploads run in the background: what they list is committed, and stays
            for commit in (c for c in pushes if "last-checkpoint/optimizer.pt" in c.tree):
                assert f"last-checkpoint/{MANIFEST}" in commit.tree
                assert f"last-checkpoint/{UNCOMMITTED}" not in commit.tree
