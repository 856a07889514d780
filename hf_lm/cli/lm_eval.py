"""Run tasks of EleutherAI's lm-evaluation-harness, from its list or from local task files, on any model folder."""

import argparse
import importlib.util
import json

from ..errors import InputError
from .common import add_model_arguments, load_model, load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--tasks", required=True, nargs="+", metavar="TASK", help="names of tasks or groups")
    parser.add_argument("--include-path", metavar="DIR", help="folder with task files of your own")
    parser.add_argument("--num-fewshot", type=int, help="solved examples in front of each item")
    parser.add_argument("--limit", type=int, help="number of items of each task (all)")
    parser.add_argument("--batch-size", type=int, default=8, help="requests at once (8)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError('lm-eval is not installed: pip install "hf-lm[lm-eval]".')
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype), load_tokenizer(arguments.model)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    from ..evaluation.text import without_ending

    class OneBos(HFLM):
        """lm-eval puts bos in front of a text to be scored whole, also where the tokenizer has done so already."""

        def loglikelihood_rolling(self, *args, **kwargs):
            self.add_bos_token = False
            try:
                return super().loglikelihood_rolling(*args, **kwargs)
            finally:
                self.add_bos_token = None

    manager = TaskManager(include_path=arguments.include_path)
    unknown = [task for task in arguments.tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(f"--tasks: there is no task {', '.join(unknown)}; `lm-eval ls tasks` lists those there are.")
    results = simple_evaluate(
        model=OneBos(
            pretrained=model, tokenizer=without_ending(tokenizer), backend="causal", batch_size=arguments.batch_size
        ),
        tasks=arguments.tasks,
        task_manager=manager,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        log_samples=False,
    )
    if arguments.json:
        print(json.dumps(results["results"], default=handle_non_serializable, ensure_ascii=False))
    else:
        print(make_table(results))
    return 0
