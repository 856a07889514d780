"""Upload a model folder to the Hub, after checking it: hf-lm push MODEL OWNER/NAME. One commit, or none."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the Hub; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made if it is not there (default main)")
    parser.add_argument("--create-pr", action="store_true", help="propose the commit as a pull request")
    parser.add_argument("--message", default="Upload model", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="check, show what would be sent, and send nothing")


def run(arguments: argparse.Namespace) -> int:
    import hf_lm

    hf_lm.register_auto_classes()
    from ..hub.push import check_repo, plan_push, push

    check_repo(arguments.repo)
    plan = plan_push(arguments.model)
    print(plan, file=sys.stderr)
    if arguments.dry_run:
        return 0
    print(
        push(
            plan,
            arguments.repo,
            private=arguments.private,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            message=arguments.message,
        )
    )
    return 0
