"""Distillation: train a compressed model towards the next-token probabilities of the dense one.

After Hinton et al. 2015 (arXiv 1503.02531) and, for compressed language models, Muralidharan et al. 2024, Minitron (arXiv
2407.14679). The teacher's probabilities come from the disk, see `targets`; what is trained, and in which precision, is told
in `trainable`. The loop is plain torch, in one process: that an interrupted run goes on to the same numbers rests on every
draw and every sum being its own, and the teacher, which would ask for devices of its own, is gone by then.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paredown.compress.progress import Counted, Progress
from paredown.compress.recipe import DistillSpec
from paredown.compress.recovery.divergence import mean_divergence
from paredown.compress.recovery.targets import Targets
from paredown.compress.recovery.trainable import Trainable

MICRO_TOKENS = {"cpu": 1024, "cuda": 8192}  # of one forward and backward pass
BETAS = (0.9, 0.95)  # of AdamW; steps are few


class Diverged(Exception):
    """The loss or its gradient is not finite. The message says at which step."""


@dataclass
class Course:
    """What a training has come to, as plain data."""

    step: int = 0  # steps taken
    rate: float = 1.0  # times the learning rate: halved once the loss was not finite
    losses: list[float] = field(default_factory=list)  # of each step
    curve: list[list[float]] = field(default_factory=list)  # [steps taken, held-out divergence]
    stopped: str = ""  # why training ended

    @property
    def best(self) -> int:
        """The index of the lowest held-out divergence in the curve."""
        return min(range(len(self.curve)), key=lambda i: self.curve[i][1])


@dataclass
class Distillation:
    """Training on windows ids (windows, length), scored on `heldout` windows: the last of the targets' windows are these."""

    student: Trainable
    ids: Tensor
    heldout: Tensor
    targets: Targets
    spec: DistillSpec
    seed: int
    device: torch.device
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        spec = self.spec
        self.step_tokens = min(spec.batch, len(self.ids)) * self.ids.shape[1]
        self.steps = max(1, round(spec.tokens / self.step_tokens))
        self.optimizer = torch.optim.AdamW(self.student.groups(), betas=BETAS, weight_decay=0.0)
        self.course = Course()
        self.initial = self.kept = self.student.results()
        if spec.checkpointing:
            self.student.checkpointed()

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs beside the course: tensors by name."""
        weights = self.student.weights
        tensors = {f"master/{name}": w.master for name, w in weights.items()}
        tensors |= {f"kept/{name}": t for name, t in self.kept.items()}
        for name, w in weights.items():
            if moments := self.optimizer.state.get(w.master):
                tensors |= {f"first/{name}": moments["exp_avg"], f"second/{name}": moments["exp_avg_sq"]}
        return tensors

    def restore(self, course: Course, tensors: Mapping[str, Tensor]) -> None:
        """Stand where another training of the same text and settings stood at its `state`."""
        self.course = course
        parts: dict[str, dict[str, Tensor]] = {"master": {}, "kept": {}, "first": {}, "second": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.student.take(parts["master"])
        self.kept = parts["kept"]
        self.optimizer.state.clear()
        for name, first in parts["first"].items():
            master = self.student.weights[name].master
            self.optimizer.state[master] = {
                "step": torch.tensor(float(course.step)),
                "exp_avg": first.to(master.device, copy=True),
                "exp_avg_sq": parts["second"][name].to(master.device, copy=True),
            }

    def restart(self, rate: float) -> None:
        """Begin anew at this share of the learning rate."""
        self.student.take(self.initial)
        self.course, self.kept = Course(rate=rate), self.initial
        self.optimizer.state.clear()

    def run(self, save: Callable[[], None]) -> None:
        """Train to the end; `save` is called between steps. Raises Diverged for a loss that is not finite.

        `kept` is then what had the lowest held-out divergence.
        """
        every = math.ceil(self.steps / self.spec.evaluations)
        if not self.course.curve:
            self._evaluate()
        while self.course.step < self.steps and not self.course.stopped:
            self._step()
            if self.course.step % every == 0 or self.course.step == self.steps:
                self._evaluate()
            save()
        self.course.stopped = self.course.stopped or "all its tokens were seen"
        self.progress.doing("")

    def _step(self) -> None:
        """One step of the optimizer, in as many passes as its tokens take."""
        course, spec = self.course, self.spec
        windows = self._windows(course.step)
        parts = self._passes(windows)
        loss = 0.0
        for part in parts:
            share = len(part) / len(windows)
            found = self._loss(self.ids, part, part) * share
            found.backward()
            loss += float(found.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.student.masters, spec.clip))
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise Diverged(f"at step {course.step + 1} of {self.steps} the loss is {loss}, its gradient {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = spec.lr * course.rate * group["size"] * self._schedule(course.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.student.show()
        course.step += 1
        course.losses.append(loss)
        words = f"distilling: step {course.step} of {self.steps}, loss {loss:.3f}, held-out {course.curve[-1][1]:.3f}"
        self.progress.doing(Counted(words, "distilling", course.step, self.steps))

    def _evaluate(self) -> None:
        """Add to the curve; keep the numbers if the divergence is the lowest, and stop if it has not fallen for long."""
        course, first = self.course, len(self.ids)
        total = 0.0
        with torch.no_grad():
            for part in self._passes(list(range(len(self.heldout)))):
                total += float(self._loss(self.heldout, part, [first + i for i in part])) * len(part)
        course.curve.append([course.step, total / len(self.heldout)])
        since = len(course.curve) - 1 - course.best
        if since == 0:
            self.kept = self.student.results()
        elif since >= self.spec.patience and course.step < self.steps:
            course.stopped = f"the held-out divergence has not fallen for {since} evaluations"
        self.progress.note(f"step {course.step} of {self.steps}: held-out divergence {course.curve[-1][1]:.4f}")

    def _loss(self, ids: Tensor, rows: list[int], windows: list[int]) -> Tensor:
        """The mean loss of some rows of ids, whose targets are those of `windows`."""
        batch = ids[rows].to(self.device)
        logits = self.student.model(batch, use_cache=False).logits[:, :-1]  # (rows, length - 1, vocabulary)
        return mean_divergence(logits, self.targets.read(windows), self.spec.loss, self.spec.temperature)

    def _passes(self, windows: list[int]) -> list[list[int]]:
        size = max(1, MICRO_TOKENS[self.device.type] // self.ids.shape[1])
        return [windows[i : i + size] for i in range(0, len(windows), size)]

    def _windows(self, step: int) -> list[int]:
        """The windows of a step: each is seen once in a pass over all, in an order of the pass's own."""
        count, batch = len(self.ids), min(self.spec.batch, len(self.ids))
        places = range(step * batch, (step + 1) * batch)
        orders = {p: _order(count, self.seed, p) for p in {place // count for place in places}}
        return [orders[place // count][place % count] for place in places]

    def _schedule(self, step: int) -> float:
        """The share of the learning rate: a rise, then a cosine."""
        rise = max(1, round(self.spec.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(self.steps - rise, 1)))


def _order(count: int, seed: int, turn: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1000003 + turn)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
