"""What leaves the machine, and whose code runs on it: with the real client, against the emulated Hub."""

import json
import shutil

import pytest
from hub_server import OWNER
from hub_server.client import Client, RemoteError

from hf_lm.errors import InputError
from hf_lm.loading import require_model

# A machine without hf_lm that generates with a model of the Hub.
USE = """
import sys
sys.modules["hf_lm"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, **options)
inputs = tokenizer("Call me", return_tensors="pt", return_token_type_ids=False)
result = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
"""
WATCH = """
import builtins, sys
builtins.left = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        builtins.left.append(repr(arguments))
sys.addaudithook(watch)
"""
PACKAGE = "import sys\nsys.modules.pop('hf_lm', None)\nimport hf_lm\nfrom hf_lm import load_model, load_tokenizer\n"


def put(hub, name: str, folder) -> str:
    """Commit a folder's files to main and return the commit."""
    repository = hub.repositories.get(name) or hub.create(name)
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            hub.put_large(name, path.name, path.read_bytes())
        else:
            tree = repository.resolve("main").tree | {path.name: hub.add_blob(path.read_bytes())}
            repository.add_commit("refs/heads/main", tree, f"put {path.name}", "owner")
    return repository.refs["refs/heads/main"]


@pytest.fixture(scope="module")
def machine(hub_server, tmp_path_factory):
    """A machine without hf_lm, online; and its home folder."""
    home = tmp_path_factory.mktemp("machine")
    client = Client(hub_server.endpoint, home, OWNER, HF_HUB_DISABLE_XET="1")
    yield client, home
    client.close()


@pytest.fixture(scope="module")
def offline_machine(hub_server, machine):
    """The same machine without a network: the cache of `machine`, in a new process."""
    client = Client(hub_server.endpoint, machine[1], OWNER, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="1")
    yield client
    client.close()


@pytest.mark.slow
def test_with_a_warm_cache_everything_works_offline_and_no_request_leaves(
    hub, machine, offline_machine, finished_folder
):
    put(hub, "owner/warm", finished_folder)
    expected = machine[0](USE, repo="owner/warm", options={})
    hub.calls.clear()
    offline_machine(WATCH)
    assert offline_machine(USE, repo="owner/warm", options={}) == expected
    assert hub.calls == [] and offline_machine("import builtins\nresult = builtins.left") == []


@pytest.mark.slow
def test_with_a_cold_cache_the_error_says_what_to_do(hub, offline_machine):
    for load in ("load_model", "load_tokenizer"):
        with pytest.raises(RemoteError, match="InputError: owner/cold: .*not in the cache.*hf download owner/cold"):
            offline_machine(PACKAGE + f"{load}('owner/cold')")
    with pytest.raises(RemoteError, match="couldn't connect|offline mode|cached"):
        offline_machine(
            "from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained('owner/cold')"
        )
    assert hub.calls == []


@pytest.mark.slow
def test_pinned_revisions_of_weights_and_code_are_honoured(hub, machine, model_folder):
    """Someone with the right to write replaces the code; who has pinned a commit keeps running what they have read."""
    good = put(hub, "owner/pinned", model_folder)
    modeling = model_folder / "modeling_hf_lm.py"
    modeling.write_text(modeling.read_text() + "\nraise RuntimeError('new code ran')\n")
    put(hub, "owner/pinned", model_folder)
    expected = machine[0](USE, repo="owner/pinned", options={"revision": good})
    assert machine[0](USE, repo="owner/pinned", options={"code_revision": good}) == expected
    with pytest.raises(RemoteError, match="new code ran"):
        machine[0](USE, repo="owner/pinned", options={})


def test_code_of_the_hub_does_not_run_unless_trusted(hub, machine, model_folder):
    modeling = model_folder / "modeling_hf_lm.py"
    modeling.write_text("raise RuntimeError('untrusted code ran')\n" + modeling.read_text())
    put(hub, "owner/untrusted", model_folder)
    with pytest.raises(RemoteError, match="trust_remote_code=True"):
        machine[0](
            USE.replace("trust_remote_code=True", "trust_remote_code=False"), repo="owner/untrusted", options={}
        )


@pytest.mark.parametrize("path", ["/evil", "../evil", "..\\evil", "C:/evil"])
def test_folders_that_name_files_outside_are_refused(model_folder, path):
    config = json.loads((model_folder / "config.json").read_text())
    copies = [shutil.copytree(model_folder, model_folder.parent / name) for name in ("code", "index", "adapter")]
    config["auto_map"]["AutoModel"] = f"{path}.Class"
    (copies[0] / "config.json").write_text(json.dumps(config))
    (copies[1] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": f"{path}.safetensors"}}))
    (copies[2] / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": path}))
    for folder in copies:
        with pytest.raises(InputError, match="outside of itself"):
            require_model(str(folder))
    assert require_model(str(model_folder))
