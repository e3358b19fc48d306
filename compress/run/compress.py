"""The whole run, of one method or of several stages."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paredown.compress.checkpoint.remote_code import check_packed
from paredown.compress.errors import PareError
from paredown.compress.job import Format
from paredown.compress.progress import BlockDone, Progress, ignore, logger
from paredown.compress.recipe import Recipe
from paredown.compress.run.boards import Name as Board
from paredown.compress.run.generated_text import with_own_text
from paredown.compress.run.journal import SAVE_EVERY
from paredown.compress.run.once import How, compress_once
from paredown.compress.run.open import resolve_recipe
from paredown.compress.run.recover_stage import compress_and_recover
from paredown.compress.run.run_log import logged
from paredown.compress.run.score_cache import ScoreCache
from paredown.compress.run.seeds import compress_seeds, seeds_of
from paredown.compress.run.stages import compress_stages
from paredown.evaluation.lm_tasks import check_tasks
from paredown.evaluation.schema import Report
from paredown.evaluation.task_index import require_lm_eval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compress(
    model: "str | Path | PreTrainedModel",
    recipe: Recipe | str,
    out: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    overrides: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    calibration: str | None = None,
    eval_text: Sequence[str] = (),
    tasks: Sequence[str] | None = None,
    task_folder: Path | None = None,
    allow_task_code: bool = False,
    samples: bool = False,
    words: bool = False,
    cache: bool = True,
    format: Format = "packed",
    remote_code: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    seed: int | None = None,
    seeds: str | int | Sequence[int] = (),
    allow_scored_calibration: bool = False,
    revision: str | None = None,
    progress: Callable[[BlockDone], None] = ignore,
    note: Callable[[str], None] = logger.info,
    doing: Callable[[str], None] = ignore,
    save_every: float = SAVE_EVERY,
    command: str | None = None,
    log_to: Board | None = None,
) -> Report:
    """Compress `model` by `recipe` (shipped name, YAML file or Recipe) into the folder `out`, and return the report.

    model: a folder or hub id, read block by block; or a loaded model with its `tokenizer`, which is saved to a temporary
    folder first: for small models. `overrides` are `key=value` changes of a named recipe; `plugins` are Python files that
    register methods of your own; `calibration`, `eval_text`, `tasks` and `seed` replace the recipe's. `seeds`, so many or
    these, does all of it by several seeds, keeps the first one's checkpoint and reports the figures of all. A text that is
    scored does not calibrate unless `allow_scored_calibration` says so: one for both is divided. `task_folder` holds lm-eval
    tasks of your own, whose Python code runs only with `allow_task_code`; `samples`: how both models go on after five
    prompts; `words`: word perplexity too, of texts that have documents; `cache`: dense scores are taken from the user's
    cache, and kept there. `remote_code`: packed weights get a file beside them by which `trust_remote_code=True` loads them
    where nothing imported paredown. `progress` is called after each block, `note` with sentences worth keeping, `doing`
    with the current step. A run of a folder or hub id saves its state every `save_every` seconds, from which the same call
    resumes after an interruption. The report is also written to `out/report.json`, and `out/log.jsonl` has a line for each
    block, step and score, whose numbers go to the board `log_to` as well.

    Raises PareError, if possible before any weight is read; `out` then does not exist.
    """
    if remote_code:
        check_packed(format)
    told = model if isinstance(model, str | Path) else "(in memory)"
    resolved = resolve_recipe(recipe, overrides, calibration, eval_text, tasks, seed, plugins, allow_scored_calibration)
    if words:
        require_lm_eval()
        if resolved.recover:
            raise PareError(
                "word perplexity is not measured while a model is recovered. Leave it out, and measure it of what is "
                f"written: paredown eval {out} --against {told} --word-perplexity"
            )
    check_tasks(resolved.evaluate.tasks, task_folder, allow_code=allow_task_code, data=True)
    cached = ScoreCache.of_user() if cache else None

    def run(model: Any, recipe: Recipe, out: Path, how: How, tokenizer: Any = None) -> Report:
        whole = compress_and_recover if recipe.recover else compress_stages if recipe.stages else compress_once
        return whole(model, with_own_text(model, recipe, how, tokenizer), out, how, tokenizer)

    begin = {"model": str(told), "recipe": resolved.to_dict(), "command": command}
    with logged(begin, Path(out), log_to, Progress(progress, note, doing)) as (log, shown):
        how = How(
            task_folder, format, device, dtype, revision, shown, save_every, command, allow_task_code=allow_task_code,
            samples=samples, words=words, cache=cached, remote_code=remote_code, log=log,
        )  # fmt: skip
        if seeds:
            return compress_seeds(run, model, resolved, seeds_of(seeds, resolved.calibration.seed), Path(out), how)
        return run(model, resolved, Path(out), how, tokenizer)
