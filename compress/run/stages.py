"""Several methods one after another: each stage works on what the one before left, and one report tells of all."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any, cast

from paredown.compress.checkpoint.out_folder import OutFolder
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.recipe import Recipe
from paredown.compress.run.once import How, compress_once
from paredown.compress.run.open import open_source
from paredown.compress.text.corpora import OWN
from paredown.evaluation.schema import Report, check_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compress_stages(
    model: "str | Path | PreTrainedModel",
    recipe: Recipe,
    out: Path,
    how: How,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Report:
    """`compress` by a recipe with stages. All but the last are written beside OUT, as ordinary checkpoints, and removed then.

    A stage that is finished is not done again by the same command, and one that was interrupted goes on.
    """
    if not isinstance(model, str | Path):
        raise PareError(
            "a recipe with stages reads models from the disk: save yours with save_pretrained, and name the folder."
        )
    OutFolder(out).look()
    *first, last = recipe.each_stage
    if not first:
        return compress_once(model, last, out, how)
    place, reports, read = out.with_name(f"{out.name}.stages"), list[Report](), str(model)
    note = how.progress.note
    silent: dict[str, Any] = {"evaluate": {"perplexity": [], "tasks": []}}
    for n, stage in enumerate(first, 1):
        stage, folder = Recipe.parse({**stage.to_dict(), **silent}), place / str(n)
        note(f"stage {n} of {len(recipe.stages)}: {stage.method}")
        done = finished(folder, read, stage)
        place.mkdir(parents=True, exist_ok=True)
        own = replace(
            how, format="dense", passing=True, uneven=how.format != "dense", later=recipe.evaluate, command=None, seeds=(),
            revision=how.revision if n == 1 else None,
        )  # fmt: skip
        reports.append(done or compress_once(read, stage, folder, own))
        read = str(folder)
    note(f"stage {len(recipe.stages)} of {len(recipe.stages)}: {last.method}")
    dense = open_source(str(model), how.revision, how.device, how.dtype)
    earlier = EarlierStages(dense.folder, dense.id, reports, recipe, how.command)
    report = compress_once(read, last, out, replace(how, revision=None), earlier=earlier)
    rmtree(place, ignore_errors=True)
    return report


def finished(folder: Path, read: str, stage: Recipe) -> Report | None:
    """The report of a stage that an earlier run of the same command finished; None if there is none.

    Raises PareError for what another command left.
    """
    path = folder / "report.json"
    if not path.exists():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    if _asked(report.get("recipe")) != _asked(stage.to_dict()) or report["model"]["id"] != read:
        raise PareError(f"{folder.parent} holds stages of another command. Remove it, or name another output with -o.")
    check_report(report)
    return cast(Report, report)


def _asked(recipe: Any) -> str:
    """A recipe as it was asked for: text that the model wrote is `self`."""
    return re.sub(rf'"{OWN}:\w+"', f'"{OWN}"', json.dumps(recipe))


@dataclass(frozen=True)
class EarlierStages:
    """The stages that are done, for the scores and the report of the last one."""

    folder: Path  # of the dense model
    id: str
    reports: Sequence[Report]
    recipe: Recipe
    command: str | None

    def source(self, like: ModelSource) -> ModelSource:
        return ModelSource(self.folder, self.id, dtype=like.dtype, device=like.device)

    def merged(self, report: Report) -> Report:
        """The report of all stages: the model, its bytes and parameters before the first, and all else added up."""
        every, first = [*self.reports, report], self.reports[0]
        removed = sum(r["parameters"]["targeted"] - r["parameters"]["kept"] for r in every)
        targeted = max(r["parameters"]["targeted"] for r in every)
        merged: dict[str, Any] = {
            **report,
            "model": first["model"],
            "recipe": self.recipe.to_dict(),
            "parameters": {**first["parameters"], "targeted": targeted, "kept": targeted - removed},
            "bytes": {**report["bytes"], "before": first["bytes"]["before"]},
            "parts": _parts(first, report),
            "layers": [layer for r in every for layer in r["layers"]],
            "seconds": _added([r["seconds"] for r in every]),
            "fallbacks": [remark for r in every for remark in r["fallbacks"]],
            "warnings": list(dict.fromkeys(remark for r in every for remark in r.get("warnings", []))),
            "command": self.command,
        }
        if tuned := [entry for r in every for entry in r.get("reconstruction", [])]:
            merged["reconstruction"] = tuned
        shapes = [cast(Mapping[str, Any], r["structure"]) for r in every if "structure" in r]
        if shapes:
            merged["structure"] = _shape(shapes)
        check_report(merged)
        return cast(Report, merged)


def _parts(first: Report, last: Report) -> list[dict[str, Any]]:
    """Bytes by part before the first stage and after the last."""
    before = {part["part"]: part["before"] for part in first.get("parts", [])}
    after = {part["part"]: part["after"] for part in last.get("parts", [])}
    return [{"part": p, "before": before.get(p, 0), "after": after.get(p, 0)} for p in dict.fromkeys([*before, *after])]


def _added(seconds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in seconds for name in part)
    return {name: round(sum(part.get(name, 0.0) for part in seconds), 3) for name in names}


def _shape(shapes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was removed by stages one after another."""
    blocks: list[int] = list(range(shapes[0]["blocks_before"]))
    counts: dict[str, dict[str, list[int]]] = {"units": {}, "sizes": {}}
    absent: list[str] = []
    merged: list[list[int]] = []
    for shape in shapes:
        stay = shape["blocks"]
        merged += [[blocks[i] for i in group] for group in shape.get("merged", [])]
        blocks = [blocks[i] for i in stay]
        counts["sizes"] = {new: pair for name, pair in counts["sizes"].items() if (new := _moved(name, stay))}
        absent = [new for name in absent if (new := _moved(name, stay))] + shape.get("absent", [])
        for kind, known in counts.items():
            for key, (before, after) in shape.get(kind, {}).items():
                known[key] = [known.get(key, [before])[0], after]
    found = {"sizes": counts["sizes"], "absent": absent, "merged": merged}
    own = {key: value for key, value in found.items() if value}
    return {"blocks": blocks, "blocks_before": shapes[0]["blocks_before"], "units": counts["units"], **own}


def _moved(name: str, stay: Sequence[int]) -> str | None:
    """The name of a module of a block after only some blocks stay; None if its block goes."""
    head, number, rest = re.split(r"\.(\d+)(?=\.|$)", name, maxsplit=1)
    return f"{head}.{stay.index(int(number))}{rest}" if int(number) in stay else None
