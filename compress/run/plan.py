"""What a run would do: which layers it edits, bytes, memory and disk, from shapes alone, before any weight is read."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

from paredown.compress.allocation.base import Options
from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.out_folder import OutFolder
from paredown.compress.errors import PareError
from paredown.compress.job import Format, Job
from paredown.compress.machine import available_memory
from paredown.compress.methods.base import WeightMethod
from paredown.compress.model.blocks import View, known
from paredown.compress.model.stream import element_size
from paredown.compress.progress import ignore
from paredown.compress.recipe import Recipe
from paredown.compress.run.biases import dense_export
from paredown.compress.run.duration import stage_seconds
from paredown.compress.run.memory import memory_parts, peak, smaller_parts
from paredown.compress.run.open import max_length, open_source, resolve_recipe
from paredown.compress.run.texts import read_texts
from paredown.compress.serving.engines import engines
from paredown.compress.shape_job import ShapeJob, check_ordinary, resolve
from paredown.compress.storage.kinds import stored_bytes, stored_numbers
from paredown.compress.storage.shapes import UNEVEN
from paredown.compress.storage.spec import Spec
from paredown.evaluation.lm_tasks import check_tasks

OUTSIDE = "embeddings, head and others outside the blocks"
EVALUATION_WINDOWS = 64  # a plan's guess for each evaluation text if the recipe sets no limit


@dataclass(frozen=True)
class Plan:
    """What a run would do. Bytes and memory are in bytes; `memory` is the peak above what the imported libraries take."""

    family: str
    known_family: bool
    blocks: int
    targeted: list[str]
    left_out: list[str]  # linear layers that stay as they are, by the recipe's patterns or by our rules
    unsupported: list[str]  # matrices that no method can edit
    parameters: int
    targeted_parameters: int
    kept_parameters: int
    bytes_before: int
    bytes_after: int
    memory: int
    stay_dense: list[str] = field(default_factory=list)  # targeted layers that would store no less compressed
    at_most: bool = False  # `kept_parameters` and `bytes_after` are upper bounds: the calibration text decides
    memory_parts: dict[str, int] = field(default_factory=dict)  # bytes
    remarks: list[str] = field(default_factory=list)  # on the checkpoint as it was found
    untargeted: dict[str, int] = field(
        default_factory=dict
    )  # parameters that are not targeted, by the reason, most first
    dense_export: str = ""  # whether a packed checkpoint can be exported as a dense one, in words; "" for a dense one
    seconds: Mapping[str, float] = field(default_factory=dict)  # of each step of the run; empty if not asked for
    disk_free: int | None = None  # bytes, where OUT is to be; None if none is named
    engines: dict[str, str] = field(default_factory=dict)  # how each engine takes what comes out, by its name

    @property
    def shrinks(self) -> bool:
        """Whether the file becomes smaller."""
        return self.bytes_after < self.bytes_before

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        total = sum(self.seconds.values()) or None
        return {**asdict(self), "disk": self.bytes_after, "shrinks": self.shrinks, "total_seconds": total}


def plan(
    model: str | Path,
    recipe: Recipe | str,
    *,
    overrides: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    calibration: str | None = None,
    eval_text: Sequence[str] = (),
    tasks: Sequence[str] | None = None,
    task_folder: Path | None = None,
    allow_task_code: bool = False,
    format: Format = "packed",
    device: str = "auto",
    dtype: str = "auto",
    seed: int | None = None,
    allow_scored_calibration: bool = False,
    revision: str | None = None,
    out: str | Path | None = None,
    probe: bool = False,
    startup: float = 0.0,
    cache: bool = True,
    runs: int = 1,
    note: Callable[[str], None] = ignore,
) -> Plan:
    """What `compress` would do, without reading any text or weight: windows are counted as the recipe asks for them.

    Arguments are those of `compress`. With `probe` the text is read and counted, and the job done on the model's first block
    alone, for some seconds: then the plan has the time that the run takes on this machine. `startup`: seconds that a new
    process needs to import all this, which the run does twice. `runs`: how often all of it is done, for several seeds.
    `cache`: the run may use scores that were kept. Raises PareError as `compress` does.
    """
    began = perf_counter()
    allowed, later = allow_scored_calibration, ""
    resolved = resolve_recipe(recipe, overrides, calibration, eval_text, tasks, seed, plugins, allowed)
    check_tasks(resolved.evaluate.tasks, task_folder, allow_code=allow_task_code, data=True)
    if out is not None:
        OutFolder(Path(out)).look()
    source = open_source(str(model), revision, device, dtype)
    every, recovers = resolved.each_stage or [resolved], bool(resolved.recover)
    if resolved.stages:
        later = f"this is the first of {len(resolved.stages)} stages; then {', '.join(s.method for s in resolved.stages[1:])}"
        resolved, format = resolved.each_stage[0], "packed" if len(resolved.stages) == 1 else "dense"
    job, longest = resolve(source, resolved, format), max_length(source)
    if format == "dense" and not later:
        check_ordinary(job)
    spec, scored = resolved.calibration, resolved.evaluate
    tokens = spec.sequences * min(spec.length, longest)
    texts = [(scored.windows or EVALUATION_WINDOWS) * min(scored.length, longest) for _ in scored.perplexity]
    seconds: dict[str, float] = {}
    if probe:
        windows, evaluations, _ = read_texts(resolved, source, load_tokenizer(source.folder), note=note)
        tokens, texts = windows.tokens, [text.tokens for text in evaluations]
        opening = perf_counter() - began
        note("timing the first block")
        seconds, untold = stage_seconds(job, every, windows, evaluations, cache)
        all_runs = {name: runs * part for name, part in seconds.items()}
        seconds = {"start and check": startup + runs * (startup + opening), **all_runs} if seconds else {}
        without = "the time is without that of the recovery" if seconds and recovers else ""
        later = "; ".join(filter(None, (later, untold, without)))
    result = make_plan(job, tokens, texts)
    free = None if out is None else _disk_free(Path(out))
    taken = {} if len(every) > 1 else result.engines  # what further stages write is not known yet
    remarks = [*result.remarks, *filter(None, [later])]
    return replace(result, remarks=remarks, seconds=seconds, disk_free=free, engines=taken)


def make_plan(job: Job | ShapeJob, calibration: int, evaluations: Sequence[int]) -> Plan:
    """The plan of a job. `calibration` and `evaluations` are numbers of tokens: of the calibration and of each text.

    Raises PareError if a layer cannot be compressed as the recipe asks.
    """
    source = job.source
    if isinstance(job, ShapeJob):
        return _smaller(job, calibration, evaluations)
    targets = job.targets_within()
    sizes = _sizes(job, targets)
    before = sum(entry.bytes for entry in source.files.entries.values())
    parts = memory_parts(job, targets, calibration, evaluations)
    return Plan(
        family=source.family,
        known_family=known(source),
        blocks=len(job.blocks),
        targeted=[view.name for view in targets],
        left_out=_left_out(job, targets),
        unsupported=[name for block in job.blocks for name in block.others()],
        parameters=sum(t.numel() for t in source.parameters.values()),
        targeted_parameters=sum(prod(view.shape) for view in targets),
        kept_parameters=sizes.numbers,
        bytes_before=before,
        bytes_after=before - sizes.saved - source.bytes_left,
        memory=peak(parts),
        stay_dense=sizes.dense,
        at_most=sizes.at_most,
        memory_parts=parts,
        remarks=[*source.remarks, *([UNEVEN] if source.shapes else [])],
        untargeted=_untargeted(job, targets),
        dense_export=dense_export(job, targets) if job.format == "packed" else "",
        engines=dict(engines(job.format, [*source.modules.values(), *sizes.specs], bool(source.shapes))),
    )


def _smaller(job: ShapeJob, calibration: int, evaluations: Sequence[int]) -> Plan:
    """The plan of a job that removes blocks or units."""
    source = job.source
    before = sum(entry.bytes for entry in source.files.entries.values())
    removed = (job.numbers - job.kept_numbers) * element_size(source)
    parts = smaller_parts(job, calibration, evaluations)
    groups = [group.name for group in job.all_groups]
    parameters = sum(t.numel() for t in source.parameters.values())
    return Plan(
        family=source.family,
        known_family=known(source),
        blocks=len(job.blocks),
        targeted=groups or [block.name for block in job.blocks],
        left_out=[],
        unsupported=[],
        parameters=parameters,
        targeted_parameters=job.numbers,
        kept_parameters=job.kept_numbers,
        bytes_before=before,
        bytes_after=before - removed - source.bytes_left,
        memory=peak(parts),
        memory_parts=parts,
        untargeted={OUTSIDE: parameters - job.numbers},
        remarks=[*source.remarks, *job.remarks, f"what comes out: {_form(job)}"],
        engines=dict(engines("dense", uneven=job.uneven)),
    )


def _form(job: ShapeJob) -> str:
    """What comes out, and what loads it."""
    if job.uneven:
        return f"{job.form} ({UNEVEN})"
    return f"an ordinary {job.source.family} checkpoint with {job.form}"


def check_room(plan: Plan, out: Path, written: int = 0) -> None:
    """Raises PareError if the disk that will hold `out`, or the host's memory, is too small for the plan.

    written: bytes of the checkpoint that a stopped run has left on that disk.
    """
    folder, free = _standing(out), _disk_free(out) + written
    if free < plan.bytes_after:
        raise PareError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free, and the checkpoint needs {plan.bytes_after / 1e9:.1f} GB: "
            f"free {(plan.bytes_after - free) / 1e9:.1f} GB, or name another output with -o."
        )
    memory = available_memory()
    if memory is not None and memory < plan.memory:
        raise PareError(
            f"{plan.memory / 1e9:.1f} GB of memory are needed and {memory / 1e9:.1f} GB are free: "
            f"{(plan.memory - memory) / 1e9:.1f} GB are missing. Take fewer or shorter windows "
            "(--set calibration.sequences=..., --set evaluate.windows=...)."
        )


def _standing(out: Path) -> Path:
    """The folder nearest to `out` that is there."""
    return next(p for p in [out, *out.absolute().parents] if p.exists())


def _disk_free(out: Path) -> int:
    """Bytes that are free where `out` is to be."""
    return shutil.disk_usage(_standing(out)).free


@dataclass(frozen=True)
class _Sizes:
    """What is stored of all targets together."""

    numbers: int
    saved: int  # bytes fewer than the dense weights
    dense: list[str]  # names of the targets that stay dense
    at_most: bool  # the text decides what each layer gets; `numbers` and `saved` hold for the worst case
    specs: list[Spec]  # of the targets that are stored compressed, as far as they are known


def _sizes(job: Job, targets: Sequence[View]) -> _Sizes:
    says_nothing = type(job.method).expect is WeightMethod.expect
    if job.allocation.reads != "shapes" or job.method.budget.by_data or says_nothing:
        return _worst_sizes(job, targets)
    options = job.allocate(targets)
    specs = {view.name: _spec(job, view, options) for view in targets}
    numbers = saved = 0
    for view in targets:
        size, spec = prod(view.shape), specs[view.name]
        numbers += size if spec is None else stored_numbers(spec)
        if spec is not None and job.format == "packed":
            saved += size * job.element_size - stored_bytes(spec, job.element_size)
    dense = [name for name, spec in specs.items() if spec is None]
    return _Sizes(numbers, saved, dense, False, [spec for spec in specs.values() if spec is not None])


def _worst_sizes(job: Job, targets: Sequence[View]) -> _Sizes:
    """The most that may be stored: the whole budget, and the index data of every layer."""
    size = sum(prod(v.shape) for v in targets)
    kept = size
    if job.method.budget.shared:
        kept = int(job.share_for(size) * size)
        if job.method.shares == "any":  # where a mask compares within rows, one layer may keep a weight more in some
            kept = min(kept + min(v.shape[0] for v in targets), size)
    specs = [spec for view in targets if (spec := _expected(job, view)) is not None]
    index = sum(_index_bytes(spec, job.element_size) for spec in specs)
    saved = 0 if job.format == "dense" or kept == size else (size - kept) * job.element_size - index
    return _Sizes(kept, saved, [], True, specs)


def _index_bytes(spec: Spec, element: int) -> int:
    """Bytes that a packed layer stores beside numbers of the model's dtype, such as a mask or PIFA's order of rows."""
    return stored_bytes(spec, element) - stored_numbers(spec) * element


def _expected(job: Job, view: View) -> Spec | None:
    """How a weight will be stored, but for the size, which the text decides. Raises PareError naming the layer."""
    method = job.method_of(view)
    choices = method.choices(view.shape)
    if len(choices) < 2:
        return None
    try:
        return method.at(choices[1].option).expect(view.shape, job.element_size)  # of one kind for all choices
    except PareError as fault:
        raise PareError(f"{view.name}: {fault}") from fault


def _spec(job: Job, view: View, options: Options | None) -> Spec | None:
    """How an edited weight will be stored; None if it stays dense. Raises PareError naming the layer."""
    method = job.method_for(view, options)
    try:
        spec = None if method is None else method.expect(view.shape, job.element_size)
    except PareError as fault:
        raise PareError(f"{view.name}: {fault}") from fault
    # a layer that has a bias already stores no further one
    return replace(spec, bias=spec.bias and view.bias is None) if spec else None


def _untargeted(job: Job, targets: Sequence[View]) -> dict[str, int]:
    """How many parameters are not targeted, by the reason, most first."""
    sizes = {name: tensor.numel() for name, tensor in job.source.parameters.items()}
    inside = tuple(block.prefix for block in job.blocks)
    targeted = {view.name for view in targets}
    unseen = [name for block in job.blocks for name in block.others() if name in sizes]
    experts = sum(sizes[name] for name in unseen if "expert" in name and not name.endswith("bias"))
    counts = {
        OUTSIDE: sum(n for name, n in sizes.items() if not name.startswith(inside)),
        "in blocks that the method leaves out": sum(prod(v.shape) for v in job.targets if v.name not in targeted),
        "left out by targets": sum(prod(v.shape) for v in job.left_out if v.control is None),
        "routers, gates and the like": sum(prod(v.shape) for v in job.left_out if v.control is not None),
        "experts of a class that this version does not know": experts,
        "matrices that no method can edit": sum(sizes[name] for name in unseen) - experts,
    }
    counts["norms, biases and other vectors"] = (
        sum(sizes.values()) - sum(counts.values()) - sum(prod(v.shape) for v in targets)
    )
    return {why: count for why, count in sorted(counts.items(), key=lambda item: -item[1]) if count > 0}


def _left_out(job: Job, targets: Sequence[View]) -> list[str]:
    """Linear layers that stay as they are: by the patterns, by the method's choice of blocks, and by our rules."""
    targeted = {view.name for view in targets}
    return [v.name for v in job.left_out] + [v.name for v in job.targets if v.name not in targeted]
