"""A teacher's next-token probabilities and hidden states of a text, computed once, block by block, and kept on the disk.

So that the teacher is never in memory beside the student. A file holds the targets of some windows; those that an
interrupted run has finished are not computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from paredown.compress.checkpoint.disk import save_tensors, sync
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.model.blocks import blocks
from paredown.compress.model.calls import recorders
from paredown.compress.model.rest import materialised_rest
from paredown.compress.model.stream import head_positions, start
from paredown.compress.progress import ignore
from paredown.compress.recovery.divergence import TopK, top_k
from paredown.compress.recovery.hidden import States, scaled

FILE_TOKENS = {"cpu": 1 << 15, "cuda": 1 << 18}  # in a file: the teacher's hidden states of so many are in memory


def target_bytes(tokens: int, k: int, states: int = 0, width: int = 0) -> int:
    """On the disk: of each token k indices (int32), k log probabilities (float16), and the log of the rest.

    Beside them so many hidden states of `width` numbers (float16), each with its size (float32).
    """
    return tokens * (6 * k + 2 + states * (2 * width + 4))


@dataclass
class Targets:
    """The targets of windows ids (windows, length), in files of `per_file` windows in `folder`."""

    folder: Path
    name: str  # with which the files begin
    ids: Tensor
    k: int
    temperature: float
    per_file: int
    layers: tuple[int, ...] = ()  # the blocks whose outputs are kept too, by index

    @classmethod
    def of(
        cls,
        folder: Path,
        name: str,
        ids: Tensor,
        k: int,
        temperature: float,
        device: torch.device,
        layers: tuple[int, ...] = (),
    ) -> "Targets":
        """In files as large as suits the device that the teacher runs on."""
        tokens = FILE_TOKENS[device.type] // (1 + len(layers))
        return cls(folder, name, ids, k, temperature, max(1, tokens // ids.shape[1]), layers)

    @property
    def files(self) -> int:
        """How many files there are in all."""
        return -(-len(self.ids) // self.per_file)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self._path(n).stat().st_size for n in range(self.files))

    def write(self, teacher: ModelSource, done: Callable[[int], None] = ignore) -> None:
        """Compute those that are not on the disk yet; after each `done` is called with its number, from 1.

        Raises PareError as a run of blocks does.
        """
        for n in range(self.files):
            path = self._path(n)
            if path.exists():
                continue
            ids = self.ids[n * self.per_file : (n + 1) * self.per_file]
            found, states = teach(teacher, ids, self.k, self.temperature, self.layers)
            tensors = {"indices": found.indices, "log_probs": found.log_probs, "rest": found.rest}
            tensors |= {"states": states.values, "sizes": states.sizes} if self.layers else {}
            new = path.with_suffix(".new")
            save_tensors(tensors, new, {"format": "pt"})
            sync(new)
            new.replace(path)
            done(n + 1)

    def read(self, windows: list[int]) -> TopK:
        """The targets of these windows (windows, length - 1, k), mapped from the files."""
        return TopK.joined([TopK(*self._row(window, "indices", "log_probs", "rest")) for window in windows])

    def states(self, windows: list[int]) -> States:
        """The hidden states of these windows (windows, layers, length - 1, hidden)."""
        rows = [self._row(window, "states", "sizes") for window in windows]
        return States(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def _row(self, window: int, *names: str) -> list[Tensor]:  # each (1, ...)
        number, place = divmod(window, self.per_file)
        with safe_open(self._path(number), "pt") as file:
            return [file.get_slice(name)[place : place + 1] for name in names]

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05d}.safetensors"


@torch.no_grad()
def teach(
    teacher: ModelSource, ids: Tensor, k: int, temperature: float, layers: tuple[int, ...] = ()
) -> tuple[TopK, States]:
    """The teacher's targets for each token of ids (windows, length) but the last: (windows, length - 1, k).

    And the outputs of the blocks `layers`. Log probabilities are in float16. One block is in memory at a time.
    """
    stream = start(teacher, ids)
    kept = []
    for block in blocks(teacher):
        with teacher.loaded(block):
            stream.advance(block)
        if block.index in layers:
            kept.append(scaled(torch.cat([batch[:, :-1] for batch in stream.hidden])))
    parts: list[TopK] = []
    with materialised_rest(teacher, embedding=False), recorders(teacher) as recorded:
        for hidden, batch in zip(stream.hidden, stream.ids, strict=True):
            recorded[-1].output = hidden.to(teacher.device, copy=True)
            batch = batch.to(teacher.device)
            found = []
            for positions in head_positions(batch, stream.head_tokens):
                logits = teacher.model(batch, use_cache=False, logits_to_keep=positions).logits
                if logits.shape[1] != len(positions):  # a class that gives all of them
                    logits = logits[:, positions]
                found.append(top_k(logits, k, temperature))
            parts.append(TopK.joined(found, 1))
    whole = TopK.joined(parts)
    return TopK(whole.indices.cpu(), whole.log_probs.half().cpu(), whole.rest.half().cpu()), States.stacked(kept)
