"""Methods, masks, updates and allocations from outside the package: one file each, and nothing else changes."""

import json
import os
import subprocess
import sys
from textwrap import dedent

import pytest
import torch
import yaml
from safetensors.torch import load_file

from paredown.compress import PareError, Recipe, compress
from paredown.compress.methods import METHODS

HEAD = """
    from dataclasses import dataclass

    import torch

    from paredown.compress.allocation.base import ALLOCATIONS, Allocation, option_for
    from paredown.compress.allocation.by_score import ByScore
    from paredown.compress.allocation.shares import capped
    from paredown.compress.methods import MASKS, UPDATES, Pruner, WeightMethod, register
    from paredown.compress.methods.lowrank.base import Factorized
    from paredown.compress.methods.pruning.base import NoUpdate
    from paredown.compress.numerics.edits import Masked
    from paredown.compress.numerics.masks import keep_mask, masked
    from paredown.compress.numerics.metric import Metric
    from paredown.compress.numerics.moments import Need
    from paredown.compress.numerics.sweep import fixed_mask
"""
PLUGINS = {
    "a mask with an option of its own": (
        """
        @MASKS.register("outside_stripes")
        @dataclass(frozen=True)
        class Stripes:
            offset: int = 0

            needs = frozenset()

            def choose(self, weight, stats, sparsity):
                columns = (torch.arange(weight.shape[1]) + self.offset) % 4
                return fixed_mask(keep_mask((columns < 2).float().expand(weight.shape), sparsity))
        """,
        {"method": "masked", "options": {"mask": "outside_stripes", "update": "none", "sparsity": "2:4", "offset": 2}},
    ),
    "a pruner with an option of its own, no sparsity and no needs": (
        """
        @register("outside_columns")
        @dataclass(frozen=True)
        class FirstColumns(WeightMethod):
            share: float = 0.5

            def compress(self, weight, stats):
                keep = torch.zeros_like(weight, dtype=torch.bool)
                keep[:, : round(self.share * weight.shape[1])] = True
                return Masked(masked(weight, keep), keep, 1 - self.share)
        """,
        {"method": "outside_columns", "options": {"share": 0.25}},
    ),
    "a low-rank method": (
        """
        @register("outside_svd")
        @dataclass(frozen=True)
        class InverseSVD(Factorized):
            needs = frozenset({Need.SECOND_MOMENT})

            def metric(self, stats):
                return Metric(input=1 / stats.inputs.second_moment_diagonal.clamp_min(1e-6))
        """,
        {"method": "outside_svd", "options": {"kept": 0.6}, "allocation": {"strategy": "global"}},
    ),
    "an update": (
        """
        @UPDATES.register("outside_rescale")
        @dataclass(frozen=True)
        class Rescale:
            strength: float = 1.0

            needs = frozenset()

            def apply(self, weight, choose, stats, sparsity):
                keep = choose.whole()
                pruned = masked(weight, keep)
                norms = weight.float().norm(dim=1) / pruned.float().norm(dim=1).clamp_min(1e-9)
                scaled = pruned.float() * (1 + self.strength * (norms - 1))[:, None]
                return Masked(masked(scaled.to(weight.dtype), keep), keep, sparsity)
        """,
        {"method": "masked", "options": {"mask": "wanda", "update": "outside_rescale", "strength": 0.5}},
    ),
    "an allocation with an option of its own": (
        """
        @ALLOCATIONS.register("outside_downhill")
        @dataclass(frozen=True)
        class Downhill(Allocation):
            step: float = 0.0

            def allocate(self, budget):
                middle = (len(budget.layers) - 1) / 2
                shares = [budget.kept + self.step * (middle - i) for i in range(len(budget.layers))]
                return {l.name: option_for(l, s) for l, s in zip(budget.layers, shares, strict=True)}
        """,
        {"method": "svd", "options": {"kept": 0.6}, "allocation": {"strategy": "outside_downhill", "step": 0.01}},
    ),
    "an allocation of sparsities by a score of each layer": (
        """
        @ALLOCATIONS.register("outside_spikes")
        @dataclass(frozen=True)
        class Spikes(ByScore):
            power: float = 1.0

            needs = frozenset({Need.ABSOLUTE_MEAN})

            def score(self, layers):
                return max(float(stats.inputs.absolute_mean.max()) for _, stats in layers) ** self.power

            def shares(self, scores, budget):
                return capped(budget.layers, scores, budget.numbers)
        """,
        {
            "method": "masked",
            "options": {"mask": "ria", "update": "sparsegpt", "sparsity": 0.6},
            "allocation": {"strategy": "outside_spikes", "per": "layer", "power": 0.5},
        },
    ),
}


def plugin(folder, what):
    path = folder / "plugin.py"
    path.write_text(dedent(HEAD) + dedent(PLUGINS[what][0]))
    return path


@pytest.mark.parametrize("what", PLUGINS)
def test_what_is_defined_outside_the_package_runs_from_a_recipe(what, tiny_model, text_file, tmp_path, verified_here):
    path = plugin(tmp_path, what)
    text = {"calibration": {"source": str(text_file), "sequences": 4, "length": 32}}
    text |= {"evaluate": {"perplexity": [str(text_file)], "length": 32, "windows": 2}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**PLUGINS[what][1], **text, "plugins": [path.name]}))
    report = compress(tiny_model, str(recipe), tmp_path / "out")
    some_stay_dense = what == "a low-rank method"  # its budget is spent where the loss falls most
    assert len(report["layers"]) == 14 or (some_stay_dense and len(report["layers"]) > 7)
    assert all(0 < layer["kept"] < 1 for layer in report["layers"])
    assert report["evaluation"][0]["paired_delta"]["log_ratio"] != 0
    if what == "a mask with an option of its own":
        weight = load_file(tiny_model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        written = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.values"]
        kept = torch.arange(weight.shape[1]) % 4 >= 2  # the option moved the stripes
        assert torch.equal(written, weight[:, kept])
    if what == "an allocation of sparsities by a score of each layer":
        assert len({layer["sparsity"] for layer in report["layers"]}) > 2
    elif what.startswith("an allocation"):
        assert len({layer["rank"] for layer in report["layers"] if layer["name"].endswith("q_proj")}) > 1


def test_the_command_line_takes_plugins_too(tiny_model, tmp_path):
    path = plugin(tmp_path, "a pruner with an option of its own, no sparsity and no needs")
    command = [sys.executable, "-m", "paredown.commands.app", "plan", str(tiny_model), "--json", "--no-probe"]
    command += ["--plugin", str(path)]
    (tmp_path / "recipe.yaml").write_text("method: outside_columns")
    done = subprocess.run([*command, "-r", str(tmp_path / "recipe.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (
        plan["targeted_parameters"] > 0 and plan["at_most"] and not plan["stay_dense"]
    )  # it does not say what it stores


def test_an_installed_package_offers_methods_by_its_entry_points(tmp_path):
    (tmp_path / "offering.py").write_text(dedent(HEAD) + dedent(PLUGINS["a low-rank method"][0]))
    facts = tmp_path / "offering-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: offering\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[paredown.methods]\nmine = offering\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code = "from paredown.compress import Recipe; print(Recipe.parse({'method': 'outside_svd'}).build().kind)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "lowrank", done.stderr
    (tmp_path / "offering.py").write_text("raise RuntimeError('no such GPU')")
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert "the installed plugin 'mine' (offering) cannot be imported" in done.stderr


def test_a_plugin_that_cannot_be_run_is_named(tmp_path):
    with pytest.raises(PareError, match=r"the plugin .*missing\.py does not exist"):
        Recipe.parse({"method": "wanda", "plugins": [str(tmp_path / "missing.py")]})
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(PareError, match=r"broken\.py cannot be run: ModuleNotFoundError"):
        Recipe.parse({"method": "wanda", "plugins": [str(tmp_path / "broken.py")]})
    (tmp_path / "taken.py").write_text(
        dedent(HEAD) + "@register('wanda')\n@dataclass(frozen=True)\nclass Mine(Pruner):\n    pass\n"
    )
    with pytest.raises(PareError, match=r"the method name 'wanda' is taken by .*Wanda"):
        Recipe.parse({"method": "wanda", "plugins": [str(tmp_path / "taken.py")]})


def test_a_plugin_that_is_run_again_takes_its_own_place(tmp_path):
    path = plugin(tmp_path, "a low-rank method")
    path.write_text(path.read_text().replace("outside_svd", "outside_again"))
    Recipe.parse({"method": "outside_again", "plugins": [str(path)]})
    first = METHODS.get("outside_again")
    Recipe.parse({"method": "outside_again", "plugins": [str(path)]})
    assert METHODS.get("outside_again") is not first
