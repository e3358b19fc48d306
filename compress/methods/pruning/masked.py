"""Any mask with any update of the weights that stay; the methods of the papers are named pairs of them.

`{mask: wanda, update: sparsegpt}` prunes by Wanda and updates by SparseGPT's sweep (arXiv 2306.11695, section 5).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from paredown.compress.errors import PareError
from paredown.compress.methods.base import register
from paredown.compress.methods.pruning.aim import Aimed
from paredown.compress.methods.pruning.base import MASKS, UPDATES, Mask, Update
from paredown.compress.registry import OwnOptions, Registry, option_fields, parse_options, unknown_options


@register("masked")
@dataclass(frozen=True)
class MaskAndUpdate(Aimed, OwnOptions):
    """Its options are those of `Aimed`, those below, and those of both parts, such as `damping` of SparseGPT's."""

    mask: str = "wanda"
    update: str = "sparsegpt"
    further: Mapping[str, Any] = field(default_factory=dict)  # options of the mask and the update

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, Any]) -> Self:
        """Raises PareError listing every fault at once."""
        own = {key: option for key, option in option_fields(cls).items() if key != "further"}
        faults: list[str] = []
        values = parse_options(name, options, own, faults)
        known, parts_exist = dict(own), True
        for registry, part in ((MASKS, values.get("mask", cls.mask)), (UPDATES, values.get("update", cls.update))):
            try:
                of_part = option_fields(registry.get(part))
            except PareError as fault:
                faults.append(f"{name}.{registry.what}: {fault}")
                parts_exist = False
                continue
            parse_options(name, options, of_part, faults)
            known |= of_part
        if parts_exist:  # else an option may be one of the part whose name is misspelt
            faults = unknown_options(name, options, known) + faults
        if faults:
            raise PareError("\n".join(dict.fromkeys(faults)))
        return cls(**values, further={key: value for key, value in options.items() if key not in own})

    def pair(self) -> tuple[Mask, Update]:
        mask = MASKS.build(self.mask, self._of(MASKS, self.mask))
        return mask, UPDATES.build(self.update, self._of(UPDATES, self.update))

    def _of(self, registry: Registry[Any], name: str) -> dict[str, Any]:
        """The further options that this mask or update has."""
        return {key: self.further[key] for key in option_fields(registry.get(name)) if key in self.further}
