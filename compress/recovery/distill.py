"""Distillation: train a compressed model towards the next-token probabilities of the dense one.

After Hinton et al. 2015 (arXiv 1503.02531) and, for compressed language models, Muralidharan et al. 2024, Minitron (arXiv
2407.14679). The teacher's probabilities come from the disk, see `targets`; what is trained, and in which precision, is told
in `trainable`. The loop is plain torch, in one process: that an interrupted run goes on to the same numbers rests on every
draw and every sum being its own, and the teacher, which would ask for devices of its own, is gone by then.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from paredown.compress.progress import Counted, Measured, Progress
from paredown.compress.recipe import DistillSpec
from paredown.compress.recovery import optimizer, taid
from paredown.compress.recovery.divergence import TopK, mean_divergence
from paredown.compress.recovery.hidden import outputs_of, scaled, states_error
from paredown.compress.recovery.targets import Targets
from paredown.compress.recovery.trainable import Trainable

MICRO_TOKENS = {"cpu": 1024, "cuda": 8192}  # of one forward and backward pass


class Diverged(Exception):
    """The loss or its gradient is not finite. The message says at which step."""


class TooFast(Diverged):
    """The held-out divergence is higher than before training, and no text was seen twice: the steps are too long."""


@dataclass
class Course:
    """What a training has come to, as plain data."""

    step: int = 0  # steps taken
    rate: float = 1.0  # times the learning rate: halved once the loss was not finite
    losses: list[float] = field(default_factory=list)  # of each step
    curve: list[list[float]] = field(default_factory=list)  # [steps taken, held-out divergence]
    stopped: str = ""  # why training ended
    share: float = 1.0  # of the teacher in the target
    momentum: float = 0.0  # of what moves it

    @property
    def best(self) -> int:
        """The index of the lowest held-out divergence in the curve."""
        return min(range(len(self.curve)), key=lambda i: self.curve[i][1])


@dataclass
class Distillation:
    """Training on windows ids (windows, length), scored on `heldout` windows: the last of the targets' windows are these.

    `compared`: modules of the student whose outputs are to be the teacher's hidden states, in the order of the targets'
    layers. `rows`, which of the windows are trained on, may be set before the first step.
    """

    student: Trainable
    ids: Tensor
    heldout: Tensor
    targets: Targets
    spec: DistillSpec
    seed: int
    device: torch.device
    progress: Progress = field(default_factory=Progress)
    compared: Sequence[nn.Module] = ()

    def __post_init__(self) -> None:
        spec = self.spec
        self.rows: Sequence[int] = range(len(self.ids))
        self.optimizer = optimizer.make(spec.optimizer, self.student.groups())
        self.course = self._beginning()
        self.initial = self.kept = self.student.results()
        if spec.checkpointing:
            self.student.checkpointed()

    @property
    def step_tokens(self) -> int:
        """Of one step."""
        return min(self.spec.batch, len(self.rows)) * self.ids.shape[1]

    @property
    def steps(self) -> int:
        """How many there are in all."""
        return max(1, round(self.spec.tokens / self.step_tokens))

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs beside the course: tensors by name."""
        weights = self.student.weights
        tensors = {f"master/{name}": w.master for name, w in weights.items()}
        tensors |= {f"kept/{name}": t for name, t in self.kept.items()}
        return tensors | optimizer.saved(self.optimizer, self._masters)

    def restore(self, course: Course, tensors: Mapping[str, Tensor]) -> None:
        """Stand where another training of the same text and settings stood at its `state`."""
        self.course = course
        parts: dict[str, dict[str, Tensor]] = {"master": {}, "kept": {}, "optimizer": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.student.take(parts["master"])
        self.kept = parts["kept"]
        optimizer.restore(self.optimizer, self._masters, parts["optimizer"])

    def restart(self, rate: float) -> None:
        """Begin anew at this share of the learning rate."""
        self.student.take(self.initial)
        self.course, self.kept = self._beginning(rate), self.initial
        self.optimizer.state.clear()

    def _beginning(self, rate: float = 1.0) -> Course:
        return Course(rate=rate, share=self.spec.taid.start if self.spec.taid else 1.0)

    @property
    def _masters(self) -> dict[str, Tensor]:
        return {name: weight.master for name, weight in self.student.weights.items()}

    @torch.no_grad()
    def survey(self) -> tuple[Tensor, Tensor]:
        """Of each window that may be trained on: its divergence (windows,), and what it is about (windows, hidden).

        That is the mean of the last block's outputs, each token's of unit size.
        """
        found, means = [], []
        for part in self._passes(list(range(len(self.ids)))):
            with outputs_of([self.student.blocks[-1]]) as outputs:
                logits = self._logits(self.ids, part)
            target = self.targets.read(part)
            found += [self._divergence(logits[i : i + 1], target.part(i, i + 1)).cpu() for i in range(len(part))]
            means.append(scaled(outputs[0]).values.float().mean(1).cpu())
            words = f"comparing with the teacher: {part[-1] + 1} of {len(self.ids)} windows"
            self.progress.doing(Counted(words, "comparing with the teacher", part[-1] + 1, len(self.ids)))
        return torch.stack(found), torch.cat(means)

    def run(self, save: Callable[[], None]) -> None:
        """Train to the end; `save` is called between steps. Raises Diverged, and TooFast only at the whole rate.

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
            found = self._loss(part) * share
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
        if spec.taid:
            before, done = (course.losses[-1] if course.losses else None), course.step / self.steps
            course.share, course.momentum = taid.moved(course.share, course.momentum, before, loss, done, spec.taid)
        course.losses.append(loss)
        words = f"distilling: step {course.step} of {self.steps}, loss {loss:.3f}, held-out {course.curve[-1][1]:.3f}"
        self.progress.doing(Counted(words, "distilling", course.step, self.steps))
        self.progress.measured(Measured("distill", course.step, {"loss": loss}))

    def _evaluate(self) -> None:
        """Add to the curve; keep the numbers if the divergence is the lowest, and stop if it has not fallen for long."""
        course, first = self.course, len(self.ids)
        total = 0.0
        with torch.no_grad():
            for part in self._passes(list(range(len(self.heldout)))):
                target = self.targets.read([first + i for i in part])
                total += float(self._divergence(self._logits(self.heldout, part), target)) * len(part)
        course.curve.append([course.step, total / len(self.heldout)])
        since = len(course.curve) - 1 - course.best
        if since == 0:
            self.kept = self.student.results()
        elif since >= self.spec.patience and course.step < self.steps:
            course.stopped = f"the held-out divergence has not fallen for {since} evaluations"
        self.progress.note(f"step {course.step} of {self.steps}: held-out divergence {course.curve[-1][1]:.4f}")
        self.progress.measured(Measured("heldout", course.step, {"divergence": course.curve[-1][1]}))
        once = course.step * min(self.spec.batch, len(self.rows)) <= len(self.rows)
        if course.rate == 1 and once and course.curve[-1][1] > course.curve[0][1]:
            raise TooFast(
                f"at step {course.step} of {self.steps} the held-out divergence is higher than before training"
            )

    def _loss(self, windows: list[int]) -> Tensor:
        """The mean of what training lowers on some windows."""
        with outputs_of(self.compared) as outputs:
            logits = self._logits(self.ids, windows)
        loss = self._divergence(logits, self.targets.read(windows), self.course.share)
        if self.spec.hidden is None:
            return loss
        states = [output[:, :-1] for output in outputs]
        return loss + self.spec.hidden.weight * states_error(states, self.targets.states(windows))

    def _logits(self, ids: Tensor, rows: list[int]) -> Tensor:  # (rows, length - 1, vocabulary)
        logits: Tensor = self.student.model(ids[rows].to(self.device), use_cache=False).logits
        return logits[:, :-1]

    def _divergence(self, logits: Tensor, target: TopK, share: float = 1.0) -> Tensor:
        return mean_divergence(logits, target, self.spec.loss, self.spec.temperature, share)

    def _passes(self, windows: list[int]) -> list[list[int]]:
        size = max(1, MICRO_TOKENS[self.device.type] // self.ids.shape[1])
        return [windows[i : i + size] for i in range(0, len(windows), size)]

    def _windows(self, step: int) -> list[int]:
        """The windows of a step: each is seen once in a pass over all, in an order of the pass's own."""
        count = len(self.rows)
        batch = min(self.spec.batch, count)
        places = range(step * batch, (step + 1) * batch)
        orders = {p: _order(count, self.seed, p) for p in {place // count for place in places}}
        return [self.rows[orders[place // count][place % count]] for place in places]

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
