"""The layers of a checkpoint that an adapter changes: whether they fit each other, and what comes of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import RECORD
from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.numerics.merge import Lost, merge_dense, merge_packed
from paredown.compress.recovery.trainable import keep_of, pruned_layers
from paredown.compress.run.recorded import read_record
from paredown.compress.serving.adapter_files import AdapterFiles
from paredown.compress.storage.kinds import kind_of
from paredown.compress.storage.spec import DENSE
from paredown.evaluation.tables import layer_kind

OTHER = "The adapter was made for another model. Name the one that fits this checkpoint, with --adapter."


@dataclass
class Merging:
    """An adapter beside the checkpoint that takes it. What is lost on the way is added up."""

    source: ModelSource
    files: AdapterFiles
    lost: dict[tuple[str, str], list[Lost]] = field(default_factory=dict)  # kind of layer, and of its storage

    def __post_init__(self) -> None:
        folder = self.source.folder
        layers = read_record(folder).get("layers", {}) if (folder / RECORD).exists() else {}
        self.pruned = pruned_layers(self.source.parameters, layers)

    def check(self) -> None:
        """Raise PareError, naming the layer, unless each of the adapter's layers is one of the model's, of its sizes."""
        modules = dict(self.source.model.named_modules())
        for layer, parts in self.files.layers.items():
            module = modules.get(layer)
            sizes = None if module is None else self._sizes(layer, module)
            if sizes is None:
                kind = "none of that name" if module is None else f"a {type(module).__name__} there"
                known = [name for name, m in modules.items() if self._sizes(name, m)]
                hint = did_you_mean(layer, known) if module is None else ""
                raise PareError(
                    f"the adapter has an update of {layer!r}, and {self.source.id} has {kind}.{hint} {OTHER}"
                )
            out, inner = sizes
            if parts["up"] != (out, parts["down"][0]) or parts["down"][1] != inner:
                found = f"{[*parts['up']]} and {[*parts['down']]}"
                raise PareError(
                    f"the adapter's matrices of {layer} are {found}, and its weight in {self.source.id} is {[out, inner]}. "
                    f"{OTHER}"
                )
            self._check_owned(layer, parts)

    def of_block(self, block: Block, progress: Callable[[int, int], None]) -> dict[str, Tensor]:
        """The tensors of a block that change, by full name. `progress` is called with (blocks done, blocks)."""
        found = self._changed(name for name in self.files.layers if name.startswith(block.prefix))
        progress(block.index + 1, len(blocks(self.source)))
        return found

    def outside(self) -> dict[str, Tensor]:
        """Those outside the blocks, such as the output head."""
        inside = tuple(block.prefix for block in blocks(self.source))
        return self._changed(name for name in self.files.layers if not name.startswith(inside))

    def parts(self) -> list[dict[str, Any]]:
        """What a report says of each kind of layer."""
        found = []
        for (part, kind), losses in sorted(self.lost.items()):
            total = sum(losses, Lost())
            lost, written = (round(total.share(each), 6) for each in (total.form, total.written))
            found.append({"part": part, "kind": kind, "layers": len(losses), "lost": lost, "written": written})
        return found

    def _changed(self, layers: Iterable[str]) -> dict[str, Tensor]:
        changed: dict[str, Tensor] = {}
        for layer in layers:
            try:
                tensors, lost = self._merged(layer)
            except PareError as fault:
                raise PareError(f"{layer}: {fault}") from fault
            changed |= {name: tensor.cpu() for name, tensor in tensors.items()}
            spec = self.source.modules.get(layer)
            self.lost.setdefault((layer_kind(layer), spec.kind if spec else DENSE), []).append(lost)
        return changed

    def _merged(self, layer: str) -> tuple[dict[str, Tensor], Lost]:
        """The tensors that the checkpoint stores of a layer with its update, by full name."""
        device = self.source.device
        update, gain = self.files.read(layer)
        update = update.to(device)
        changed: dict[str, Tensor] = {}
        if gain is not None:
            bias = self._read(layer, "bias")
            changed[f"{layer}.bias"] = (bias.float() + gain).to(bias.dtype)
        if (spec := self.source.modules.get(layer)) is not None:
            stored = {part: self._read(layer, part).to(device) for part in kind_of(spec.kind).tensors}
            tensors, lost = merge_packed(spec, stored, update)
            return changed | {f"{layer}.{part}": tensor for part, tensor in tensors.items()}, lost
        turned = not isinstance(self.source.model.get_submodule(layer), nn.Linear)  # a Conv1D's weight is (in, out)
        weight = self._read(layer, "weight").to(device)
        weight = weight.T if turned else weight
        result, lost = merge_dense(weight, update, keep_of(weight, f"{layer}.weight" in self.pruned))
        return {**changed, f"{layer}.weight": result.T.contiguous() if turned else result}, lost

    def _read(self, layer: str, part: str) -> Tensor:
        (tensor,) = self.source.read([f"{layer}.{part}"]).values()
        return tensor

    def _sizes(self, name: str, module: nn.Module) -> tuple[int, ...] | None:
        """(out, in) of a linear layer, packed or not; None for another module."""
        if (spec := self.source.modules.get(name)) is not None:
            return spec.shape if len(spec.shape) == 2 else None
        if isinstance(module, nn.Linear):
            return tuple(module.weight.shape)
        weight = module._parameters.get("weight")
        return tuple(weight.shape[::-1]) if weight is not None and type(module).__name__ == "Conv1D" else None

    def _check_owned(self, layer: str, parts: dict[str, tuple[int, ...]]) -> None:
        """Raise PareError for a weight that another layer shares, and for a bias that the layer has not."""
        tied = {*self.source.tied, *self.source.tied.values()}
        if f"{layer}.weight" in tied:
            raise PareError(f"{layer} shares its weight with another layer (tied), which the adapter would change too.")
        if "bias" in parts and f"{layer}.bias" not in self.source.parameters:
            raise PareError(f"the adapter has a bias of {layer}, and {self.source.id} has none there. {OTHER}")
