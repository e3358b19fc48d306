"""Recipes of low rank that are refused: with which words, and that nothing is left behind."""

import json

import pytest

from paredown.compress.errors import PareError
from paredown.compress.run.compress import compress

SMALL = ("calibration.sequences=2", "calibration.length=16", "evaluate.length=16", "evaluate.windows=4")


@pytest.fixture
def refused(tiny_model, text_file, tmp_path):
    """See that a recipe is refused with some words, and that nothing is left behind."""

    def run(said, recipe, **options):
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(recipe))  # which is YAML too
        with pytest.raises(PareError, match=said):
            compress(
                tiny_model, str(path), tmp_path / "out", overrides=SMALL, calibration=str(text_file),
                eval_text=[str(text_file)], **options,
            )  # fmt: skip
        assert not list(tmp_path.glob("out*"))

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 4, "kept": 0.5}, "kept and rank say how much is kept in different ways: give one of them"),
        ({"energy": 0.9, "target_parameters": 9}, "energy and target_parameters say how much"),
        ({"storage": "zip"}, r"svd_llm.storage: 'zip': .*'factors' or 'pifa'"),
        ({"kpt": 0.5}, "no option 'kpt'. Did you mean 'kept'"),
        ({"kept": 0}, r"svd_llm.kept: 0: .*greater than 0"),
        ({"kept": -0.5}, r"svd_llm.kept: -0.5: .*greater than 0"),
        ({"kept": 1}, r"svd_llm.kept: 1: .*less than 1"),
        ({"kept": 80}, r"svd_llm.kept: 80: .*less than 1"),
        ({"kept": "most"}, r"svd_llm.kept: 'most': .*number"),
        ({"rank": 0}, r"svd_llm.rank: 0: .*greater than or equal to 1"),
        ({"rank": 2.5}, r"svd_llm.rank: 2.5: .*integer"),
        ({"energy": 1.0}, r"svd_llm.energy: 1.0: .*less than 1"),
        ({"kept": 0.001}, r"q_proj: .*not even rank 1 fits into 0.001 of it"),
        ({"target_parameters": 10}, "target_parameters 10 cannot be met"),
    ],
)
def test_options_that_ask_for_nothing_sensible(options, said, refused):
    refused(said, {"method": "svd_llm", "options": options})


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"method": "svd_llm", "allocation": {"strategy": "gloabl"}}, "unknown allocation 'gloabl'. Did you mean 'global'"),
        ({"method": "svd_llm", "allocation": {"stratgy": "global"}}, "allocation.strategy: this key is required"),
        ({"method": "svd_llm", "allocation": "global"}, "allocation: .*found 'global'"),
        ({"method": "lorap", "allocation": {"strategy": "per_type", "weights": {"v_proj": 0}}}, "v_proj: .*greater than 0"),
        ({"method": "wanda", "options": {"sparsity": "2:4"}, "allocation": {"strategy": "global"}}, "the same in every layer"),
        ({"method": "sparse_low_rank", "allocation": {"strategy": "global"}}, "offers no choices"),
        ({"method": "svd_llm", "options": {"rank": 4}, "allocation": {"strategy": "global"}}, "global spends one budget"),
        ({"method": "svd_llm", "options": {"kept": 0.01}, "allocation": {"strategy": "global"}}, "rank 1 in every layer|rank 1 fits"),
        ({"method": "svd_llm", "reconstruct": {"steps": 0}}, "reconstruct.steps: .*found 0"),
        ({"method": "svd_llm", "reconstruct": {"lr": 0}}, "reconstruct.lr: .*found 0"),
        ({"method": "svd_llm", "reconstruct": {"batch": 0}}, "reconstruct.batch: .*found 0"),
        ({"method": "svd_llm", "reconstruct": {"step": 5}}, "reconstruct.step: .*Did you mean 'steps'"),
        ({"method": "cur"}, "no other: --set blocks=null"),
        ({"method": "cur", "options": {"blocks": None, "storage": "pifa"}}, "cur has a storage of its own"),
        ({"method": "cur", "options": {"blocks": None, "energy": 0.9}}, "cur has .* no energy curve"),
        ({"method": "cur", "options": {"link": "grm"}}, r"cur.link: 'grm': .*'gram' or 'plain'"),
        ({"method": "laser", "options": {"last": 0}}, r"laser.last: 0: .*greater than 0"),
        ({"method": "sparse_low_rank", "options": {"rounds": 0}}, r"sparse_low_rank.rounds: 0: .*greater than or equal to 1"),
        ({"method": "sparse_low_rank", "options": {"sparsity": "2:5"}}, "q_proj: .*divisible by 5"),
    ],
)  # fmt: skip
def test_recipes_whose_parts_do_not_go_together(recipe, said, refused):
    refused(f"(?s){said}", recipe)


def test_every_fault_of_a_low_rank_recipe_is_listed_at_once(refused):
    recipe = {
        "method": "paredown_lowrank", "options": {"kept": 2, "storage": "zip"}, "allocation": {"strategy": "best"},
        "reconstruct": {"steps": 0},
    }  # fmt: skip
    refused("(?s)reconstruct.steps.*paredown_lowrank.*paredown_lowrank.*allocation 'best'", recipe)


def test_dense_checkpoints_of_what_only_a_packed_one_can_hold(refused):
    refused("affine form needs one.*--format packed, or --set affine=false", {"method": "rom"}, format="dense")
    recipe = {"method": "svd_llm", "reconstruct": {"steps": 1}}
    refused("reconstruction tunes factors.*write --format packed", recipe, format="dense")
