"""The emulated Hub, asked by the real `huggingface_hub` client."""

import os
from pathlib import Path

import pytest

from hub_server import OWNER, READER, STRANGER, Fault
from hub_server.client import RemoteError

API = "from huggingface_hub import HfApi, CommitOperationAdd, CommitOperationDelete\napi = HfApi()\n"


def upload(client, repo: str, files: dict[str, str], **options):
    """Commit files (text, or hex with the prefix 0x) and return the commit's id."""
    return client(
        API
        + "read = lambda text: bytes.fromhex(text[2:]) if text.startswith('0x') else text.encode()\n"
        + "additions = [CommitOperationAdd(path, read(text)) for path, text in files.items()]\n"
        + "commit = api.create_commit(repo, additions, commit_message='add', **options)\n"
        + "result = [commit.oid, commit.pr_url]",
        repo=repo,
        files=files,
        options=options,
    )


def test_a_token_tells_who_one_is_and_a_wrong_one_is_refused(client):
    assert client(API + "result = api.whoami()['name']") == "owner"
    with pytest.raises(RemoteError, match="401|Invalid"):
        client(API + "api.whoami(token='hf_wrong')")


def test_a_repository_is_created_once(hub, client):
    assert client(API + "result = api.create_repo('owner/new').repo_id") == "owner/new"
    assert client(API + "result = api.create_repo('owner/new', exist_ok=True).repo_id") == "owner/new"
    with pytest.raises(RemoteError, match="409"):
        client(API + "api.create_repo('owner/new')")
    with pytest.raises(RemoteError, match="403"):
        client(API + "api.create_repo('stranger/new')")
    client(API + "api.delete_repo('owner/new')")
    assert not hub.repositories


def test_files_come_back_as_they_went(hub, client, tmp_path):
    hub.create("owner/m")
    large = "0x" + os.urandom(5000).hex()
    oid, _ = upload(client, "owner/m", {"a.txt": "Grüße", "sub/b.safetensors": large, "empty": ""})
    folder = client(
        "from huggingface_hub import snapshot_download\nresult = snapshot_download('owner/m', cache_dir=cache)",
        cache=tmp_path,
    )
    assert os.path.basename(folder) == oid
    assert Path(folder, "a.txt").read_text() == "Grüße"
    assert Path(folder, "sub/b.safetensors").read_bytes().hex() == large[2:]
    assert Path(folder, "empty").read_text() == ""
    assert not any("authorization" in h for c, h in zip(hub.calls, hub.headers, strict=True) if "/storage/" in c)


def test_a_large_file_arrives_in_parts_and_only_once(hub, client):
    hub.create("owner/m")
    hub.part_bytes = 1000
    large = "0x" + os.urandom(2500).hex()
    upload(client, "owner/m", {"w.safetensors": large})
    assert sum("PUT /storage" in call for call in hub.calls) == 3
    assert hub.files("owner/m")["w.safetensors"].hex() == large[2:]
    hub.calls.clear()
    upload(client, "owner/m", {"again.safetensors": large})
    assert not any(call.startswith("PUT") for call in hub.calls)
    assert hub.files("owner/m")["again.safetensors"].hex() == large[2:]


def test_unchanged_files_are_not_committed_and_deleted_ones_go(hub, client):
    hub.create("owner/m")
    first = upload(client, "owner/m", {"a.txt": "a", "d/b.txt": "b", "d/c.txt": "c"})
    assert upload(client, "owner/m", {"a.txt": "a"}) == first
    client(
        API
        + "api.create_commit('owner/m', [CommitOperationDelete('a.txt'), CommitOperationDelete('d/', is_folder=True)],"
        " commit_message='delete')"
    )
    assert hub.files("owner/m") == {}
    with pytest.raises(RemoteError, match="412"):
        upload(client, "owner/m", {"x": "x"}, parent_commit=first[0])


def test_branches_tags_and_pull_requests_leave_main_alone(hub, client):
    hub.create("owner/m")
    main = upload(client, "owner/m", {"a.txt": "main"})[0]
    client(API + "api.create_branch('owner/m', branch='dev/x')\napi.create_tag('owner/m', tag='v1')")
    upload(client, "owner/m", {"a.txt": "branch"}, revision="dev/x")
    _, address = upload(client, "owner/m", {"a.txt": "proposal"}, create_pr=True)
    assert address.endswith("/discussions/1")
    contents = {name: hub.files("owner/m", name)["a.txt"] for name in ("main", "dev/x", "v1", "refs/pr/1")}
    assert contents == {"main": b"main", "dev/x": b"branch", "v1": b"main", "refs/pr/1": b"proposal"}
    refs = client(
        API + "refs = api.list_repo_refs('owner/m', include_pull_requests=True)\n"
        "result = [[r.name for r in refs.branches], [r.name for r in refs.tags], [r.ref for r in refs.pull_requests]]"
    )
    assert refs == [["main", "dev/x"], ["v1"], ["refs/pr/1"]]
    read = "from huggingface_hub import hf_hub_download\nresult = open(hf_hub_download('owner/m', 'a.txt', revision=r)).read()"
    assert (
        client(read, r="dev/x") == "branch"
        and client(read, r="refs/pr/1") == "proposal"
        and client(read, r=main) == "main"
    )
    assert client(API + "result = [c.title for c in api.list_repo_commits('owner/m')]") == ["add", "initial commit"]


def test_what_is_not_there_is_named(hub, client):
    hub.create("owner/m")
    download = "from huggingface_hub import hf_hub_download\nhf_hub_download(repo, 'x', revision=revision)"
    for repo, revision, error in (
        ("owner/m", "main", "RemoteEntryNotFoundError"),
        ("owner/m", "no", "RevisionNotFoundError"),
        ("owner/none", "main", "RepositoryNotFoundError"),
    ):
        with pytest.raises(RemoteError, match=error):
            client(download, repo=repo, revision=revision)


def test_a_private_repository_is_there_for_its_owner_only(hub, client):
    hub.create("owner/secret", private=True)
    info = API + "result = api.model_info('owner/secret', token=token).private"
    assert client(info, token=OWNER) is True
    for token in (STRANGER, False):
        with pytest.raises(RemoteError, match="RepositoryNotFoundError"):
            client(info, token=token)
    with pytest.raises(RemoteError, match="403"):
        upload(client, "owner/secret", {"a": "a"}, token=READER)
    with pytest.raises(RemoteError, match="403"):
        hub.create("owner/open")
        upload(client, "owner/open", {"a": "a"}, token=STRANGER)


def test_listings_come_in_pages_with_sizes_and_the_cards_data(hub, client):
    hub.create("owner/m")
    card = "---\nlicense: mit\ntags:\n- x\n---\nText"
    upload(client, "owner/m", {"README.md": card, "w.bin": "0x00ff", **{f"d/{n:03}.txt": str(n) for n in range(120)}})
    assert client(API + "result = len(list(api.list_repo_tree('owner/m', recursive=True)))") == 124
    assert len(client(API + "result = [f.path for f in api.list_repo_tree('owner/m', 'd')]")) == 120
    sizes = "info = api.model_info('owner/m', files_metadata=True)\nresult = [info.card_data.license, info.tags, {s.rfilename: [s.size, bool(s.lfs)] for s in info.siblings}]"
    license, tags, files = client(API + sizes)
    assert (license, tags, files["w.bin"], files["d/007.txt"]) == ("mit", ["x"], [2, True], [1, False])
    assert client(API + "result = [p.path for p in api.get_paths_info('owner/m', ['w.bin', 'none'])]") == ["w.bin"]
    with pytest.raises(RemoteError, match="license"):
        upload(client, "owner/m", {"README.md": "---\nlicense: 3\n---\n"})


def test_an_interrupted_download_goes_on(hub, client, tmp_path):
    hub.create("owner/m")
    hub.put_large("owner/m", "w.safetensors", os.urandom(1000) * 24_000)  # the client keeps pieces of 10 MB
    hub.faults = [Fault("half", "GET /storage")]
    path = client(
        "from huggingface_hub import hf_hub_download\nresult = hf_hub_download('owner/m', 'w.safetensors', cache_dir=cache)",
        cache=tmp_path,
    )
    assert Path(path).read_bytes() == hub.files("owner/m")["w.safetensors"]
    assert any(headers.get("range", "").startswith("bytes=10") for headers in hub.headers)


def test_faults_are_injected_where_asked(hub, client):
    hub.create("owner/m")
    hub.faults = [Fault("503", "preupload"), Fault("slow", "commit", seconds=0.2)]
    upload(client, "owner/m", {"a.txt": "a"})
    assert sum("preupload" in call for call in hub.calls) == 2
    hub.faults = [Fault("lost", "/commit/")]
    with pytest.raises(RemoteError):
        upload(client, "owner/m", {"b.txt": "b"})
    assert set(hub.files("owner/m")) == {"a.txt", "b.txt"}


def test_xet_uploads_and_downloads(hub, xet_client, tmp_path):
    pytest.importorskip("hf_xet")
    hub.create("owner/m")
    large = "0x" + os.urandom(70_000).hex()
    path = tmp_path / "w.safetensors"
    path.write_bytes(bytes.fromhex(large[2:]))
    xet_client(
        API + "api.upload_file(path_or_fileobj=path, path_in_repo='w.safetensors', repo_id='owner/m')", path=path
    )
    assert not any("/storage/" in call for call in hub.calls)
    back = xet_client(
        "from huggingface_hub import hf_hub_download\nresult = hf_hub_download('owner/m', 'w.safetensors', cache_dir=cache)",
        cache=tmp_path / "cache",
    )
    assert Path(back).read_bytes().hex() == large[2:]
    assert not any("/storage/" in call for call in hub.calls)
