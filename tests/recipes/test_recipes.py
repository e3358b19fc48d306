"""Every shipped recipe: it does what its name says, cites whose work it is, and quotes what YAML would misread."""

import re
from importlib.resources import files

import pytest
import torch
import transformers
import yaml

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.methods import METHODS, BlockMethod, GroupMethod, SublayerMethod
from paredown.compress.numerics.edits import Factored, Masked
from paredown.compress.numerics.masks import NofM
from paredown.compress.numerics.moments import GRADIENT_NEEDS, PAIRED_NEEDS, InputStats, Need, Stats
from paredown.compress.recipe import Recipe, shipped_recipes
from paredown.compress.registry import option_fields
from paredown.compress.survey.gradients import moments

ALL = {f.name.removesuffix(".yaml"): f for f in files("paredown.recipes").iterdir() if f.name.endswith(".yaml")}
RECOVERIES = [name for name in ALL if name.startswith("recover-")]  # of checkpoints that are compressed already
STAGED = [name for name, recipe in shipped_recipes().items() if recipe.stages]
FILES = {name: f for name, f in ALL.items() if name not in [*RECOVERIES, *STAGED]}
PAPERS = {
    "magnitude": ["1506.02626"], "wanda": ["2306.11695"], "sparsegpt": ["2301.00774"], "masked": ["2306.11695"],
    "svd": ["2207.00112"], "fwsvd": ["2207.00112"], "asvd": ["2312.05821"], "awsvd": ["2404.09695"],
    "lorap": ["2404.09695"], "svd_llm": ["2403.07378"], "rom": ["2312.07046"], "fisher_svd": ["1503.05671"],
    "paredown_lowrank": ["1503.05671", "2501.19090"], "cur": ["2501.04211"], "laser": ["2312.13558"],
    "sparse_low_rank": ["2409.13652", "2410.09615"], "ria": [], "alps": ["2406.07831"], "obc": ["2208.11580"],
    "dsnot": ["2310.08915"], "owl_wanda": ["2310.05175"], "alpha_sparsegpt": ["2410.10912"],
    "d_pruner": ["2405.06275"], "paredown_prune": ["2406.07831"],
    "minitron": ["2407.14679"], "flap": ["2312.11983"], "wanda_sp": ["2312.11983"], "taylor": ["2305.11627"],
    "two_ssp_width": ["2501.17771"], "random": [], "fold": ["2502.10216"], "paredown_width": ["1503.05671"],
    "shortgpt": ["2403.03853"], "angular": ["2403.17887"], "tail": ["2403.17887"],
    "lorap_mlp": ["2404.09695"], "laco": ["2402.11187"], "block_pruner": ["2406.10594"], "mamba_shedder": ["2501.17088"], "greedy_depth": ["2402.02834", "2402.09025"], "paredown_depth": ["2402.09025"],
    "reap": ["2510.13999"], "man": ["2510.13999"], "expert_frequency": ["2510.13999"], "aimer": ["2603.18492"],
    "random_experts": [], "magnitude_experts": [], "paredown_experts": ["2510.13999"], "mc_smoe": ["2310.01334"],
}  # fmt: skip
MASKS = {
    "magnitude", "wanda", "sparsegpt", "masked", "ria", "alps", "obc", "dsnot", "d_pruner", "owl_wanda", "alpha_sparsegpt",
    "paredown_prune",
}  # fmt: skip
# names without a number: the options that say how much is kept
UNNUMBERED = {"curing": {"max_rank", "blocks"}, "laser": {"rho", "last"}, "sparse-low-rank": {"sparsity", "rank"}}
KEYS = [
    "name", "description", "citation", "method", "options", "allocation", "reconstruct", "targets", "calibration",
    "evaluate",
]  # fmt: skip
OPTIONAL = {"allocation", "reconstruct", "targets"}
SHAPES = [(48, 64), (64, 48), (40, 40)]


def is_mask(name):
    return shipped_recipes()[name].method in MASKS


def removes_whole(name):
    """Whether units or blocks go, and not single weights."""
    return isinstance(shipped_recipes()[name].build(), GroupMethod | BlockMethod | SublayerMethod)


def named(*groups):
    return pytest.mark.parametrize("name", [name for name in sorted(FILES) if any(group(name) for group in groups)])


every = named(lambda name: True)
weights = named(lambda name: not removes_whole(name))
whole = named(removes_whole)
masks = named(is_mask)
shares = named(lambda name: not (is_mask(name) or removes_whole(name) or name in UNNUMBERED))
shapes = pytest.mark.parametrize("shape", SHAPES)


def promised(name):
    """What a recipe's name promises: n:m, or the fraction removed by a mask, or the fraction kept by factors."""
    if found := re.search(r"-(\d+)of(\d+)$", name):
        return NofM(int(found[1]), int(found[2]))
    return int(re.search(r"-(\d+)$", name)[1]) / 100


def problem(shape):
    """A weight and all the statistics that any method reads, on two streams that differ a little."""
    torch.manual_seed(0)
    out, inner = shape
    weight, x = torch.randn(shape).bfloat16(), torch.randn(400, inner) @ torch.randn(inner, inner)
    inputs, delta = InputStats(inner, PAIRED_NEEDS), torch.randn(400, out)
    inputs.update(x, x + 0.1 * torch.randn_like(x))
    sums = dict(moments(GRADIENT_NEEDS, weight, x, delta, sequences=8))
    return weight, Stats(inputs, {need: total.double() / 400 for need, total in sums.items()})


def stored(edit):
    """Numbers that an edit of factors stores, the bias that it may add among them."""
    added = 0 if edit.shift is None else edit.shape[0]
    return sum(t.numel() for t in edit.tensors().values() if t.is_floating_point()) + added


def numbers(edit, rank):
    """What the same storage takes at another rank."""
    out, inner = edit.shape
    factors = rank * (out + inner - (rank if edit.kind == "pifa" else 0))
    return factors + (0 if edit.shift is None else out)


def test_the_shipped_recipes_are_the_files_of_the_folder():
    assert list(shipped_recipes()) == sorted(ALL) and len(FILES) >= 22


def test_every_method_has_a_recipe():
    ours = {name for name, cls in METHODS.classes().items() if cls.__module__.startswith("paredown.")}
    assert {shipped_recipes()[name].method for name in FILES} == set(PAPERS) == ours


@pytest.mark.parametrize("name", RECOVERIES)
def test_a_recovery_says_its_name_whose_work_it_is_and_every_setting_that_a_reader_may_change(name):
    raw, recipe = yaml.safe_load(ALL[name].read_text()), Recipe.load(name)
    assert list(raw) == ["name", "description", "citation", "recover", "calibration", "evaluate"]
    assert recipe.name == name and "arXiv" in recipe.citation and "paredown recover" in recipe.description
    assert Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert recipe.recover[0].spec.tokens == 400_000 and recipe.calibration.source == "stdlib"


@pytest.mark.parametrize("name", STAGED)
def test_a_recipe_of_stages_says_its_name_and_whose_work_it_is(name):
    raw, recipe = yaml.safe_load(ALL[name].read_text()), Recipe.load(name)
    assert list(raw) == ["name", "description", "citation", "stages", "calibration", "evaluate"]
    assert recipe.name == name and "arXiv" in recipe.citation and recipe.calibration.source == "stdlib"
    assert Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_the_stages_of_lorap_are_the_two_recipes_of_its_halves():
    channels, attention = Recipe.load("lorap-whole-80").each_stage
    halves = Recipe.load("lorap-mlp-80"), Recipe.load("lorap-80")
    assert (channels.build(), attention.build()) == tuple(half.build() for half in halves)
    assert attention.allocation == halves[1].allocation
    assert attention.targets.include == ("q_proj", "k_proj", "v_proj", "o_proj")


def test_the_stages_of_2ssp_share_out_what_goes_as_its_formula_does():
    """Of Llama-2-7B: round(B s^(f / (1.5 a))) attentions of a parameters, and the rest from MLPs of f parameters."""
    channels, attentions = (stage.build() for stage in Recipe.load("two-ssp-80").each_stage)
    f, a = 3 * 4096 * 11008, 4 * 4096**2
    count = round(32 * 0.2 ** (f / (1.5 * a)))
    first = channels.kept * 32 * (f + a)
    assert abs(first - attentions.kept * first - count * a) < a / 4
    assert abs(channels.kept * attentions.kept - 0.8) < 1e-3
    assert (attentions.which, attentions.windows) == ("attention", 1)


@every
def test_a_recipe_says_its_name_what_it_does_and_whose_work_it_is(name):
    recipe = Recipe.load(name)
    assert recipe.name == name and recipe.description
    assert re.findall(r"arXiv (\d{4}\.\d{5})", recipe.citation) == PAPERS[recipe.method]


@masks
def test_a_mask_has_the_sparsity_of_its_name(name):
    assert Recipe.load(name).build().sparsity == promised(name)


@masks
def test_a_mask_removes_what_it_promises(name):
    method, (weight, stats) = Recipe.load(name).build(), problem((24, 40))
    edit, sparsity, inputs = method.compress(weight, stats), promised(name), stats.inputs
    assert isinstance(edit, Masked)
    if isinstance(sparsity, NofM):
        assert edit.keep.view(24, -1, sparsity.m).sum(-1).eq(sparsity.n).all()
    else:
        assert edit.numbers == weight.numel() - round(sparsity * weight.numel())
    assert torch.equal(edit.weight != 0, edit.keep & (edit.weight != 0)) and edit.weight.dtype == weight.dtype
    assert 0 < edit.relative_error(weight, inputs) < 1


@shares
def test_factors_keep_the_share_of_their_name_and_a_rank_more_would_not_fit(name):
    method = Recipe.load(name).build()
    assert method.kept == method.share == promised(name)
    for shape in SHAPES:
        weight, stats = problem(shape)
        edit, room = method.compress(weight, stats), promised(name) * weight.numel()
        assert isinstance(edit, Factored) and (edit.shift is not None or not method.adds_bias)
        # a bias that a method may leave out stands for less than one component
        more = 1 if method.adds_bias or edit.shift is None else 2
        assert stored(edit) == numbers(edit, edit.rank) <= room < numbers(edit, edit.rank + more)
        assert torch.linalg.matrix_rank(edit.dense().double(), rtol=1e-2) == edit.rank
        assert edit.dense().dtype == weight.dtype and 0 < edit.relative_error(weight, stats.inputs) < 1


@shapes
def test_curing_takes_the_largest_rank_that_stores_no_more_than_the_weight(shape):
    method, (weight, stats) = Recipe.load("curing").build(), problem(shape)
    edit, (out, inner) = method.compress(weight, stats), shape
    assert edit.kind == "cur" and stored(edit) == edit.rank * (out + inner + edit.rank) <= out * inner
    assert (edit.rank + 1) * (out + inner + edit.rank + 1) > out * inner
    assert 0 < edit.relative_error(weight, stats.inputs) < 1


def test_curing_caps_the_rank_and_turns_to_ten_blocks_that_turn_least_but_not_the_outer_ones():
    method = Recipe.load("curing").build()
    assert method.planned_rank((4096, 4096)) == 256
    angles = torch.rand(32, generator=torch.Generator().manual_seed(0)).tolist()
    chosen = method.chosen_blocks([0.0, *angles, 0.0])
    assert len(chosen) == 10 and 0 not in chosen and 33 not in chosen
    assert sorted(angles[i - 1] for i in chosen) == sorted(angles)[:10]


@shapes
def test_laser_keeps_a_tenth_of_the_rank_in_the_last_quarter_of_the_blocks(shape):
    method, (weight, stats) = Recipe.load("laser").build(), problem(shape)
    edit = method.compress(weight, stats)
    assert edit.rank == min(shape) // 10 and stored(edit) == edit.rank * sum(shape)
    assert method.chosen_blocks([0.0] * 32) == [*range(24, 32)] and method.chosen_blocks([0.0] * 2) == [1]


@pytest.mark.parametrize("shape", [(96, 128), (128, 96), (112, 112)])
def test_sparse_and_low_rank_stores_two_of_four_and_sixteen_directions(shape):
    method, (weight, stats) = Recipe.load("sparse-low-rank").build(), problem(shape)
    edit, (out, inner) = method.compress(weight, stats), shape
    assert edit.kind == "sparse24_lowrank" and edit.rank == 16
    assert stored(edit) == out * inner // 2 + 16 * (out + inner) < out * inner
    assert 0 < edit.relative_error(weight, stats.inputs) < 1


@every
def test_a_recipe_asks_for_no_statistics_that_do_not_exist(name):
    assert Recipe.load(name).build().needs <= set(Need)


@whole
def test_what_removes_units_or_blocks_keeps_the_share_of_its_name(name):
    assert Recipe.load(name).build().kept == promised(name)


@every
def test_a_recipe_calibrates_and_scores_without_a_network_and_leaves_the_head(name):
    recipe = Recipe.load(name)
    assert recipe.calibration.source == "stdlib" and recipe.evaluate.perplexity == ("stdlib",)
    assert (recipe.calibration.sequences, recipe.calibration.length, recipe.evaluate.length) == (128, 2048, 2048)
    assert "lm_head" in recipe.targets.skip


@every
def test_a_file_writes_out_every_default_it_stands_on(name):
    raw = yaml.safe_load(FILES[name].read_text())
    assert list(raw) == [key for key in KEYS if key not in OPTIONAL or key in raw]
    assert ("targets" in raw) != removes_whole(name)
    assert set(raw["calibration"]) == {"source", "sequences", "length", "seed"}
    assert UNNUMBERED.get(name, {"sparsity"} if is_mask(name) else {"kept"}) <= set(raw["options"])


@weights
def test_ranks_are_spread_as_the_method_does_by_itself_and_the_file_says_so(name):
    """A method whose own way is not uniform writes it out, with its options."""
    recipe = Recipe.load(name)
    method = recipe.build()
    told = recipe.allocation.model_dump() if recipe.allocation else {"strategy": "uniform"}
    assert told == {"strategy": method.strategy or "uniform", **method.spread}


@named(lambda name: "of" in name.rsplit("-", 1)[-1], is_mask, lambda name: name == "sparse-low-rank")
def test_a_pattern_is_quoted_in_the_file(name):
    sparsity = yaml.safe_load(FILES[name].read_text())["options"]["sparsity"]
    assert isinstance(sparsity, float if name.endswith(("-50", "-60", "-70")) else str)


@every
def test_a_recipe_survives_the_way_into_a_report_and_back(name):
    recipe = Recipe.load(name)
    assert Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe == shipped_recipes()[name]


@pytest.fixture(scope="module")
def four_blocks(tmp_path_factory, save_model):
    """A Llama with as many blocks as it takes for every recipe to find some."""
    folder = tmp_path_factory.mktemp("recipes") / "model"
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    save_model(folder, config)
    return folder


def removes_experts(name):
    return getattr(shipped_recipes()[name].build(), "kind", "") == "experts"


@named(removes_experts)
def test_a_recipe_that_removes_experts_leaves_the_share_of_its_name(name, save_model, tmp_path, prune):
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=8,
    )  # fmt: skip
    save_model(tmp_path / "model", config)
    raw = Recipe.load(name).to_dict()
    raw.pop("targets")
    prune(tmp_path / "model", tmp_path / "out", **raw)
    assert ModelSource(tmp_path / "out", "out").config.num_local_experts == promised(name) * 8


@named(lambda name: removes_whole(name) and not removes_experts(name))
def test_a_recipe_that_removes_units_or_blocks_leaves_about_the_share_of_its_name(name, four_blocks, tmp_path, prune):
    raw = Recipe.load(name).to_dict()
    raw.pop("targets")
    heads = raw["options"].get("unit") == "kv_groups"  # of which this small model has two
    if "multiple" in option_fields(METHODS.get(raw["method"])) and not heads:
        raw["options"]["multiple"] = 4  # of this small model's 80 channels
    result, _ = prune(four_blocks, tmp_path / "out", **raw)
    share = promised(name)
    if getattr(METHODS.get(raw["method"]), "of_units", False):  # of the channels alone
        share = 1 - (1 - share) * 4 * 3 * 48 * 80 / result.targeted
    assert abs(result.numbers / result.targeted - share) < (0.1 if heads else 0.06) and not result.fallbacks
    # which only our own type can say
    uneven = raw["options"].get("widths") == "direct" or isinstance(Recipe.load(name).build(), SublayerMethod)
    assert ModelSource(tmp_path / "out", "out").config.model_type == ("paredown_llama" if uneven else "llama")


@weights
def test_a_recipe_runs_stores_fewer_numbers_and_tells_what_it_leaves(name, four_blocks, tmp_path, prune):
    raw = Recipe.load(name).to_dict()
    if name == "sparse-low-rank":
        raw["options"]["rank"] = 2  # of this small model sixteen directions are too many
    if "reconstruct" in raw:
        raw["reconstruct"]["steps"] = 10  # of 150
    result, _ = prune(four_blocks, tmp_path / "out", **raw)
    edited = {layer["name"] for layer in result.layers}
    assert 0 < result.numbers < result.targeted
    if included := set(raw["targets"]["include"]) - {"*"}:
        assert {layer.rpartition(".")[2] for layer in edited} == included
    else:  # all seven linears of four blocks
        left = {said.partition(":")[0] for said in result.fallbacks if "left dense" in said}
        assert len(edited) + len(left) == 4 * 7 and not edited & left
    if not is_mask(name) and name not in UNNUMBERED:
        assert promised(name) - 0.05 < result.numbers / result.targeted <= promised(name)
    remarks = [said for said in result.fallbacks if "left dense" not in said]
    assert len(remarks) == (name == "lorap-80") and all("as LoRAP does" in said for said in remarks)
