"""
The Hub's HTTP interface over a `HubStore`, as `huggingface_hub` 2.x speaks it.

The API answers at `http://127.0.0.1:PORT`, large files at `http://localhost:PORT`: another origin, as on the Hub, so
that the client takes `X-Repo-Commit` from the redirect instead of following it, and sends no token to the storage.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import tempfile
import threading
import time
from urllib.parse import unquote

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import xet
from .store import LFS_BYTES, LFS_PATTERN, Blob, Commit, Fault, HubStore, Repository, is_ignored

PAGE = 50  # entries of a tree listing in one answer


def refuse(status: int, message: str, code: str | None = None, **headers: str) -> HTTPException:
    """An error as the Hub gives it: the client reads the headers, a person the body."""
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}
    return HTTPException(status, message, headers)


class Hub:
    """The endpoints. Path parameters arrive percent-encoded, since a revision may hold a slash."""

    def __init__(self, store: HubStore):
        self.store = store

    # ---- who asks, for what

    def user(self, request: Request) -> tuple[str | None, bool]:
        """The user that the token stands for (None: no token) and whether it may write."""
        header = request.headers.get("authorization")
        if header is None:
            return None, False
        if header.removeprefix("Bearer ") not in self.store.tokens:
            raise refuse(401, "Invalid credentials in Authorization header")
        return self.store.tokens[header.removeprefix("Bearer ")]

    def repository(self, request: Request, write: bool = False) -> Repository:
        """The repository of the path, if the user may know of it (and write to it, or propose)."""
        user, may_write = self.user(request)
        owner, name = request.path_params["owner"], request.path_params["name"]
        repository = self.store.repositories.get(f"{owner}/{name}")
        if repository is None or (repository.private and user != owner):
            raise refuse(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise refuse(401, "Invalid username or password.")
        is_proposal = request.query_params.get("create_pr") == "1"
        if write and not (may_write and (user == owner or is_proposal)):
            raise refuse(403, "You don't have the required permissions to perform this operation.")
        return repository

    def commit_at(self, request: Request, repository: Repository, revision: str | None = None) -> Commit:
        revision = unquote(revision or request.path_params.get("revision", "main"))
        commit = repository.resolve(revision)
        if commit is None:
            raise refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def storage(self, request: Request) -> str:
        return f"http://localhost:{request.url.port}"

    def endpoint(self, request: Request) -> str:
        return f"http://127.0.0.1:{request.url.port}"

    # ---- users and repositories

    async def whoami(self, request: Request) -> Response:
        user, may_write = self.user(request)
        if user is None:
            raise refuse(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write" if may_write else "read"}
        return JSONResponse(
            {
                "type": "user",
                "id": user,
                "name": user,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    async def create_repository(self, request: Request) -> Response:
        user, may_write = self.user(request)
        body = await request.json()
        owner = body.get("organization") or user
        if user is None:
            raise refuse(401, "Invalid username or password.")
        if not may_write or owner != user:
            raise refuse(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{body['name']}"
        answer = {"url": f"{self.endpoint(request)}/{name}", "name": name}
        if name in self.store.repositories:
            message = "You already created this model repo"
            return JSONResponse(answer | {"error": message}, 409, {"X-Error-Message": message})
        private = body.get("visibility") == "private" or body.get("private") is True
        self.store.create(name, private)
        return JSONResponse(answer)

    async def delete_repository(self, request: Request) -> Response:
        body = await request.json()
        request.scope["path_params"] = {
            "owner": body.get("organization") or self.user(request)[0],
            "name": body["name"],
        }
        del self.store.repositories[self.repository(request, write=True).name]
        return Response()

    async def model_info(self, request: Request) -> Response:
        repository = self.repository(request)
        commit = self.commit_at(request, repository)
        blobs = request.query_params.get("blobs") in ("true", "True", "1")
        siblings = [
            {"rfilename": path, **(self.entry(path, blob, "blobId") if blobs else {})}
            for path, blob in sorted(commit.tree.items())
        ]
        data = self.card_data(commit)
        return JSONResponse(
            {
                "_id": commit.oid[:24],
                "id": repository.name,
                "modelId": repository.name,
                "author": repository.name.split("/")[0],
                "sha": commit.oid,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "private": repository.private,
                "disabled": False,
                "gated": False,
                "downloads": 0,
                "likes": 0,
                "tags": list(data.get("tags") or ()),
                "pipeline_tag": data.get("pipeline_tag"),
                "library_name": data.get("library_name"),
                "cardData": data,
                "siblings": siblings,
            }
        )

    def card_data(self, commit: Commit) -> dict:
        blob = commit.tree.get("README.md")
        match = re.match(r"---\n(.*?\n)---\n", self.store.content(blob).decode(), re.DOTALL) if blob else None
        return yaml.safe_load(match[1]) if match else {}

    async def validate_yaml(self, request: Request) -> Response:
        content = (await request.json())["content"]
        match = re.match(r"---\r?\n(.*?\r?\n)---", content, re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        errors = []
        if isinstance(data, dict) and "license" in data and not isinstance(data["license"], str | list):
            errors = [{"message": '"license" must be a string'}]
        return JSONResponse({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    # ---- reading

    def entry(self, path: str, blob: Blob, oid: str = "oid") -> dict:
        entry = {"type": "file", "path": path, "size": blob.size, oid: blob.oid}
        if blob.sha256:
            key = "sha256" if oid == "blobId" else "oid"
            entry["lfs"] = {key: blob.sha256, "size": blob.size, "pointerSize": 134}
            entry["xetHash"] = xet.hash_of(self.store, blob.sha256)
        return {key: value for key, value in entry.items() if value is not None}

    async def tree(self, request: Request) -> Response:
        repository = self.repository(request)
        commit = self.commit_at(request, repository)
        prefix = unquote(request.path_params.get("path", "")).strip("/")
        below = {path: blob for path, blob in commit.tree.items() if not prefix or path.startswith(f"{prefix}/")}
        if prefix and not below:
            raise refuse(404, f"{prefix} does not exist", "EntryNotFound")
        recursive = request.query_params.get("recursive") in ("true", "True", "1")
        entries, folders = [], set()
        for path, blob in sorted(below.items()):
            rest = path[len(prefix) :].strip("/").split("/")
            for depth in range(1, len(rest)):
                folders.add("/".join(filter(None, [prefix, *rest[:depth]])))
            if recursive or len(rest) == 1:
                entries.append(self.entry(path, blob))
        for folder in sorted(folders):
            if recursive or "/" not in folder[len(prefix) :].strip("/"):
                entries.append({"type": "directory", "path": folder, "oid": hashlib.sha1(folder.encode()).hexdigest()})
        start = int(request.query_params.get("cursor", 0))
        headers = {}
        if start + PAGE < len(entries):
            following = request.url.include_query_params(cursor=start + PAGE)
            headers["Link"] = f'<{following}>; rel="next"'
        return JSONResponse(entries[start : start + PAGE], headers=headers)

    async def paths_info(self, request: Request) -> Response:
        repository = self.repository(request)
        commit = self.commit_at(request, repository)
        if request.headers.get("content-type", "").startswith("application/json"):
            paths = (await request.json())["paths"]
        else:
            paths = (await request.form()).getlist("paths")
        return JSONResponse([self.entry(path, commit.tree[path]) for path in paths if path in commit.tree])

    async def refs(self, request: Request) -> Response:
        repository = self.repository(request)

        def listed(prefix: str) -> list[dict]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in repository.refs.items()
                if ref.startswith(prefix)
            ]

        pull_requests = listed("refs/pr/") if request.query_params.get("include_prs") else []
        return JSONResponse(
            {
                "branches": listed("refs/heads/"),
                "converts": [],
                "tags": listed("refs/tags/"),
                "pullRequests": pull_requests,
            }
        )

    async def commits(self, request: Request) -> Response:
        repository = self.repository(request)
        commit, history = self.commit_at(request, repository), []
        while commit is not None:
            authors = [{"user": commit.author}]
            history.append(
                {
                    "id": commit.oid,
                    "title": commit.title,
                    "message": commit.message,
                    "authors": authors,
                    "date": "2026-01-01T00:00:00.000Z",
                }
            )
            commit = repository.commits.get(commit.parent)
        return JSONResponse(history)

    async def resolve(self, request: Request) -> Response:
        repository = self.repository(request)
        commit = self.commit_at(request, repository)
        path = unquote(request.path_params["path"])
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        blob = commit.tree.get(path)
        if blob is None:
            raise refuse(404, "Entry not found", "EntryNotFound", **headers)
        headers["ETag"] = f'"{blob.etag}"'
        if blob.sha256 is None:
            return self.partial(request, self.store.content(blob), headers)
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        xet_hash = xet.hash_of(self.store, blob.sha256)
        if xet_hash:
            token_url = f"{self.endpoint(request)}/api/models/{repository.name}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": xet_hash, "Link": f'<{token_url}>; rel="xet-auth"'}
        headers["Location"] = f"{self.storage(request)}/storage/{blob.sha256}"
        return Response(status_code=302, headers=headers)

    def partial(self, request: Request, content: bytes, headers: dict[str, str]) -> Response:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if match is None:
            return Response(content, headers=headers)
        start, end = int(match[1]), int(match[2]) + 1 if match[2] else len(content)
        headers = headers | {"Content-Range": f"bytes {start}-{min(end, len(content)) - 1}/{len(content)}"}
        return Response(content[start:end], 206, headers)

    async def stored(self, request: Request) -> Response:
        """A large file from the storage: the address is the permission, as with a signed one."""
        sha256 = request.path_params["sha256"]
        if sha256 not in self.store.large:
            raise HTTPException(404)
        return self.partial(request, self.store.large[sha256], {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    # ---- writing

    async def preupload(self, request: Request) -> Response:
        repository = self.repository(request, write=True)
        commit = self.commit_at(request, repository)
        body, answer = await request.json(), []
        ignored = commit.tree.get(".gitignore")
        gitignore = body.get("gitIgnore", self.store.content(ignored).decode() if ignored else "")
        for file in body["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            is_large = LFS_PATTERN.search(path) or file["size"] > LFS_BYTES or b"\0" in sample
            present = commit.tree.get(path)
            answer.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if is_large else "regular",
                    "shouldIgnore": is_ignored(path, gitignore),
                    "oid": present.etag if present else None,
                }
            )
        return JSONResponse({"files": answer, "commitOid": commit.oid})

    async def lfs_batch(self, request: Request) -> Response:
        repository = self.repository(request, write=True)
        body = await request.json()
        objects = []
        for item in body["objects"]:
            sha256, size = item["oid"], item["size"]
            answer = {"oid": sha256, "size": size}
            if sha256 not in repository.large:
                verify = {"href": f"{self.endpoint(request)}/{repository.name}.git/info/lfs/objects/verify"}
                href = f"{self.storage(request)}/storage/{sha256}"
                upload = {"href": href}
                if size > self.store.part_bytes and "multipart" in body["transfers"]:
                    parts = range(1, -(-size // self.store.part_bytes) + 1)
                    header = {"chunk_size": str(self.store.part_bytes)}
                    upload = {"href": f"{href}/complete", "header": header | {f"{n:05}": f"{href}/{n}" for n in parts}}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return JSONResponse({"transfer": "basic", "objects": objects}, media_type="application/vnd.git-lfs+json")

    async def put_large(self, request: Request) -> Response:
        sha256, content = request.path_params["sha256"], await request.body()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise HTTPException(400, "the content does not have the announced SHA-256")
        self.store.large[sha256] = content
        return Response()

    async def put_part(self, request: Request) -> Response:
        content = await request.body()
        self.store.parts[request.path_params["sha256"], int(request.path_params["part"])] = content
        return Response(headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    async def complete_parts(self, request: Request) -> Response:
        sha256, body = request.path_params["sha256"], await request.json()
        numbers = [part["partNumber"] for part in body["parts"]]
        contents = [self.store.parts.get((sha256, number)) for number in numbers]
        etags = [content is not None and f'"{hashlib.md5(content).hexdigest()}"' for content in contents]
        if etags != [part["etag"] for part in body["parts"]]:
            raise HTTPException(400, "a part is missing or has another ETag")
        content = b"".join(contents)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise HTTPException(400, "the parts do not add up to the announced SHA-256")
        self.store.large[sha256] = content
        return JSONResponse({})

    async def verify_large(self, request: Request) -> Response:
        repository = self.repository(request, write=True)
        body = await request.json()
        if len(self.store.large.get(body["oid"], b"")) != body["size"]:
            raise refuse(404, "LFS object not found")
        repository.large.add(body["oid"])
        return JSONResponse({})

    async def commit(self, request: Request) -> Response:
        repository = self.repository(request, write=True)
        revision, is_proposal = unquote(request.path_params["revision"]), request.query_params.get("create_pr") == "1"
        base = self.commit_at(request, repository)
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line]
        if not lines or lines[0]["key"] != "header":
            raise refuse(400, "the first line must be the header")
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, base.oid):
            raise refuse(412, "A commit has happened since. Please refresh and try again.")
        ref = None if is_proposal else repository.ref_of(revision)
        if ref is None and not is_proposal:
            raise refuse(400, f"{revision} is not a branch")
        tree = dict(base.tree)
        for line in lines[1:]:
            self.apply(repository, tree, line["key"], line["value"])
        answer = {"success": True}
        if is_proposal:
            number = next(self.store.pull_requests)
            ref = f"refs/pr/{number}"
            repository.refs[ref] = base.oid
            answer["pullRequestUrl"] = f"{self.endpoint(request)}/{repository.name}/discussions/{number}"
        commit = repository.add_commit(
            ref, tree, header["summary"], self.user(request)[0], header.get("description", "")
        )
        address = f"{self.endpoint(request)}/{repository.name}/commit/{commit.oid}"
        return JSONResponse(answer | {"commitUrl": address, "commitOid": commit.oid})

    def apply(self, repository: Repository, tree: dict[str, Blob], key: str, value: dict) -> None:
        path = value["path"]
        if key == "file":
            tree[path] = self.store.add_blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            sha256 = value["oid"]
            if sha256 not in repository.large and not xet.hash_of(self.store, sha256):
                raise refuse(400, f"LFS pointer pointed to a file that does not exist: {path}")
            size = len(self.store.large[sha256]) if sha256 in self.store.large else value["size"]
            tree[path] = Blob.large(sha256, size)
        elif key == "deletedFile":
            if tree.pop(path, None) is None:
                raise refuse(404, f"{path} does not exist", "EntryNotFound")
        elif key == "deletedFolder":
            for name in [name for name in tree if name.startswith(path.rstrip("/") + "/")]:
                del tree[name]
        else:
            raise refuse(400, f"unknown operation {key}")

    async def branch(self, request: Request) -> Response:
        return await self.new_ref(request, "refs/heads/", "startingPoint")

    async def tag(self, request: Request) -> Response:
        return await self.new_ref(request, "refs/tags/", None)

    async def new_ref(self, request: Request, prefix: str, start: str | None) -> Response:
        repository = self.repository(request, write=True)
        body = await request.json() if await request.body() else {}
        name = unquote(request.path_params["revision"]) if start else body["tag"]
        ref = f"{prefix}{name}"
        if request.method == "DELETE":
            repository.refs.pop(f"{prefix}{unquote(request.path_params['revision'])}")
            return Response()
        if ref in repository.refs:
            raise refuse(409, f"Reference already exists: {ref}")
        point = body.get(start, "main") if start else request.path_params["revision"]
        repository.refs[ref] = self.commit_at(request, repository, point).oid
        return JSONResponse({})

    async def discussions(self, request: Request) -> Response:
        repository = self.repository(request)
        body, number = await request.json(), next(self.store.pull_requests)
        if body.get("pullRequest"):
            repository.refs[f"refs/pr/{number}"] = repository.refs["refs/heads/main"]
        return JSONResponse({"num": number, "pullRequest": bool(body.get("pullRequest"))})

    async def discussion(self, request: Request) -> Response:
        number = int(request.path_params["number"])
        return JSONResponse(
            {"num": number, "title": "", "author": {"name": "owner"}, "isPullRequest": True, "status": "open",
             "createdAt": "2026-01-01T00:00:00.000Z", "events": [], "diffUrl": "", "filesWithConflicts": [],
             "changes": {"base": "refs/heads/main"}}
        )  # fmt: skip

    async def xet_token(self, request: Request) -> Response:
        kind = request.path_params["kind"]
        self.repository(request, write=kind == "write")
        return xet.token(self.store)

    def app(self) -> Starlette:
        repo = "/api/models/{owner}/{name}"
        lfs = "/{owner}/{name}.git/info/lfs/objects"
        routes = [
            ("GET", "/api/whoami-v2", self.whoami),
            ("POST", "/api/repos/create", self.create_repository),
            ("DELETE", "/api/repos/delete", self.delete_repository),
            ("POST", "/api/validate-yaml", self.validate_yaml),
            ("GET", repo, self.model_info),
            ("GET", repo + "/revision/{revision}", self.model_info),
            ("GET", repo + "/tree/{revision}", self.tree),
            ("GET", repo + "/tree/{revision}/{path:path}", self.tree),
            ("POST", repo + "/paths-info/{revision}", self.paths_info),
            ("GET", repo + "/refs", self.refs),
            ("GET", repo + "/commits/{revision}", self.commits),
            ("POST", repo + "/preupload/{revision}", self.preupload),
            ("POST", repo + "/commit/{revision}", self.commit),
            ("POST DELETE", repo + "/branch/{revision}", self.branch),
            ("POST DELETE", repo + "/tag/{revision}", self.tag),
            ("POST", repo + "/discussions", self.discussions),
            ("GET", repo + "/discussions/{number}", self.discussion),
            ("GET", repo + "/xet-{kind}-token/{revision}", self.xet_token),
            ("POST", lfs + "/batch", self.lfs_batch),
            ("POST", lfs + "/verify", self.verify_large),
            ("GET", "/{owner}/{name}/resolve/{revision}/{path:path}", self.resolve),
            ("GET", "/storage/{sha256}", self.stored),
            ("PUT", "/storage/{sha256}", self.put_large),
            ("POST", "/storage/{sha256}/complete", self.complete_parts),
            ("PUT", "/storage/{sha256}/{part}", self.put_part),
        ]
        # Of datasets, what a reader needs; a repository is found by its name, whatever its kind.
        datasets = "/api/datasets/{owner}/{name}"
        routes += [
            (methods, path.replace(repo, datasets), endpoint)
            for methods, path, endpoint in routes
            if endpoint in (self.model_info, self.tree, self.paths_info, self.refs)
        ]
        routes.append(("GET", "/datasets/{owner}/{name}/resolve/{revision}/{path:path}", self.resolve))
        return Starlette(
            routes=[Route(path, endpoint, methods=methods.split()) for methods, path, endpoint in routes],
            exception_handlers={HTTPException: self.error},
        )

    async def error(self, request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)


class HubServer:
    """
    The emulator on a free port, in a thread: `with HubServer() as hub: ... hub.endpoint ... hub.store`.

    Outside of the endpoints it keeps the log of calls and injects the faults of `store.faults`.
    """

    def __init__(self):
        self.directory = tempfile.TemporaryDirectory()
        self.store = HubStore(f"{self.directory.name}/xet")
        self.app = Hub(self.store).app()

    def __enter__(self) -> "HubServer":
        config = uvicorn.Config(self, host="127.0.0.1", port=0, log_level="critical", lifespan="off", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.endpoint = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.thread.join(5)
        self.directory.cleanup()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        raw = scope["raw_path"].decode()
        query = f"?{scope['query_string'].decode()}" if scope["query_string"] else ""
        call = f"{scope['method']} {raw}{query}"
        self.store.calls.append(call)
        self.store.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        fault = next((fault for fault in self.store.faults if fault.hits(call)), None)
        scope = {**scope, "path": raw}  # routes see the path percent-encoded
        if fault is None:
            await self.app(scope, receive, send)
        else:
            await self.go_wrong(fault, scope, receive, send)

    async def go_wrong(self, fault: Fault, scope, receive, send) -> None:
        transport = receive.__self__.transport  # uvicorn's: the only way to break a connection
        if fault.kind == "503":
            while (await receive()).get("more_body"):
                pass
            await JSONResponse({"error": "Service Unavailable"}, 503)(scope, receive, send)
        elif fault.kind == "cut":
            length = int(dict(scope["headers"]).get(b"content-length", 0))
            seen, more = 0, True
            while more and seen * 2 < length:
                message = await receive()
                seen, more = seen + len(message.get("body", b"")), message.get("more_body", False)
            transport.abort()
        elif fault.kind == "lost":

            async def swallow(message) -> None:
                pass

            with contextlib.suppress(ClientDisconnect):
                await self.app(scope, receive, swallow)
            transport.abort()
        elif fault.kind == "half":

            async def send_half(message) -> None:
                body = message.get("body", b"")
                await send({**message, "body": body[: len(body) // 2], "more_body": True} if body else message)
                while transport.get_write_buffer_size():
                    await asyncio.sleep(0.01)
                if body:
                    transport.abort()

            await self.app(scope, receive, send_half)
        elif fault.kind == "slow":
            await asyncio.sleep(fault.seconds)
            await self.app(scope, receive, send)
        else:
            raise ValueError(f"unknown kind of fault: {fault.kind}")
