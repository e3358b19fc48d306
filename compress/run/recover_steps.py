"""The steps of a recovery: each trains the checkpoint, from where an interrupted run stopped."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.out_folder import STATE
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import RECORD
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import blocks
from paredown.compress.progress import Counted, Progress
from paredown.compress.recipe import DistillSpec, LoraSpec, Recipe, ReconstructSpec
from paredown.compress.recovery.choose import Choice, chosen
from paredown.compress.recovery.distill import Course, Distillation, Diverged, TooFast
from paredown.compress.recovery.hidden import layers_of
from paredown.compress.recovery.lora import Adapted, places
from paredown.compress.recovery.targets import Targets
from paredown.compress.recovery.trainable import Trainable, pruned_layers
from paredown.compress.run.journal import Journal, State
from paredown.compress.run.recorded import read_record
from paredown.compress.run.recover_blocks import Blockwise, blocks_told
from paredown.compress.text.windows import Windows

HALF = 0.5  # of the learning rate stays once training diverged


@dataclass
class Steps:
    """What is trained, by which recipe and towards which model."""

    source: ModelSource
    teacher: ModelSource
    recipe: Recipe
    texts: Sequence[tuple[Windows, Windows]]  # of each step: to train on, and held out
    journal: Journal
    scratch: Path  # where the teacher's probabilities lie
    progress: Progress
    done: list[dict[str, Any]] = field(default_factory=list)  # what a report says of each finished step

    def run(self) -> dict[str, Tensor]:
        """All steps one after another; the trained numbers by name."""
        state = self.journal.state
        self.done = list(state.facts["done"]) if state else []
        first, kept = len(self.done), dict[str, Tensor]()
        if state and first == len(self.texts):
            return state.part("kept")
        for number in range(first, len(self.texts)):
            own = state if state and number == first and "seconds" in state.facts else None
            start, spec = kept or (state.part("kept") if state else {}), self.recipe.recover[number].spec
            if isinstance(spec, DistillSpec):
                kept = self._distill(number, spec, start, own)
            else:
                kept = self._reconstruct(number, spec, start, own)
        self.journal.save({"done": self.done}, {}, {f"kept/{name}": t for name, t in kept.items()}, last=True)
        return kept

    def _reconstruct(
        self, number: int, spec: ReconstructSpec, numbers: dict[str, Tensor], state: State | None
    ) -> dict[str, Tensor]:
        """One step on the blocks, which differ from the files by `numbers`; those are as the `state` left them, if any."""
        (text, heldout), seed = self.texts[number], self.recipe.calibration.seed
        entries = list(state.facts["blocks"]) if state else []
        spent, began = (float(state.facts["seconds"]) if state else 0.0), perf_counter()
        ids = torch.cat([text.ids, heldout.ids]) if spec.heldout else text.ids
        pruned = self._pruned(name for name, _ in self.source.model.named_parameters())
        work = Blockwise(self.source, self.teacher, ids, pruned, spec, seed, self.progress)
        for entry in work.run(numbers, len(entries)):
            entries.append(entry)
            if self.journal.due(False):
                facts = {"blocks": entries, "done": self.done, "seconds": spent + perf_counter() - began}
                self.journal.save(facts, {}, {f"kept/{name}": tensor for name, tensor in numbers.items()})
        seconds = round(spent + perf_counter() - began, 3)
        texts = {"text": text.provenance(), "heldout": heldout.provenance() if spec.heldout else None}
        settings = {"teacher": self.teacher.id, "settings": spec.model_dump(mode="json"), "seconds": seconds}
        self.done.append({**blocks_told(entries, spec, text), **texts, **settings, "target_bytes": 0})
        return numbers

    def _distill(
        self, number: int, spec: DistillSpec, start: dict[str, Tensor], state: State | None
    ) -> dict[str, Tensor]:
        """One step from the numbers `start`, if there are any, or from the `state` that an interrupted run left in it."""
        text, heldout = self.texts[number]
        targets = self._targets(number, spec, text, heldout, start)
        student = self._student(spec)
        student.take(start)
        seed = self.recipe.calibration.seed
        training = Distillation(student, text.ids, heldout.ids, targets, spec, seed, self.source.device, self.progress)
        training.compared = [student.blocks[i] for i in layers_of(spec.hidden, len(student.blocks))]
        choice = self._choice(training, state)
        spent = float(state.facts["seconds"]) if state else 0.0
        if state:
            training.restore(Course(**state.facts["course"]), state.part("training"))
            self.progress.note(f"going on after {training.course.step} of {training.steps} steps")
        began = perf_counter()

        def save() -> None:
            if self.journal.due(False):
                seconds = spent + perf_counter() - began
                facts = {"course": asdict(training.course), "done": self.done, "seconds": seconds}
                facts |= {"choice": asdict(choice)} if choice else {}
                tensors = {f"training/{name}": tensor for name, tensor in training.state().items()}
                tensors |= {f"kept/{name}": tensor for name, tensor in start.items()}
                self.journal.save(facts, {}, tensors)

        self._train(training, save)
        seconds = round(spent + perf_counter() - began, 3)
        settings = {"teacher": self.teacher.id, "settings": spec.model_dump(mode="json"), "seconds": seconds}
        told = {"choice": choice.told()} if choice else {}
        self.done.append({**_told(training, text, heldout), **told, **settings, "target_bytes": targets.bytes})
        return {**start, **student.stored(training.kept)}

    def _choice(self, training: Distillation, state: State | None) -> Choice | None:
        """The windows that are trained on, chosen anew or by the `state`; None: all of them."""
        spec, windows = training.spec, len(training.ids)
        if spec.data is None:
            return None
        if state:
            choice = Choice(**state.facts["choice"])
        else:
            count = max(1, round(spec.data.budget * windows))
            choice = chosen(*training.survey(), spec.data.clusters, count, training.seed)
            self.progress.note(
                f"training on {count} of {windows} windows: their divergence is {choice.chosen_divergence:.4f}, that of all "
                f"{choice.divergence:.4f}"
            )
        training.rows = choice.rows
        return choice

    def _train(self, training: Distillation, save: Callable[[], None]) -> None:
        """To the end; once, where training diverges, at half the rate: from the last saved state, or anew if that is no good.

        Raises PareError if that happens again.
        """
        for _ in range(2):
            try:
                training.run(save)
                return
            except Diverged as fault:
                if training.course.rate < 1:
                    lower = f"Lower recover: {training.spec.step}.lr."
                    raise PareError(f"distillation diverged twice ({fault}). {lower}") from fault
                anew = isinstance(fault, TooFast)
                place = "beginning" if anew else "last good state"
                self.progress.note(f"{fault}: back to the {place}, with half the learning rate")
                if anew:
                    training.restart(HALF)
                else:
                    self._back(training)

    def _back(self, training: Distillation) -> None:
        """To the saved state of this step, or to its beginning."""
        path = self.journal.writer.folder / STATE
        state = State.read(path) if path.exists() else None
        if state and "course" in state.facts and len(state.facts["done"]) == len(self.done):
            training.restore(Course(**state.facts["course"]), state.part("training"))
            training.course.rate = HALF
        else:
            training.restart(HALF)

    def _targets(
        self, number: int, spec: DistillSpec, text: Windows, heldout: Windows, start: dict[str, Tensor]
    ) -> Targets:
        """The teacher's probabilities on the disk; those that are missing are computed, and saved as the rest is."""
        ids = torch.cat([text.ids, heldout.ids])
        name = f"targets-{number + 1}"
        layers = layers_of(spec.hidden, len(blocks(self.teacher)))
        targets = Targets.of(self.scratch, name, ids, spec.top_k, spec.temperature, self.teacher.device, layers)

        def done(files: int) -> None:
            words = f"running the teacher: part {files} of {targets.files} of the text"
            self.progress.doing(Counted(words, "running the teacher", files, targets.files))
            if self.journal.due(False):
                self.journal.save({"done": self.done}, {}, {f"kept/{name}": t for name, t in start.items()})

        targets.write(self.teacher, done)
        return targets

    def _student(self, spec: DistillSpec) -> Trainable:
        """The checkpoint as its users load it, ready to be trained."""
        source, dtype = self.source, self.source.dtype or torch.float32
        model = transformers_plugin.load(source.folder, experts_implementation="eager").to(source.device)
        wide = torch.bfloat16 if dtype == torch.float16 else dtype
        products = {"auto": wide, "bfloat16": torch.bfloat16, "float32": torch.float32}[spec.products]
        inside = tuple(block.prefix for block in blocks(source))
        pruned = self._pruned(name for name, _ in model.named_parameters())
        if isinstance(spec, LoraSpec):
            seed = self.recipe.calibration.seed
            return Adapted(model, inside, places(source, spec), pruned, products, spec, seed)
        frozen = inside[: -spec.last] if spec.last else ()
        return Trainable(model, inside, pruned, products, spec.embeddings, frozen)

    def _pruned(self, names: Iterable[str]) -> frozenset[str]:
        """Those of the dense weights `names` that the checkpoint's record says were pruned."""
        folder = self.source.folder
        layers = read_record(folder).get("layers", {}) if (folder / RECORD).exists() else {}
        return pruned_layers(names, layers)


def _told(training: Distillation, text: Windows, heldout: Windows) -> dict[str, Any]:
    """What a report says of a finished training."""
    course, each = training.course, training.step_tokens
    tokens = [int(step) * each for step, _ in course.curve]
    remarks = []
    if course.rate < 1:
        remarks.append("training diverged once: it went back, and on at half the learning rate")
    if course.best == 0:
        remarks.append("the held-out divergence never fell: the weights are as they were")
    return {
        "step": training.spec.step,
        "text": text.provenance(),
        "heldout": heldout.provenance(),
        "trained": training.student.numbers,
        "steps": course.step,
        "tokens": course.step * each,
        "passes": round(course.step * each / (len(training.rows) * text.length), 3),
        "curve": [[seen, value] for seen, (_, value) in zip(tokens, course.curve, strict=True)],
        "before": course.curve[0][1],
        "after": course.curve[course.best][1],
        "best_tokens": tokens[course.best],
        "stopped": course.stopped,
        "remarks": remarks,
    }
