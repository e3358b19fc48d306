"""Each method against slow loops of its paper's formula, and SparseGPT against exact and brute-force optima."""

import gc
import weakref
from functools import partial
from itertools import combinations, product

import pytest
import torch

from paredown.compress.errors import PareError
from paredown.compress.methods import METHODS, WeightMethod, build
from paredown.compress.numerics.edits import Masked, mask_spec
from paredown.compress.numerics.masks import NofM, keep_mask, parse_sparsity
from paredown.compress.numerics.moments import InputStats, Stats
from paredown.compress.numerics.sweep import adaptive_mask, fixed_mask, sparsegpt_sweep
from paredown.compress.recipe import Recipe

GRAM = frozenset({"gram"})


def problem(out=8, inner=16, tokens=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inner, inner, generator=generator) * torch.linspace(2, 0.2, inner)
    stats = InputStats(inner, GRAM)
    stats.update(torch.randn(tokens, inner, generator=generator) @ mix)
    return torch.randn(out, inner, generator=generator), stats


def loss(weight, edited, hessian):
    change = (weight - edited).double()
    return float(((change @ hessian) * change).sum())


def slow_sparsegpt(weight, factor, sparsity):
    """Algorithm 1 for n:m, element by element in float64."""
    work, factor = weight.double().clone(), factor.double()
    keep = torch.ones_like(work, dtype=torch.bool)
    for j in range(work.shape[1]):
        if j % sparsity.m == 0:
            for row in range(work.shape[0]):
                group = range(j, j + sparsity.m)
                order = sorted(group, key=lambda k: -((work[row, k] / factor[k, k]) ** 2).item())
                for k in order[sparsity.n :]:
                    keep[row, k] = False
        for row in range(work.shape[0]):
            if not keep[row, j]:
                error = work[row, j] / factor[j, j]
                work[row, j:] -= error * factor[j, j:]
                work[row, j] = 0
    return work, keep


def best_for_mask(weight, keep, hessian):
    """Exact least squares per row on a mask."""
    best = torch.zeros_like(weight, dtype=torch.float64)
    for row in range(weight.shape[0]):
        s = keep[row].nonzero().flatten()
        best[row, s] = torch.linalg.solve(hessian[s][:, s], hessian[s] @ weight[row].double())
    return best


def exact_obs(weight, hessian, n):
    """OBC: one weight of a row at a time, with the exact update. Frantar & Alistarh 2022 (arXiv 2208.11580)."""
    edited = weight.double().clone()
    for row in range(weight.shape[0]):
        live = list(range(weight.shape[1]))
        while len(live) > n:
            inverse = torch.linalg.inv(hessian[live][:, live])
            w = edited[row, live]
            p = int((w**2 / inverse.diagonal()).argmin())
            edited[row, live] = w - inverse[:, p] * (w[p] / inverse[p, p])
            edited[row, live[p]] = 0
            del live[p]
    return edited


def test_magnitude_and_wanda_are_their_formulas():
    weight, stats = problem()
    x_norm = stats.rms.float()
    wanda = build("wanda", {"sparsity": "2:4"}).compress(weight, Stats(stats))
    magnitude = build("magnitude", {"sparsity": 0.5}).compress(weight, Stats(stats))
    for row in range(8):
        for first in range(0, 16, 4):
            score = [(abs(weight[row, first + k]) * x_norm[first + k]).item() for k in range(4)]
            kept = {k for k in range(4) if wanda.keep[row, first + k]}
            assert kept == set(sorted(range(4), key=lambda k: -score[k])[:2])
    threshold = weight.abs().flatten().sort().values[63]
    assert torch.equal(magnitude.keep, weight.abs() > threshold)
    assert torch.equal(wanda.weight, torch.where(wanda.keep, weight, 0.0))


@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(1, 4), NofM(4, 8)])
@pytest.mark.parametrize("width", [4, 8, 128])
def test_sparsegpt_is_the_slow_algorithm_whatever_the_block(pattern, width):
    weight, stats = problem()
    if width % pattern.m:
        pytest.skip("a block holds whole groups")
    inverse = stats.inverse_cholesky(0.01)
    wanted, mask = slow_sparsegpt(weight, inverse.factor, pattern)
    found, keep = sparsegpt_sweep(weight, inverse, adaptive_mask(pattern, weight, lambda: inverse), width)
    assert torch.equal(keep, mask)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_losses_stand_in_their_order(seed):
    weight, stats = problem(3, 8, seed=seed)
    inverse = stats.inverse_cholesky(1e-4)
    hessian = stats.gram + 1e-4 * stats.gram.diagonal().mean() * torch.eye(8)
    groups = list(combinations(range(4), 2))
    brute = 0.0
    for row in weight:
        options = []
        for a, b in product(groups, groups):
            keep = torch.zeros(1, 8, dtype=torch.bool)
            keep[0, [*a, *(4 + k for k in b)]] = True
            options.append(loss(row[None], best_for_mask(row[None], keep, hessian), hessian))
        brute += min(options)
    swept, mask = sparsegpt_sweep(weight, inverse, adaptive_mask(NofM(2, 4), weight, lambda: inverse))
    optimal = loss(weight, best_for_mask(weight, mask, hessian), hessian)
    repaired, untouched = loss(weight, swept, hessian), loss(weight, weight * mask, hessian)
    assert brute <= optimal * (1 + 1e-6) <= repaired * (1 + 1e-4) <= untouched * (1 + 1e-4)


def test_exact_obs_is_no_worse_than_sparsegpt_without_a_pattern():
    ratios = []
    for seed in range(8):
        weight, stats = problem(4, 12, seed=seed)
        hessian = stats.gram + 1e-4 * stats.gram.diagonal().mean() * torch.eye(12)
        choose = adaptive_mask(0.5, weight, partial(stats.inverse_cholesky, 1e-4))
        found, keep = sparsegpt_sweep(weight, stats.inverse_cholesky(1e-4), choose)
        assert int((~keep).sum()) == 24
        ratios.append(loss(weight, exact_obs(weight, hessian, 6), hessian) / loss(weight, found, hessian))
    assert sorted(ratios)[len(ratios) // 2] < 1


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "masked"])
@pytest.mark.parametrize("sparsity", ["2:4", "1:4", 0.0, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(5, 12), (3, 300)])
def test_counts_are_exact_and_dropped_weights_are_plus_zero(name, sparsity, shape):
    weight, stats = problem(*shape)
    weight = weight.bfloat16()
    edit = build(name, {"sparsity": sparsity}).compress(weight, Stats(stats))
    removed = int((~edit.keep).sum())
    if isinstance(sparsity, str):
        assert edit.keep.view(shape[0], -1, 4).sum(-1).eq(int(sparsity[0])).all()
    elif name in ("wanda", "masked"):
        assert removed == shape[0] * round(sparsity * shape[1])
    else:
        assert removed == round(sparsity * weight.numel())
    assert edit.weight.dtype == torch.bfloat16
    assert not edit.weight[~edit.keep].any() and not torch.signbit(edit.weight[~edit.keep]).any()
    if sparsity == 0:
        assert torch.equal(edit.weight, weight)


def test_odd_widths_are_no_hindrance_without_a_pattern():
    weight, stats = problem(3, 7)
    for name in ("magnitude", "wanda", "sparsegpt", "masked"):
        assert build(name, {"sparsity": 0.5}).compress(weight, Stats(stats)).weight.shape == (3, 7)
    with pytest.raises(PareError, match="divisible by 4"):
        build("sparsegpt", {"sparsity": "2:4"}).compress(weight, Stats(stats))


def test_dead_columns_end_at_zero_and_groups_stay_full():
    weight, _ = problem(4, 8)
    x = torch.randn(100, 8)
    x[:, [0, 1, 2]] = 0
    stats = InputStats(8, GRAM)
    stats.update(x)
    edit = build("sparsegpt", {"sparsity": "2:4"}).compress(weight, Stats(stats))
    assert not edit.weight[:, :3].any() and edit.keep.view(4, 2, 4).sum(-1).eq(2).all()


def test_more_inputs_than_tokens_is_ordinary_input():
    weight, stats = problem(4, 32, tokens=5)
    edit = build("sparsegpt", {"sparsity": "2:4"}).compress(weight, Stats(stats))
    assert torch.isfinite(edit.weight).all() and edit.fallback is None


def test_an_escalated_damping_is_told_on_the_edit():
    weight, _ = problem(4, 4)
    gram = torch.tensor([[1.0, 2.5, 0, 0], [2.5, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    stats = InputStats.from_sums(1, {"gram": gram})
    edit = build("sparsegpt", {"sparsity": "2:4"}).compress(weight, Stats(stats))
    assert edit.fallback == "damping raised from 0.01 to 10" and edit.damping == pytest.approx(10)


def test_mask_and_update_are_separate_choices():
    weight, stats = problem()
    only_mask = build("masked", {"mask": "wanda", "update": "none", "sparsity": "2:4"}).compress(weight, Stats(stats))
    wanda = build("wanda", {"sparsity": "2:4"}).compress(weight, Stats(stats))
    assert torch.equal(only_mask.weight, wanda.weight)
    both = build("masked", {"mask": "wanda", "update": "sparsegpt", "sparsity": "2:4"}).compress(weight, Stats(stats))
    assert torch.equal(both.keep, wanda.keep)
    assert loss(weight, both.weight, stats.gram) < loss(weight, wanda.weight, stats.gram)
    own = build("masked", {"mask": "sparsegpt", "update": "sparsegpt", "sparsity": "2:4"}).compress(
        weight, Stats(stats)
    )
    assert torch.equal(own.weight, build("sparsegpt", {"sparsity": "2:4"}).compress(weight, Stats(stats)).weight)
    everything, keep = sparsegpt_sweep(
        weight, stats.inverse_cholesky(), fixed_mask(torch.ones_like(weight, dtype=bool))
    )
    assert torch.equal(everything, weight) and keep.all()


@pytest.mark.parametrize("sparsity", ["2:4", "1:4", "5:12", 0.37, 0.8])
@pytest.mark.parametrize("shape", [(6, 24), (3, 300)])
def test_the_whole_mask_of_sparsegpt_is_the_mask_of_its_own_sweep(shape, sparsity):
    weight, stats = problem(*shape, tokens=600)
    swept = build("sparsegpt", {"sparsity": sparsity}).compress(weight, Stats(stats))
    alone = build("masked", {"mask": "sparsegpt", "update": "none", "sparsity": sparsity}).compress(
        weight, Stats(stats)
    )
    assert torch.equal(alone.keep, swept.keep) and torch.equal(alone.weight, torch.where(swept.keep, weight, 0.0))
    mask, _ = build("sparsegpt", {}).pair()
    choose = mask.choose(weight, Stats(stats), parse_sparsity(sparsity))
    assert torch.equal(choose.whole(), swept.keep) and torch.equal(choose.whole(), swept.keep)


def test_a_damping_that_the_mask_alone_had_to_raise_is_in_the_report_too():
    weight, stats = problem(4, 8, tokens=3)
    options = {"mask": "sparsegpt", "update": "none", "damping": 0.0}
    edit = build("masked", options).compress(weight, Stats(stats))
    assert edit.damping > 0 and edit.fallback == f"damping raised from 0 to {edit.damping:g}"
    edit = build("masked", {**options, "damping": 0.01}).compress(weight, Stats(stats))
    assert edit.damping == 0.01 and edit.fallback is None


def test_relative_error_is_the_share_of_output_energy_that_is_wrong():
    weight, stats = problem()
    edit = build("wanda", {"sparsity": "2:4"}).compress(weight, Stats(stats))
    wanted = loss(weight, edit.weight, stats.gram) / loss(weight, torch.zeros_like(weight), stats.gram)
    assert edit.relative_error(weight, stats) == pytest.approx(wanted, rel=1e-4)


def test_storage_is_the_smallest_that_is_exact():
    keep = keep_mask(torch.rand(4, 8), NofM(2, 4))
    assert Masked(torch.rand(4, 8).bfloat16() * keep, keep, NofM(2, 4)).spec().kind == "sparse24"
    assert mask_spec((4, 8), 24, 0.25, 2).kind == "bitmap" and mask_spec((4, 8), 32, 0.0, 2).kind == "dense"
    assert mask_spec((4, 8), 31, 0.03, 2).kind == "dense"


def test_registry_names_every_fault_at_once():
    assert set(METHODS.classes()) >= {"magnitude", "wanda", "sparsegpt", "masked"}
    with pytest.raises(PareError, match="Did you mean 'sparsegpt'"):
        build("sparsgpt", {})
    with pytest.raises(PareError, match=r"(?s)no option 'dampin'. Did you mean 'damping'.*sparsity.*Quote it"):
        build("sparsegpt", {"dampin": 1, "sparsity": 124})
    with pytest.raises(PareError, match="mask"):
        build("masked", {"mask": "random"})


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparsity_zero_returns_the_weight_bit_for_bit(name, dtype):
    weight, stats = problem()
    weight = weight.to(dtype)
    weight[0, 0], weight[1, 1] = -0.0, torch.finfo(dtype).tiny / 2  # signs of zero and subnormals too
    edit = build(name, {"sparsity": 0}).compress(weight, Stats(stats))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(edit.weight.view(bits), weight.view(bits)) and edit.keep.all() and edit.numbers == weight.numel()


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "masked"])
@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
def test_an_edit_does_not_depend_on_how_the_tokens_were_batched(name, sparsity):
    weight, _ = problem(6, 12)
    x = torch.randint(-8, 9, (120, 12), generator=torch.Generator().manual_seed(1)).float()  # sums of these are exact
    edits = []
    for size in (120, 7, 1):
        stats = InputStats(12, GRAM)
        for batch in x.split(size):
            stats.update(batch)
        edits.append(build(name, {"sparsity": sparsity}).compress(weight, Stats(stats)))
    assert all(torch.equal(e.weight, edits[0].weight) and torch.equal(e.keep, edits[0].keep) for e in edits)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "masked"])
def test_compress_is_a_pure_function(name):
    weight, stats = problem()
    copy, method = weight.clone(), build(name, {"sparsity": "2:4"})
    first, second = method.compress(weight, Stats(stats)), method.compress(weight, Stats(stats))
    assert torch.equal(weight, copy) and torch.equal(first.weight, second.weight)
    if name in ("magnitude", "wanda"):  # these move no weight: what stays is bit-equal
        assert torch.equal(first.weight[first.keep], weight[first.keep])


def test_wanda_compares_within_rows_and_magnitude_within_the_layer():
    weight, stats = problem()
    weight[0] *= 100
    wanda = build("wanda", {"sparsity": 0.5}).compress(weight, Stats(stats))
    magnitude = build("magnitude", {"sparsity": 0.5}).compress(weight, Stats(stats))
    assert wanda.keep.sum(1).eq(8).all() and magnitude.keep[0].all()
    norm = stats.gram.diagonal().sqrt()
    for row in range(8):
        score = (weight[row].double().abs() * norm).tolist()
        assert set(wanda.keep[row].nonzero().flatten().tolist()) == set(sorted(range(16), key=score.__getitem__)[8:])


def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude_on_most_problems():
    losses = {"sparsegpt": [], "masked": [], "wanda": [], "magnitude": []}
    for seed in range(12):
        weight, stats = problem(16, 32, seed=seed)
        for name, found in losses.items():
            found.append(
                loss(weight, build(name, {"sparsity": "2:4"}).compress(weight, Stats(stats)).weight.float(), stats.gram)
            )
    means = {name: sum(found) / len(found) for name, found in losses.items()}
    assert means["sparsegpt"] < means["masked"] < means["wanda"] < means["magnitude"]


def test_a_method_in_a_new_file_is_found_without_touching_another(tmp_path):
    (tmp_path / "firstcolumns.py").write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from paredown.compress.numerics.edits import Masked\n"
        "from paredown.compress.methods import WeightMethod, register\n"
        "from paredown.compress.numerics.masks import Sparsity\n"
        "@register('first_columns')\n"
        "@dataclass(frozen=True)\n"
        "class FirstColumns(WeightMethod):\n"
        "    sparsity: Sparsity = 0.5\n"
        "    def compress(self, weight, stats):\n"
        "        keep = torch.zeros_like(weight, dtype=torch.bool)\n"
        "        keep[:, : round((1 - self.sparsity) * weight.shape[1])] = True\n"
        "        return Masked(weight * keep, keep, self.sparsity)\n"
    )
    plugins = [str(tmp_path / "firstcolumns.py")]
    recipe = Recipe.parse({"method": "first_columns", "options": {"sparsity": 0.75}, "plugins": plugins})
    assert "first_columns" in METHODS.classes()
    stats = Stats(InputStats.uniform(8, frozenset()))
    assert recipe.build().compress(torch.ones(2, 8), stats).keep.sum().item() == 4
    with pytest.raises(PareError, match="Did you mean 'first_columns'"):
        build("first_column", {})
    assert set(METHODS.classes()) - {"first_columns"} >= {"magnitude", "wanda", "sparsegpt", "masked"}


@pytest.mark.parametrize("damping", [-0.5, float("nan"), float("inf"), "much"])
@pytest.mark.parametrize("name", ["sparsegpt", "masked"])
def test_a_damping_that_makes_no_sense_is_refused_before_any_model_is_read(name, damping):
    with pytest.raises(PareError, match=f"{name}.damping"):
        build(name, {"damping": damping})


def test_options_that_are_no_words_are_faults_too():
    with pytest.raises(PareError, match="wanda has no option 3"):
        build("wanda", {3: 1})


@pytest.mark.parametrize("pattern", ["2:3", "1:6", "5:12", "64:192"])
def test_sparsegpt_takes_groups_that_do_not_divide_its_blocks(pattern):
    weight, stats = problem(3, 192)
    n, m = map(int, pattern.split(":"))
    for options in (
        {"method": "sparsegpt"},
        {"method": "masked", "mask": "wanda"},
        {"method": "masked", "mask": "sparsegpt"},
    ):
        edit = build(options.pop("method"), {"sparsity": pattern, **options}).compress(weight, Stats(stats))
        assert edit.keep.view(3, -1, m).sum(-1).eq(n).all()
    wanted, mask = slow_sparsegpt(weight, stats.inverse_cholesky(0.01).factor, NofM(n, m))
    found = build("sparsegpt", {"sparsity": pattern}).compress(weight, Stats(stats))
    assert torch.equal(found.keep, mask)
    torch.testing.assert_close(found.weight.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sparsegpt", "masked"])
def test_an_update_that_leaves_the_range_of_the_dtype_is_refused(name):
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0, 1.0, 3.0])
    stats = InputStats(4, GRAM)
    stats.update(x)  # all inputs alike: what the pruned columns did falls to the others
    weight = torch.tensor([[60000.0, 60000.0, 60000.0, 60000.0]]).half()
    with pytest.raises(PareError, match="float16 cannot hold"):
        build(name, {"sparsity": "2:4"}).compress(weight, Stats(stats))


def test_a_mask_without_an_update_needs_no_factor():
    weight, _ = problem()
    unfactorable = torch.full((16, 16), float("nan"), dtype=torch.float64).fill_diagonal_(1.0)
    stats = InputStats.from_sums(1, {"gram": unfactorable})
    for mask in ("wanda", "magnitude"):
        edit = build("masked", {"mask": mask, "update": "none"}).compress(weight, Stats(stats))
        assert edit.damping is None and torch.equal(edit.weight[edit.keep], weight[edit.keep])


OF_WEIGHTS = [
    name
    for name, cls in METHODS.classes().items()
    if cls.__module__.startswith("paredown.") and issubclass(cls, WeightMethod)
]


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_a_weight_and_its_moments_are_freed_as_soon_as_it_is_compressed(name, lowrank_problem):
    problem, method = lowrank_problem(), build(name, {})
    weight, stats = problem.weight.clone(), problem.stats(method)
    held = [weakref.ref(weight), weakref.ref(stats.inputs)]
    gc.disable()  # moments are large: they must not wait for the search for circles of references
    try:
        method.compress(weight, stats)
        del weight, stats
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()
