"""Upload a model folder to the Hub: checked first, complete, in one commit."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import validate_repo_id
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import Failure, InputError, explained
from .card import missing_from_card, write_card
from .doctor import examine
from .files import PICKLES, model_files, secrets_in

SHOWN = 8  # problems named in one error
REQUIRED = ("config.json", "tokenizer_config.json", "README.md")  # and what the doctor asks of a language model


class PushFailed(Failure):
    """The upload failed; the message says what the remote holds and what to do."""


def check_repo(repo: str) -> None:
    """
    Raises:
        InputError: the Hub takes no repository of this name.
    """
    with explained("OWNER/NAME"):
        validate_repo_id(repo)
    if repo.count("/") != 1:
        raise InputError(f"OWNER/NAME: must name the owner too, as your-name/{repo}, got {repo!r}.")


@dataclass
class Plan:
    """What a push would do: `{path: bytes}` of the files that go along, and the paths that stay at home."""

    folder: Path
    files: dict[str, int]
    left_out: list[str]

    def __str__(self) -> str:
        lines = [f"{size:>15,}  {path}" for path, size in self.files.items()]
        lines.append(f"{sum(self.files.values()):>15,}  bytes in {len(self.files)} files")
        return "\n".join(lines + [f"   stays at home  {path}" for path in self.left_out])


def plan_push(model_dir: str | os.PathLike, token: str | None = None) -> Plan:
    """
    Check a model folder as thoroughly as a push does; nothing is sent.

    Args:
        token: no file may hold it; default: that of `hf auth login` or the environment.

    Raises:
        InputError: naming all that keeps the folder from being pushed: what the doctor found, gaps in the card,
            missing files, secrets.
    """
    folder = Path(model_dir)
    findings = examine(folder, skip=("no pickle files",))  # those stay at home
    kept, left_out = model_files(folder)
    token = token or get_token()
    problems = [str(finding) for finding in findings if finding.is_failure]
    problems += [f"{name} is missing" for name in REQUIRED if name not in kept]
    problems += [f"README.md: {gap}" for gap in missing_from_card(folder)]
    for path in kept:
        problems += [f"{path} holds a secret ({secret})" for secret in secrets_in(folder / path, token)]
    if problems:
        more = [f"and {len(problems) - SHOWN} more (hf-lm doctor {folder})"] if len(problems) > SHOWN else []
        raise InputError(f"{folder} is not ready to be pushed: {'; '.join(problems[:SHOWN] + more)}")
    return Plan(folder, {path: (folder / path).stat().st_size for path in kept}, left_out)


def head_of(api: HfApi, repo: str, revision: str | None) -> str | None:
    """The commit that a branch of the remote is at; None if there is no such branch, or it cannot be asked."""
    try:
        return api.model_info(repo, revision=revision).sha
    except Exception:  # the client, its HTTP library and hf_xet have no class in common
        return None


def prepare_remote(api: HfApi, repo: str, private: bool | None, revision: str | None) -> str | None:
    """
    Make the repository and the branch where they are not there yet.

    Returns:
        The commit that the branch is at.

    Raises:
        InputError: it is public, and `private` was asked for.
    """
    api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise InputError(f"{repo} is public: --private can only make a new repository private.")
    head = head_of(api, repo, revision)
    if revision is not None and head is None and not revision.startswith("refs/"):
        api.create_branch(repo, branch=revision, exist_ok=True)
        head = head_of(api, repo, revision)
    return head


def push(
    plan: Plan,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Upload model",
    token: str | None = None,
) -> str:
    """
    Upload the files of a plan in one commit. Large files go first and are kept by the Hub if the push breaks off: the
    next one does not send them again. What else the remote holds stays.

    Args:
        repo: `owner/name`; made if it is not there, `private` or not.
        revision: branch, made if it is not there; default: main.
        create_pr: propose the commit as a pull request.

    Returns:
        The address of the commit or pull request.

    Raises:
        InputError: not a repository name; a public repository, and `private` was asked for; a pull request to another
            branch than main.
        PushFailed: the remote could not be reached or refused.
    """
    if create_pr and revision not in (None, "main"):
        raise InputError(f"--create-pr proposes changes to main; leave out --revision {revision}.")
    check_repo(repo)
    api, before = HfApi(token=token), None
    try:
        before = prepare_remote(api, repo, private, revision)
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(path_in_repo=path, path_or_fileobj=plan.folder / path) for path in plan.files],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
    except InputError:
        raise
    except Exception as error:
        raise PushFailed(explain(error, repo, before, head_of(api, repo, revision))) from error
    return commit.pr_url or commit.commit_url


def explain(error: Exception, repo: str, before: str | None, after: str | None) -> str:
    """What a person should know after a failed push: why, what the remote holds now, what to do."""
    reasons = [" ".join(str(reason).split()).rstrip(".") for reason in (error, error.__cause__) if reason is not None]
    response = getattr(error, "response", None)
    if response is not None and response.status_code in (401, 403, 404):
        advice = "check its name, and log in (`hf auth login`) with a token that may write to it"
    else:
        advice = "run the same command again: large files that arrived are not sent again"
    if before is None:
        state = "Nothing was sent"
    elif after is None:
        state = f"It was at commit {before}, and cannot be asked now"
    elif after == before:
        state = "It is unchanged"
    else:
        state = f"Yet it is now at commit {after}: look whether that is yours"
    return f"{repo}: {' ('.join(reasons)}{')' * (len(reasons) - 1)}. {state}; {advice}."


class PushCallback(TrainerCallback):
    """
    Complete each push of `Trainer(push_to_hub=True)`. transformers uploads its pickled arguments with every push, and
    the code files with the last one only. This callback makes the repository ignore pickles (except the optimizer's in
    checkpoints, which `hub_strategy="checkpoint"` asks for), copies the code of the checkpoint that is pushed, and
    writes the model card from the measurements so far.
    """

    def on_push_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder, api = Path(args.output_dir), HfApi(token=args.hub_token)
        repo = api.create_repo(args.hub_model_id or folder.absolute().name, exist_ok=True).repo_id
        # Before the push itself: with Xet, only the rules that the repository already has count.
        api.upload_file(
            path_or_fileobj="".join(
                f"{rule}\n" for rule in (TRAINING_ARGS_NAME, *(f"/*{end}" for end in PICKLES))
            ).encode(),
            path_in_repo=".gitignore",
            repo_id=repo,
            revision=args.hub_revision,
            commit_message="Keep pickles out",
        )
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        for path in checkpoint.glob("*.py"):
            shutil.copyfile(path, folder / path.name)
        described = folder if (folder / "config.json").exists() else checkpoint
        if (described / "config.json").exists():
            write_card(described, output=folder / "README.md", name=repo)
