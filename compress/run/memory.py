"""An estimate of a job's peak memory: each part of the program says how many bytes it needs, and here they are added."""

from collections.abc import Sequence
from math import prod

from paredown.compress.checkpoint.writer import pending_bytes
from paredown.compress.job import Job
from paredown.compress.methods.base import BlockMethod, Group, GroupMethod, SublayerMethod
from paredown.compress.methods.structured.experts import ExpertMethod
from paredown.compress.model.blocks import View
from paredown.compress.model.stream import batch_bytes, element_size, hidden_bytes, outside_bytes
from paredown.compress.numerics.moments import INPUT_NEEDS, InputStats, Need
from paredown.compress.recovery.reconstruct import tuning_bytes
from paredown.compress.shape_job import ShapeJob, block_numbers
from paredown.compress.survey.depth import profile_bytes
from paredown.compress.survey.direct import Pairs
from paredown.compress.survey.expert_fit import ExpertFit
from paredown.compress.survey.sides import held_bytes, kept_room
from paredown.compress.survey.survey import TOKENS


def memory_parts(job: Job, targets: Sequence[View], calibration: int, evaluations: Sequence[int]) -> dict[str, int]:
    """Bytes of each part of the peak.

    targets: the layers that are edited. `calibration` and `evaluations` are numbers of tokens: of the calibration text, and
    of each evaluation text.
    """
    source, method, element = job.source, job.method, job.element_size
    sizes = [sum(t.numel() for t in block.module.state_dict().values()) for block in job.blocks]
    weights = max(sizes)
    block = job.blocks[sizes.index(weights)]
    edited = [v for v in targets if v.name.startswith(block.prefix)] or list(targets[:1])
    numbers = sum(prod(v.shape) for v in edited)
    widest = max((v.shape[0] for v in edited), default=0)
    hidden = hidden_bytes(source, calibration * (2 if job.follows_dense else 1) + 2 * sum(evaluations))
    room = kept_room(source.device, hidden)
    return {
        # its weights as they were read, and the edited ones beside them
        "block": element * (weights + numbers),
        "pending": pending_bytes(numbers * element),
        "solver": _statistics(job, edited) + max((method.working_bytes(v.shape) for v in edited), default=0),
        "activations": hidden,
        "kept": held_bytes(edited, calibration, element, source.device, room) if job.paired else 0,
        "batch": batch_bytes(source, widest),
        "tuning": _tuning(job, edited, calibration) if job.recipe.reconstruct else 0,
        # needed at the start and at the end, when no block is in memory
        "outside": outside_bytes(source),
    }


def smaller_parts(job: ShapeJob, calibration: int, evaluations: Sequence[int]) -> dict[str, int]:
    """As `memory_parts`, where blocks or units are removed."""
    source, element = job.source, element_size(job.source)
    weights = max(block_numbers(block) for block in job.blocks)
    readers = {v.name: v.shape for block in job.blocks for v in block.views()}
    shapes = [readers[group.reader] for group in job.all_groups if group.reader]  # experts have none
    solver = 0
    if isinstance(job.method, GroupMethod) and shapes:
        widest = max(shapes, key=lambda shape: shape[1])
        solver = InputStats.bytes(widest[1], job.collected) + job.method.working_bytes(widest)
        solver += 4 * min(widest) ** 2 if job.gradients else 0
        solver += Pairs.bytes(widest, calibration, element) if job.method.uneven else 0
    elif isinstance(job.method, ExpertMethod):
        solver = max((_experts_bytes(job, job.method, group) for group in job.all_groups), default=0)
    elif job.refits:
        out, inner = max((v.shape for block in job.blocks for v in block.views()), key=lambda shape: shape[1])
        solver = 8 * (4 * inner * inner + 3 * out * inner)
    texts = calibration * (2 if job.follows_dense else 1) + 2 * sum(evaluations)
    surveyed = 0  # before the texts are there
    if isinstance(job.method, BlockMethod):
        windows = job.recipe.calibration.sequences
        surveyed = profile_bytes(source, job.method, len(job.blocks), windows, calibration // windows)
    elif isinstance(job.method, SublayerMethod):
        length = calibration // job.recipe.calibration.sequences
        windows = min(job.method.windows, job.recipe.calibration.sequences)
        surveyed = (len(job.sublayers) + 2) * hidden_bytes(source, windows * length)  # a copy for each trial
    return {
        "finding": element * weights + max((_finding_bytes(job, group) for group in job.all_groups), default=0),
        "block": 2 * element * weights,  # the dense one, and the one that is made of it
        "pending": pending_bytes(element * weights),
        "solver": solver,
        "activations": max(hidden_bytes(source, texts), surveyed),
        "batch": batch_bytes(source, max((shape[0] for shape in readers.values()), default=0)),
        "tuning": tuning_bytes(source, weights, 4 * weights // 1000) + hidden_bytes(source, calibration)
        if job.recipe.reconstruct
        else 0,
        "outside": outside_bytes(source, isinstance(job.method, GroupMethod) and bool(job.gradients)),
    }


def peak(parts: dict[str, int]) -> int:
    """The most bytes that are needed at the same time."""
    walking = (
        parts["block"] + parts["pending"] + parts.get("kept", 0) + max(parts["solver"], parts["batch"], parts["tuning"])
    )
    # groups are found before any text is there
    return max(parts["activations"] + max(walking, parts["outside"]), parts.get("finding", 0))


def _finding_bytes(job: ShapeJob, group: Group) -> int:
    """Bytes that finding a group takes beside its block: its module in float32, and with its units permuted.

    The parameter that is being permuted is there twice.
    """
    inside = f"{group.name}."
    sizes = {name: tensor.numel() for name, tensor in job.source.parameters.items() if name.startswith(inside)}
    permuted = {part.name: sizes[part.name] for part in group.parts}
    wide = 0 if element_size(job.source) == 4 else sum(sizes.values())
    return 4 * (wide + sum(permuted.values()) + max(permuted.values()))


def _experts_bytes(job: ShapeJob, method: ExpertMethod, group: Group) -> int:
    """Bytes that a method of experts takes beside the block and what is made of it."""
    shapes = {part.name: job.source.parameters[part.name].shape for part in group.parts}
    if method.merges:  # two copies of a parameter, and the products of two experts' channels
        channels = shapes[group.inner[-1].name][group.inner[-1].dim] if group.inner else 0
        return 2 * element_size(job.source) * max(prod(shape) for shape in shapes.values()) + 24 * channels**2
    if method.fit and group.inner:
        shape = shapes[group.inner[-1].name]
        channels = shape[group.inner[-1].dim]
        return ExpertFit.bytes(job.stays(group), prod(shape[1:]) // channels, channels)
    return 0


def _statistics(job: Job, edited: Sequence[View]) -> int:
    """Bytes of the moments of a block: a set for each width of an input and each expert, and those of output gradients."""
    # CROSS is collected for one layer at a time: `working_bytes` counts it
    needs = (job.collected | job.surveyed & INPUT_NEEDS) - {Need.CROSS}
    # experts have inputs of their own
    widths = {(v.shape[1], None if v.expert is None else v.name) for v in edited}
    inputs = sum(InputStats.bytes(width, needs) for width, _ in widths)
    gradients = 4 * sum(min(v.shape) ** 2 for v in edited) if job.gradients else 0  # float32
    of_weights = job.surveyed & {Need.FISHER, Need.WEIGHT_GRADIENT}  # as large as the weight, float64
    pairs = sum(element_size(job.source) * TOKENS * sum(v.shape) for v in edited) if job.reads_pairs else 0
    return inputs + gradients + 8 * len(of_weights) * sum(prod(v.shape) for v in edited) + pairs


def _tuning(job: Job, edited: Sequence[View], calibration: int) -> int:
    """Bytes that reconstruction needs for a block, for what autograd keeps of a batch, and for the dense block's inputs."""
    numbers = sum(prod(v.shape) for v in edited)
    activations = sum(sum(v.shape) for v in edited)
    return tuning_bytes(job.source, numbers, activations) + hidden_bytes(job.source, calibration)
