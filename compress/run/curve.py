"""What a model would lose at several shares: measured on calibration text before anything is compressed."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from torch import Tensor

from paredown.compress.allocation.widths import equal, uneven
from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.errors import PareError
from paredown.compress.methods.base import BlockMethod, GroupMethod
from paredown.compress.model.stream import hidden_bytes
from paredown.compress.progress import ignore
from paredown.compress.recipe import EvaluateSpec, Recipe
from paredown.compress.run.open import open_source, resolve_recipe
from paredown.compress.run.score_cache import ScoreCache
from paredown.compress.run.survey_cache import rounds_of
from paredown.compress.run.texts import read_texts
from paredown.compress.shape_job import ShapeJob, block_numbers, resolve
from paredown.compress.survey.depth import profile
from paredown.compress.survey.widths import WINDOWS, unit_curves

SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)  # of the parameters of all blocks

CHANNELS = (
    "Predicted rise of the loss in nats per token, to second order, on {tokens:,} tokens of the calibration text ({text}): a "
    "sum over the blocks, each measured alone. equal: the same share of every block's {kind}; by cost: widths that differ "
    "({how}). Other text loses more, and where the sum is large it is too small."
)
BLOCKS = (
    "Measured KL divergence from the dense model's predictions in nats per token, on {tokens:,} tokens of the calibration "
    "text ({text}), without any refit: after the best choice of blocks, one after another."
)


@dataclass(frozen=True)
class LossCurve:
    """Rows of the same keys: what stays, and what that is predicted to lose."""

    caption: str
    rows: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def loss_curve(
    model: str | Path,
    recipe: Recipe | str,
    *,
    overrides: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    cache: bool = True,
    note: Callable[[str], None] = ignore,
    doing: Callable[[str], None] = ignore,
) -> LossCurve:
    """Survey the model on the recipe's calibration text, with one block in memory, and predict the loss at several shares.

    Arguments are those of `compress`. For methods that remove channels, whatever share the recipe keeps, and for those that
    remove the blocks whose absence is measured, up to as many as the recipe removes; of several stages the first. Raises
    PareError for other methods.
    """
    resolved = resolve_recipe(recipe, overrides, plugins=plugins)
    resolved = resolved.each_stage[0] if resolved.stages else resolved
    _check(resolved)
    source = open_source(str(model), revision, device, dtype)
    job = resolve(source, resolved)
    assert isinstance(job, ShapeJob)
    text = resolved.model_copy(update={"evaluate": EvaluateSpec(perplexity=())})
    windows, _, _ = read_texts(text, source, load_tokenizer(source.folder))
    if isinstance(job.method, BlockMethod):
        return _by_depth(job, job.method, windows.ids, ScoreCache.of_user() if cache else None, note, doing)
    assert isinstance(job.method, GroupMethod)
    return _by_width(job, job.method, windows.surveyed, note, doing)


def _check(recipe: Recipe) -> None:
    """Raises PareError for a method that no curve can be measured of."""
    method = recipe.build()
    if isinstance(method, GroupMethod) and method.kind != "experts" and not method.reads_writers:
        return
    if isinstance(method, BlockMethod) and method.reads == "divergence":
        return
    raise PareError(
        f"--curve cannot be measured for {recipe.method}: it is for methods that remove channels, such as paredown_width, "
        "and for those that choose blocks by what is lost without them, such as paredown_depth."
    )


def _by_width(
    job: ShapeJob, method: GroupMethod, ids: Tensor, note: Callable[[str], None], doing: Callable[[str], None]
) -> LossCurve:
    ids = ids[: method.gradient_windows or WINDOWS]
    _check_scratch(hidden_bytes(job.source, ids.numel()) * len(job.blocks))
    with TemporaryDirectory(prefix="paredown-") as scratch:
        curves = unit_curves(job, ids, Path(scratch), note, doing)
    whole = sum(curve.units * curve.numbers for curve in curves.values())
    least = sum(min(method.step, curve.units) * curve.numbers for curve in curves.values())
    rows = []
    for share in SHARES:
        numbers = whole - (1 - share) * job.numbers
        if numbers > least:
            ways = equal(curves, numbers), uneven(curves, numbers, method.step, method.shrink)
            losses = (sum(curves[name].at(count) for name, count in way.items()) for way in ways)
            rows.append({"kept": share, **dict(zip(("equal", "by cost"), losses, strict=True))})
    how = f"shrink: {method.shrink:g}"
    kind = job.all_groups[0].kind.replace("_", " ")
    source = job.recipe.calibration.domain or job.recipe.calibration.named
    return LossCurve(CHANNELS.format(tokens=ids.numel(), text=source, kind=kind, how=how), rows)


def _check_scratch(needed: int) -> None:
    """Raises PareError if the folder for temporary files has too little room for so many bytes."""
    folder = gettempdir()
    if (free := shutil.disk_usage(folder).free) < needed:
        raise PareError(
            f"the hidden states of all blocks take {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free: name "
            "another folder in TMPDIR, or take fewer or shorter windows (--set gradient_windows=4)."
        )


def _by_depth(
    job: ShapeJob,
    method: BlockMethod,
    ids: Tensor,
    cache: ScoreCache | None,
    note: Callable[[str], None],
    doing: Callable[[str], None],
) -> LossCurve:
    ids = ids[: method.windows]
    rounds = rounds_of(job, ids, method.reads, cache, note)
    removals = profile(job.source, job.blocks, ids, method, job.drop, note, doing, rounds).removals
    text = BLOCKS.format(tokens=ids.numel(), text=job.recipe.calibration.named)
    return LossCurve(text, list(_depth_rows(job, removals)))


def _depth_rows(job: ShapeJob, removals: Sequence[tuple[int, float]]) -> Iterator[dict[str, float]]:
    left, count = job.numbers, len(job.blocks)
    for n, (gone, divergence) in enumerate(removals, 1):
        left -= block_numbers(job.blocks[gone])
        yield {"blocks": count - n, "kept": left / job.numbers, "removed": gone, "KL": divergence}
