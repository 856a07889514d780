"""What a Hub holds: users, repositories with commits and branches, blobs, large files; and the faults to inject."""

import fnmatch
import hashlib
import itertools
import re
import shutil
from dataclasses import dataclass, field

# The patterns of the .gitattributes that the Hub puts into a new model repository.
LFS_PATTERN = re.compile(
    r"\.(7z|arrow|bin|bz2|ckpt|ftz|gz|h5|joblib|lfs\.\w+|mlmodel|model|msgpack|npy|npz|onnx|ot|parquet|pb|pickle|pkl"
    r"|pt|pth|rar|safetensors|tar|tflite|tgz|wasm|xz|zip|zst)$|tfevents|^saved_model/"
)
LFS_BYTES = 10 * 2**20  # larger files are large files whatever their name
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
# Access tokens in the shape of real ones: of the user "owner" with and without the right to write, and of somebody else.
OWNER, READER, STRANGER = ("hf_" + letter * 34 for letter in "ors")


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_ignored(path: str, gitignore: str) -> bool:
    """The part of gitignore's rules that is needed here: one name or glob a line, `/` at the start for the root only."""
    for line in filter(None, (line.strip() for line in gitignore.splitlines())):
        if (
            fnmatch.fnmatchcase(path, line[1:]) and "/" not in path
            if line[0] == "/"
            else any(fnmatch.fnmatchcase(part, line) for part in path.split("/"))
        ):
            return True
    return False


@dataclass(frozen=True)
class Blob:
    """A file of a commit. Of a large file, `oid` is that of its pointer and `sha256` that of its content."""

    oid: str
    size: int
    sha256: str | None = None

    @classmethod
    def large(cls, sha256: str, size: int) -> "Blob":
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return cls(git_sha1(pointer.encode()), size, sha256)

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    tree: dict[str, Blob]
    title: str
    message: str
    author: str
    parent: str | None


@dataclass
class Repository:
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1, refs/pr/1 -> commit
    large: set[str] = field(default_factory=set)  # large files that arrived, committed or not

    def resolve(self, revision: str) -> Commit | None:
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.commits[self.refs[name]]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            return next((commit for oid, commit in self.commits.items() if oid.startswith(revision)), None)
        return None

    def ref_of(self, revision: str) -> str | None:
        return next((name for name in (revision, f"refs/heads/{revision}") if name in self.refs), None)

    def add_commit(self, ref: str, tree: dict[str, Blob], title: str, author: str, message: str = "") -> Commit:
        parent = self.refs.get(ref)
        listing = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(tree.items()))
        text = f"{self.name}\n{parent}\n{len(self.commits)}\n{title}\n{message}\n{listing}"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), dict(tree), title, message, author, parent)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit


@dataclass
class Fault:
    """
    Something that goes wrong with the calls whose method and raw path match.

    `kind`: "503"; "cut" (the connection breaks after half of the request's body); "lost" (the call is carried out, but
    the connection breaks before the answer); "half" (it breaks in the middle of the answer); "slow" (the answer comes `seconds` late).
    """

    kind: str
    pattern: str = ""  # searched in "METHOD /raw/path"
    times: int = 1  # so many matching calls ...
    skip: int = 0  # ... after so many good ones
    seconds: float = 0.0

    def hits(self, call: str) -> bool:
        if not re.search(self.pattern, call):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return self.times >= 0


class HubStore:
    """The state of the emulated Hub. Tests read and change it from their own thread between the client's calls."""

    def __init__(self, xet_directory: str):
        self.xet_directory = xet_directory
        # token -> (user, may write)
        self.tokens = {OWNER: ("owner", True), READER: ("owner", False), STRANGER: ("stranger", True)}
        self.clear()

    def clear(self) -> None:
        """Forget everything but the users."""
        shutil.rmtree(self.xet_directory, ignore_errors=True)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # by git sha1
        self.large: dict[str, bytes] = {}  # by sha256
        self.parts: dict[tuple[str, int], bytes] = {}  # of multipart uploads, by (sha256, part number)
        self.part_bytes = 16 * 2**20  # large files over this size arrive in parts
        self.calls: list[str] = []  # "METHOD /raw/path?query"
        self.headers: list[dict[str, str]] = []  # of these calls
        self.faults: list[Fault] = []
        self.pull_requests = itertools.count(1)

    def create(self, name: str, private: bool = False) -> Repository:
        repository = self.repositories[name] = Repository(name, private)
        repository.add_commit(
            "refs/heads/main", {".gitattributes": self.add_blob(GITATTRIBUTES)}, "initial commit", "owner"
        )
        return repository

    def add_blob(self, content: bytes) -> Blob:
        blob = Blob(git_sha1(content), len(content))
        self.blobs[blob.oid] = content
        return blob

    def put(self, name: str, **contents: bytes) -> None:
        """Commit small files to main, as if they had been uploaded: `put("owner/a", **{"b.txt": b"c"})`."""
        repository = self.repositories[name]
        tree = repository.resolve("main").tree | {path: self.add_blob(data) for path, data in contents.items()}
        repository.add_commit("refs/heads/main", tree, "put", name.split("/")[0])

    def put_large(self, name: str, path: str, content: bytes) -> None:
        """Commit a large file to main, as if it had been uploaded."""
        repository, sha256 = self.repositories[name], hashlib.sha256(content).hexdigest()
        self.large[sha256] = content
        repository.large.add(sha256)
        tree = repository.resolve("main").tree | {path: Blob.large(sha256, len(content))}
        repository.add_commit("refs/heads/main", tree, "put", name.split("/")[0])

    def content(self, blob: Blob) -> bytes:
        return self.large[blob.sha256] if blob.sha256 else self.blobs[blob.oid]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """`{path: content}` of a repository, the initial commit's own file left out."""
        tree = self.repositories[name].resolve(revision).tree
        return {path: self.content(blob) for path, blob in tree.items() if path != ".gitattributes"}

    def state(self) -> dict:
        """All that a reader of the Hub can see, to compare before and after."""
        return {name: (repository.private, dict(repository.refs)) for name, repository in self.repositories.items()}
