"""The rows of a quality table: which recipes stand side by side, and how a person names them.

    2:4  4:8  50  60  70       the pruners at this sparsity: a pattern, or the percentage removed
    pruning                    the same at all five
    structured                 methods that leave an ordinary smaller model; structured@0.8: at one share kept
    lowrank  ablations         low-rank methods, and what each part of ours is worth; lowrank@0.6: at one share kept
    NAME@AMOUNT                one row of these, or any method: wanda@2:4, sparsegpt@60, svd_llm@0.8
    RECIPE                     a shipped recipe, or a YAML file
    LABEL=ROW,key=value,...    one row under a label of yours, with settings of its recipe: ridge=alps@2:4,damping=0.1

Several are separated by spaces; those without `=` by commas too.
"""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.methods import METHODS
from paredown.compress.numerics.masks import parse_sparsity
from paredown.compress.recipe import Recipe, shipped_recipes
from paredown.compress.registry import option_fields

Raw = dict[str, Any]

PATTERNS, FRACTIONS = ("2:4", "4:8"), ("50", "60", "70")
# label -> method and further keys of the recipe. A shipped recipe, called by the label, is taken where there is one.
PRUNERS: dict[str, Raw] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "ria": {"method": "ria"},
    "dsnot": {"method": "dsnot"},
    "sparsegpt": {"method": "sparsegpt"},
    "alps": {"method": "alps"},
    "owl-wanda": {"method": "owl_wanda", "allocation": {"strategy": "owl"}},
    "alpha-sparsegpt": {"method": "alpha_sparsegpt", "allocation": {"strategy": "alpha_pruning"}},
    "paredown-prune": {"method": "paredown_prune"},
    "paredown-prune-tuned": {"method": "paredown_prune", "reconstruct": {}},
}
OF_FRACTIONS = ("owl-wanda", "alpha-sparsegpt")  # a pattern leaves them nothing to share out
OURS: Raw = {"method": "paredown_lowrank"}
TO_THE_LAST: Raw = {"options": {"rank_multiple": 1}}  # ranks of papers, which keep the whole share
LOWRANK: dict[str, Raw] = {
    "SVD": {"method": "svd", **TO_THE_LAST},
    "FWSVD": {"method": "fwsvd", **TO_THE_LAST},
    "ASVD": {"method": "asvd", **TO_THE_LAST},
    "ASVD by sensitivity": {"method": "asvd", "allocation": {"strategy": "sensitivity"}, **TO_THE_LAST},
    "LoRAP (AWSVD)": {"method": "lorap", **TO_THE_LAST},
    "LLM-ROM (affine)": {"method": "rom", **TO_THE_LAST},
    "SVD-LLM": {"method": "svd_llm", **TO_THE_LAST},
    "SVD-LLM by theoretical loss": {
        "method": "svd_llm",
        "allocation": {"strategy": "theoretical_loss"},
        **TO_THE_LAST,
    },
    "two-sided Fisher": {"method": "fisher_svd", **TO_THE_LAST},
    "two-sided Fisher (global)": {"method": "fisher_svd", "allocation": {"strategy": "global"}, **TO_THE_LAST},
    "ours": OURS,
    "ours with blocks reconstructed": {**OURS, "reconstruct": {}},
}
ABLATIONS: dict[str, Raw] = {
    "SVD-LLM": {"method": "svd_llm", **TO_THE_LAST},
    "SVD-LLM + affine": {"method": "rom", **TO_THE_LAST},
    "SVD-LLM + PIFA": {"method": "svd_llm", "options": {"storage": "pifa", "rank_multiple": 1}},
    "SVD-LLM + regression": {
        "method": "paredown_lowrank",
        "options": {"two_sided": False, "storage": "factors", "rank_multiple": 1},
        "allocation": {"strategy": "uniform"},
    },
    "SVD-LLM + global": {"method": "svd_llm", "allocation": {"strategy": "global"}, **TO_THE_LAST},
    "ours": OURS,
    "ours hardly damped": {**OURS, "options": {"damping": 0.01, "output_damping": 0.001}},
    "ours without two-sided": {**OURS, "options": {"two_sided": False}},
    "ours with biases": {**OURS, "options": {"affine": True}},
    "ours without regression": {**OURS, "options": {"regression": False}},
    "ours without PIFA": {**OURS, "options": {"storage": "factors"}},
    "ours without global allocation": {**OURS, "allocation": {"strategy": "uniform"}, **TO_THE_LAST},
}
STRUCTURED: dict[str, Raw] = {
    "tail": {"method": "tail"},
    "ShortGPT": {"method": "shortgpt"},
    "angular": {"method": "angular"},
    "greedy depth": {"method": "greedy_depth"},
    "our depth": {"method": "paredown_depth"},
    "Wanda-sp": {"method": "wanda_sp"},
    "Minitron": {"method": "minitron"},
    "FLAP": {"method": "flap"},
    "LLM-Pruner (Taylor)": {"method": "taylor"},
    "Minitron + least squares": {"method": "minitron", "options": {"refit": True}},
    "our width": {"method": "paredown_width"},
}
# set -> its rows, and the amounts at which they stand in it
SETS: dict[str, tuple[dict[str, Raw], tuple[str, ...]]] = {
    "pruning": (PRUNERS, (*PATTERNS, *FRACTIONS)),
    "structured": (STRUCTURED, ("0.9", "0.8", "0.7")),
    "lowrank": (LOWRANK, ("0.9", "0.8", "0.6", "0.4")),
    "ablations": (ABLATIONS, ("0.8", "0.6")),
}


@dataclass(frozen=True)
class Row:
    """One line of a table. `group` says with which others it is compared: those of the same sparsity or share kept."""

    label: str
    recipe: Recipe
    calibration: tuple[str, ...] = ()  # settings of the calibration that are the row's own, whatever the command says

    @property
    def group(self) -> str:
        options = self.recipe.options
        if "sparsity" in options:
            return _shown(parse_sparsity(options["sparsity"]))
        return f"kept {options['kept']}" if "kept" in options else "other"


def rows_named(items: Sequence[str], overrides: Sequence[str] = ()) -> tuple[list[Row], list[str]]:
    """The rows that `items` name (see above), and the labels of those of a set that this version has no method for.

    `overrides`, `key=value`, change the recipe of every row. Raises PareError for a name that means nothing, with those
    that do, and for two rows of one label.
    """
    rows: list[Row] = []
    missing: list[str] = []
    for item in _split(items):
        members, amounts = _members(item)
        for amount in amounts:
            for label, raw in members.items():
                if raw["method"] not in METHODS.classes():
                    missing.append(f"{label}@{amount}")
                elif not (label in OF_FRACTIONS and ":" in amount):
                    rows.append(_of_set(label, raw, amount, overrides))
        if not members:
            rows.append(_single(item, overrides))
    labels = [row.label for row in rows]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise PareError(f"more than one row is called {', '.join(sorted(twice))}. Name one as LABEL=ROW.")
    if not rows:
        raise PareError(f"this version has no method for {', '.join(missing)}. {_known()}")
    return rows, missing


def _split(items: Sequence[str]) -> list[str]:
    """Each row or set by itself."""
    parts = ([item] if "=" in item or Path(item).exists() else item.split(",") for item in items)
    return [part.strip() for group in parts for part in group if part.strip()]


def _members(item: str) -> tuple[Mapping[str, Raw], Sequence[str]]:
    """The rows of the set that an item names, and the amounts; no rows if it names none."""
    if item in (*PATTERNS, *FRACTIONS):
        return PRUNERS, (item,)
    name, _, amount = item.partition("@")
    if name not in SETS:
        return {}, ()
    members, amounts = SETS[name]
    return members, ((amount,) if amount else amounts)


def _single(item: str, overrides: Sequence[str]) -> Row:
    label, equals, rest = item.partition("=")
    if not equals:
        label, rest = item, item
    base, *own = re.split(r",(?=[A-Za-z_][\w.]*=)", rest)
    changes = [*overrides, *own]
    name, at, amount = base.partition("@")
    if at and amount and not Path(base).exists():
        row = _of_set(name, _row_or_method(name), amount, changes)
        return replace(row, label=label) if equals else row
    try:
        return _row(label, Recipe.load(base, changes), changes)
    except PareError as fault:
        if str(fault).startswith("no recipe is called"):
            raise PareError(f"no row is called {base!r}. {_known(base)}") from fault
        raise


def _row(label: str, recipe: Recipe, overrides: Sequence[str]) -> Row:
    if scored := [change for change in overrides if change.startswith("evaluate")]:
        raise PareError(f"{scored[0]}: what scores is the same for all rows: --text, --eval-length and --windows.")
    return Row(label, recipe, tuple(change for change in overrides if change.startswith("calibration.")))


def _row_or_method(name: str) -> Raw:
    """The row of a set that is called so, or the method."""
    for members, _ in SETS.values():
        if name in members:
            return members[name]
    if name in METHODS.classes():
        return {"method": name}
    raise PareError(f"no row is called {name!r}. {_known(name)}")


def _of_set(label: str, raw: Raw, amount: str, overrides: Sequence[str]) -> Row:
    """A row at an amount: a sparsity for a pruner, else the share kept."""
    name = f"{label}-{amount.replace(':', 'of')}"
    if name in shipped_recipes():
        return _row(f"{label} {_shown(_amount(amount))}", Recipe.load(name, overrides), overrides)
    raw = deepcopy(raw)
    options = option_fields(METHODS.get(raw["method"]))
    value = _amount(amount)
    key = "sparsity" if "sparsity" in options else "kept"
    raw["options"] = {**raw.get("options", {}), key: value}
    shown = _shown(value) if key == "sparsity" else f"kept {value}"
    return _row(f"{label} {shown}", Recipe.parse(raw, f"{label}@{amount}", overrides), overrides)


def _amount(text: str) -> str | float:
    """A pattern as it is; a number from 1 on is a percentage."""
    if ":" in text:
        return text
    try:
        number = float(text)
    except ValueError:
        raise PareError(f"{text!r} is no amount. Name a pattern (2:4), a percentage (60), or a share (0.6).") from None
    return number / 100 if number >= 1 else number


def _shown(sparsity: object) -> str:
    return f"{sparsity:.0%}" if isinstance(sparsity, float) else str(sparsity)


def _known(name: str = "") -> str:
    """What may be named."""
    rows = [label for members, _ in SETS.values() for label in members]
    recipes, methods = list(shipped_recipes()), list(METHODS.classes())
    lists = {
        "Sets": [*PATTERNS, *FRACTIONS, *SETS],
        "Rows and methods, as NAME@AMOUNT": [*rows, *methods],
        "Recipes": recipes,
    }
    told = (f"{what}: {', '.join(dict.fromkeys(names))}." for what, names in lists.items())
    return " ".join([did_you_mean(name, [*SETS, *rows, *recipes, *methods]).strip(), *told]).strip()
