"""Which lm-eval tasks there are, and their data.

A task is a YAML file that may name Python code to execute. So tasks come from three places only: the installed lm-eval,
our own folder `evaluation/tasks`, and a folder that the user names, whose code is run only where the user allows it. The
name of a task is never read as a path.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from paredown.compress.errors import PareError, did_you_mean
from paredown.evaluation.task_code import refuse_code

OURS = Path(__file__).parent / "tasks"
# tasks of lm-eval that have one name together
NAMED = {"bias": ("crows_pairs_english", "toxigen", "bbq")}


def expanded(names: Sequence[str]) -> tuple[str, ...]:
    """The names of single tasks, groups and tags, each once, with those of NAMED in the place of their common name."""
    return tuple(dict.fromkeys(one for name in names for one in NAMED.get(name, (name,))))


def task_manager(names: Sequence[str], include: Path | None = None, allow_code: bool = False) -> Any:
    """An lm-eval `TaskManager` that knows all of `names`.

    It knows only our tasks and those of `include` if they suffice: to index the thousands of lm-eval takes seconds.
    Raises `PareError` for unknown names, for a missing folder, for one with code unless that is allowed, and without
    lm-eval.
    """
    require_lm_eval()
    if include is not None and not include.is_dir():
        raise PareError(f"the folder of tasks {include} does not exist; wanted a folder of lm-eval task YAML")
    if include is not None and not allow_code:
        refuse_code(include)
    local = _manager(include, False)
    if all(_complete(name, local) for name in names):
        return local
    manager = _manager(include, True)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise PareError("\n".join(_unknown(name, manager.all_tasks) for name in unknown))
    return manager


def _complete(name: str, manager: Any) -> bool:
    """Whether the manager knows this task, or this group with all its members. A tag may have members anywhere."""
    if name in manager.all_subtasks:
        return True
    members = (manager.task_index[name].cfg or {}).get("task") if name in manager.all_groups else None
    return isinstance(members, list) and all(isinstance(one, str) and _complete(one, manager) for one in members)


def _unknown(name: str, known: Sequence[str]) -> str:
    hint = "Give its folder as the folder of tasks and its name as the task" if "/" in name else ""
    suggestion = did_you_mean(name, known)
    return f"lm-eval knows no task {name!r}.{suggestion} {hint or '`lm-eval ls tasks` lists them all'}"


@lru_cache(maxsize=4)
def _manager(include: Path | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    folders = [OURS] if include is None else [OURS, include]
    return TaskManager(include_path=folders, include_defaults=defaults)


def require_lm_eval() -> None:
    """Raise `PareError` if lm-eval is not installed."""
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise PareError(
            f"tasks and word perplexity need lm-eval, which cannot be imported here ({error}). "
            "Install it with: pip install 'lm-eval>=0.4.13'"
        ) from error


def load_tasks(manager: Any, names: Sequence[str]) -> Any:
    """The tasks and groups with their data: lm-eval reads it when it builds a task."""
    try:
        return manager.load(list(dict.fromkeys(names)))
    except Exception as error:
        # the Hub, a dataset script, a parser and task code each raise errors of their own
        raise PareError(
            f"the data of the tasks {', '.join(names)} cannot be loaded: {type(error).__name__}: {error}. "
            "A task from the Hub needs the network once (unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE); "
            "the task stdlib_lines needs none"
        ) from error


def task_digest(loaded: Any) -> str:
    """A hash of all that the loaded tasks ask: their settings, the source of their functions, and their documents."""
    tasks = [
        *loaded["tasks"].values(),
        *(task for group in loaded["groups"].values() for task in group.get_all_tasks()),
    ]
    digest = hashlib.sha256()
    for task in tasks:
        settings = task.config.to_dict()
        few = task.fewshot_docs() if settings.get("num_fewshot") else ()
        for part in chain([task.task_name, settings], task.eval_docs, few or ()):
            digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
