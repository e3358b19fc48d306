"""Sparsities under one budget: exact counts on odd shapes, each strategy against a slow loop, the optimum by brute force."""

import math
import random
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
import transformers as t
from oracles import data_of

from paredown.compress.allocation.alpha_pruning import eigenvalues, hill_exponent
from paredown.compress.allocation.base import ALLOCATIONS, Budget, Grain, Layer, Sensitivities
from paredown.compress.allocation.by_score import ByScore
from paredown.compress.allocation.database import Database, least_loss
from paredown.compress.allocation.global_loss import Global, points, steepest
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.methods import Choice, build
from paredown.compress.methods.pruning import paredown_prune
from paredown.compress.methods.pruning.base import MEASURED
from paredown.compress.methods.pruning.curves import between, predicted_loss
from paredown.compress.numerics.moments import InputStats, Need, Stats
from paredown.compress.recipe import Recipe
from paredown.compress.run.plan import make_plan
from paredown.compress.survey.survey import survey

WIDE = [(7, 33), (33, 65), (5, 120)]
SHAPES = [(7, 33), (12, 5), (5, 12), (33, 7), (9, 9), (64, 3), (3, 64)]
OWN = sorted(n for n, cls in ALLOCATIONS.classes().items() if cls.__module__.startswith("paredown."))
LLAMA = t.LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
IDS = torch.randint(3, 64, (6, 12), generator=torch.Generator().manual_seed(0))


def masks(seed, blocks=4, experts=1, shapes=SHAPES):
    """Layers of a pruner, three to a block, with curves that fall at random, and what else an allocation may read."""
    draw, method, layers = random.Random(seed), build("magnitude", {}), []
    for i in range(3 * blocks):
        shape = draw.choice(shapes)
        steep, scale = draw.uniform(1.5, 6), 10 ** draw.uniform(-2, 1)
        choices = [
            replace(c, numbers=c.numbers * experts, loss=scale * (1 - c.numbers / math.prod(shape)) ** steep)
            for c in method.choices(shape)
        ]
        grain = Grain(shape[0] * experts, experts)
        layers.append(Layer(f"layers.{i // 3}.{'qkv'[i % 3]}", math.prod(shape) * experts, choices, i // 3, grain))
    scores = {layer.name: 1.0 + 0.1 * layer.block for layer in layers}
    sensitivities: Sensitivities = {y.name: {s: draw.uniform(2, 3) - s for s in (0.2, 0.4, 0.6, 0.8)} for y in layers}
    return layers, scores, sensitivities


@pytest.mark.parametrize("strategy", OWN)
@pytest.mark.parametrize("sparsity", [0.03, 0.37, 0.5, 0.7, 0.73])
def test_exactly_the_fraction_asked_for_is_removed_of_odd_shapes(strategy, sparsity):
    for seed in range(4):
        layers, scores, sensitivities = masks(seed)
        rows = {layer.name: layer.grain.even for layer in layers}
        options = ALLOCATIONS.build(strategy, {}).allocate(Budget(layers, 1 - sparsity, 4096, sensitivities, scores))
        total = sum(layer.size for layer in layers)
        assert options.keys() == rows.keys()
        assert all(option is None or 0 < option < 1 for option in options.values())
        within_layers = sum(round((options[y.name] or 0) * y.size) for y in layers)
        assert within_layers == round(sparsity * total)
        by_rows = sum(rows[y.name] * round((options[y.name] or 0) * y.size / rows[y.name]) for y in layers)
        assert abs(by_rows - sparsity * total) <= max(rows.values()) / 2 + 1


def test_experts_keep_equally_many_each_and_the_budget_to_less_than_one_each():
    layers, scores, _ = masks(0, experts=6)
    options = ALLOCATIONS.build("owl", {}).allocate(Budget(layers, 0.3, 4096, scores=scores))
    removed = sum(6 * round((options[y.name] or 0) * y.size / 6) for y in layers)
    assert abs(removed - 0.7 * sum(y.size for y in layers)) < 6
    assert all(round((options[y.name] or 0) * y.size, 6) % 6 == 0 for y in layers)


@pytest.mark.parametrize("strategy", ["owl", "alpha_pruning", "progression", "uniform"])
def test_shares_are_cut_at_everything_and_at_a_weight_in_each_row_and_the_rest_makes_up_for_it(strategy):
    layers, scores, _ = masks(1, shapes=WIDE)
    for sparsity, most in ((0.01, True), (0.94, False)):
        wide = {"progression": {"slope": 1.0}, "owl": {"spread": 0.5}, "alpha_pruning": {"spread": 0.99}}.get(
            strategy, {}
        )
        options = ALLOCATIONS.build(strategy, wide).allocate(Budget(layers, 1 - sparsity, scores=scores))
        removed = {y.name: round((options[y.name] or 0) * y.size) for y in layers}
        assert sum(removed.values()) == round(sparsity * sum(y.size for y in layers))
        assert all(removed[y.name] <= y.size - y.grain.even for y in layers)
        assert strategy == "uniform" or any(n == 0 for n in removed.values()) == most


def test_a_budget_below_one_weight_in_each_row_is_refused():
    layers, scores, _ = masks(1)
    for strategy in ("owl", "alpha_pruning", "uniform"):
        with pytest.raises(PareError, match="a weight in each row of every layer takes more: lower the sparsity"):
            ALLOCATIONS.build(strategy, {}).allocate(Budget(layers, 0.02, scores=scores))
    with pytest.raises(PareError, match=r"sparsity 0\.95 in every layer takes .* are asked for: raise kept, or skip"):
        Global().allocate(Budget(layers, 0.02))


def test_a_progression_is_one_over_the_blocks():
    layers = [Layer(str(i), 6400, [], i, Grain(8)) for i in (0, 1, 2, 3, 5)]  # of a block between none is targeted
    options = ALLOCATIONS.build("progression", {"slope": 0.2}).allocate(Budget(layers, 0.4))
    for i, option in enumerate(options.values()):
        assert option == pytest.approx(0.6 - 0.05 * (5 - 1) / 2 + 0.05 * i, abs=0.001)


@pytest.fixture
def model(tmp_path, save_model):
    return save_model(tmp_path / "m", LLAMA, torch.float32)


def surveyed(folder, allocation, method="wanda", sparsity=0.6, **options):
    raw = {"method": method, "options": {"sparsity": sparsity, **options}, "allocation": allocation}
    job = resolve_job(ModelSource(folder / "m", "m"), Recipe.parse(raw))
    (folder / "scratch").mkdir(exist_ok=True)
    made = survey(job, IDS, folder / "scratch")
    options = job.allocate(job.targets, made.choices or None, IDS.numel(), made.sensitivities, made.scores or None)
    return job, made, options


def double(data):
    return {name: (x.double(), delta) for name, (x, delta) in data.items()}


def by_block(model, options):
    """Weights and the options found, by block."""
    blocks = [{} for _ in model.model.layers]
    for name in options:
        blocks[int(name.split(".")[2])][name] = model.get_parameter(f"{name}.weight").detach().double()
    return blocks


def test_owl_is_its_formula(model, tmp_path):
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.mlp.up_proj.weight[: i + 1, ::7] *= 8  # so that blocks differ in outliers
    model.save_pretrained(tmp_path / "m")
    _, _, options = surveyed(tmp_path, {"strategy": "owl", "threshold": 4.0})
    data, shares = double(data_of(model, IDS)), []
    for block in by_block(model, options):
        scores = []
        for name, weight in block.items():
            norms = [math.sqrt(sum(v * v for v in column)) for column in data[name][0].T.tolist()]
            scores += [abs(w) * norm for row in weight.tolist() for w, norm in zip(row, norms, strict=True)]
        mean = sum(scores) / len(scores)
        shares.append(100 * sum(score > 4 * mean for score in scores) / len(scores))
    low, high = min(shares), max(shares)
    assert low < high
    ratios = [(share - low) / (high - low) * 0.08 * 2 for share in shares]
    for name, option in options.items():
        i = int(name.split(".")[2])
        wanted = ratios[i] - sum(ratios) / len(ratios) + (1 - 0.6)  # blocks are equal in size
        assert 1 - option == pytest.approx(wanted, abs=1 / 32)


@pytest.mark.parametrize("farms", [False, True])
def test_alpha_pruning_is_its_formula_and_reads_no_text(farms, model, tmp_path):
    job, _, options = surveyed(tmp_path, {"strategy": "alpha_pruning", "farms": farms})
    assert not job.surveyed
    alphas = []
    for block in by_block(model, options):
        own = []
        for weight in block.values():
            values = sorted(float(v) for v in eigenvalues(weight.float(), farms))
            if not farms:
                gram = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight
                assert values == pytest.approx(torch.linalg.eigvalsh(gram).tolist(), rel=1e-2, abs=1e-7)
            upper = values[len(values) // 2 :]
            own.append(1 + len(upper) / sum(math.log(v / upper[0]) for v in upper))
        alphas.append(sum(own) / len(own))
    ratios = [(a - min(alphas)) / (max(alphas) - min(alphas)) * 0.6 + 0.7 for a in alphas]
    for name, option in options.items():
        assert option == pytest.approx(ratios[int(name.split(".")[2])] * 0.6 * 3 / sum(ratios), abs=1 / 32)


def test_farms_takes_windows_of_one_aspect_ratio_all_over_the_weight():
    weight = torch.randn(230, 437, generator=torch.Generator().manual_seed(0))
    values = [
        torch.linalg.svdvals(weight[i : i + 100, j : j + 200]).square()
        for i in range(0, 10 * 14, 14)
        for j in range(0, 10 * 26, 26)
    ]
    torch.testing.assert_close(eigenvalues(weight, True), torch.cat(values))
    assert hill_exponent(torch.tensor([0.1, 2.0, 8.0, 4.0])) == pytest.approx(1 + 2 / math.log(2))


def test_losses_of_masks_are_the_second_order_rise_in_nats(model, tmp_path):
    _, made, _ = surveyed(tmp_path, {"strategy": "global"}, method="sparsegpt")
    data = double(data_of(model, IDS))
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.2.mlp.up_proj", "model.layers.1.mlp.down_proj"):
        x, delta = data[name]
        weight, inputs = model.get_parameter(f"{name}.weight").detach(), InputStats(x.shape[1], frozenset({Need.GRAM}))
        inputs.update(x.float())
        for sparsity in (0.3, 0.8):
            edit = build("sparsegpt", {"sparsity": sparsity}).compress(weight, Stats(inputs))
            lost = x @ (weight - edit.weight).double().T  # (tokens, out)
            wanted = (
                sum(float(delta[:, i].square().mean() * lost[:, i].square().mean()) for i in range(len(weight))) / 2
            )
            found = next(c.loss for c in made.choices[name] if c.option == sparsity)
            assert found == pytest.approx(wanted, rel=2e-3)
        choices = made.choices[name]
        assert choices[0].option is None and all(a.numbers < b.numbers for a, b in pairwise(choices))


def test_ours_is_spread_by_losses_unless_one_pattern_is_everywhere_and_reads_few_windows(model, tmp_path):
    def job(**options):
        return resolve_job(
            ModelSource(tmp_path / "m", "m"), Recipe.parse({"method": "paredown_prune", "options": options})
        )

    spread = job(sparsity=0.6, gradient_windows=2)
    assert spread.strategy == "global" and torch.equal(spread.surveyed_of(IDS), IDS[:2])
    assert job(sparsity="2:4", kept=0.6).strategy == "global" and job(sparsity="2:4").strategy == "uniform"
    assert not job(sparsity="2:4").is_surveyed
    _, made, options = surveyed(tmp_path, {"strategy": "global"}, method="paredown_prune")
    assert len(set(options.values())) > 3
    total, removed = 0, 0.0
    for name, option in options.items():
        size = model.get_parameter(f"{name}.weight").numel()
        total, removed = total + size, removed + size * (option or 0)
    assert round(removed) == round(0.6 * total)
    assert {c.option for choices in made.choices.values() for c in choices} >= {None, 0.2, 0.4, 0.6, 0.8, 0.95}
    (tmp_path / "pattern").mkdir()
    pattern = job(sparsity="2:4", kept=0.6)
    picked = pattern.allocate(pattern.targets, survey(pattern, IDS, tmp_path / "pattern").choices)
    assert set(picked.values()) == {None, "2:4"}, "what the budget leaves over goes to whole layers"


def test_a_few_steps_predict_how_ours_compares_at_each_sparsity():
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 3.0):
        weight = torch.randn(24, 64, generator=generator)
        inputs = InputStats(64, frozenset({Need.GRAM}))
        inputs.update(scale * torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator))
        for sparsity in (0.4, 0.6, 0.8):
            ours = build("paredown_prune", {"sparsity": sparsity, "target": "own"})
            sparsegpt = build("sparsegpt", {"sparsity": sparsity}).compress(weight, Stats(inputs)).weight
            pruned = ours.compress(weight, Stats(inputs)).weight, ours.tried(weight, Stats(inputs)), sparsegpt
            all_steps, few, other = (predicted_loss(weight - p, Stats(inputs)) for p in pruned)
            assert all_steps < few < 2 * all_steps and 2.5 * all_steps < other


def test_the_loss_of_a_large_weight_is_told_from_some_of_its_rows(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(600, 32, generator=generator) * (0.5 + torch.rand(600, 1, generator=generator))
    inputs = InputStats(32, frozenset({Need.GRAM}))
    inputs.update(torch.randn(256, 32, generator=generator) @ torch.randn(32, 32, generator=generator))
    stats = Stats(inputs, {Need.OUTPUT_GRADIENT_DIAGONAL: torch.rand(600, generator=generator)})
    curves = []
    for rows in (600, 200):
        monkeypatch.setattr(paredown_prune, "ROWS", rows)
        curves.append(build("paredown_prune", {"sparsity": 0.5}).choices((600, 32), weight, stats))
    whole, some = curves
    assert [(c.numbers, c.option) for c in some] == [(c.numbers, c.option) for c in whole]
    assert [c.loss for c in some] == pytest.approx([c.loss for c in whole], rel=0.15)
    assert whole[0].loss == pytest.approx(predicted_loss(weight, stats), rel=1e-5) and some[9].loss != whole[9].loss


def test_without_gradients_the_loss_is_the_layers_own():
    weight, x = torch.randn(5, 8), torch.randn(40, 8)
    inputs = InputStats(8, frozenset({Need.GRAM}))
    inputs.update(x)
    assert predicted_loss(weight, Stats(inputs)) == pytest.approx(float((x @ weight.T).square().sum() / 40), rel=1e-5)


def test_between_measured_sparsities_logarithms_are_interpolated():
    curve = between(MEASURED, [(1 - 0.5 * s) * math.exp(5 * s) for s in MEASURED])
    found = dict(curve)
    assert [s for s, _ in curve] == sorted(found, reverse=True) and set(MEASURED) <= found.keys()
    assert found[0.55] == pytest.approx(math.sqrt(found[0.5] * found[0.6])) and found[0.575] < found[0.6]
    assert between((0.2, 0.1), (1.0, 0.0))[-1] == (0.1, 0.0)


def coarse(seed, layers=5):
    """Layers with a few choices each, whose losses are anything but convex."""
    draw, made = random.Random(seed), []
    for i in range(layers):
        size = draw.choice([24, 36, 60])
        numbers = sorted(draw.sample(range(1, size), 4))
        losses = sorted((draw.uniform(0, 9) for _ in numbers), reverse=True)
        choices = [Choice(n, loss, f"{n}") for n, loss in zip(numbers, losses, strict=True)]
        made.append(Layer(str(i), size, [Choice(0, 10.0, None), *choices], i))
    return made


@pytest.mark.parametrize("seed", range(8))
def test_the_database_is_the_optimum_by_brute_force_and_never_worse_than_greedy(seed):
    layers = coarse(seed)
    total = sum(layer.size for layer in layers)
    for kept in (0.4, 0.6, 0.85):
        budget = Budget(layers, kept)
        fits = [p for p in product(*map(points, layers)) if sum(c.numbers for c in p) <= budget.room]
        best = min((math.fsum(c.loss for c in p) for p in fits), default=None)
        if best is None:
            continue
        options = Database().allocate(budget)
        chosen = [next(c for c in points(y) if c.option == options[y.name]) for y in layers]
        assert sum(c.numbers for c in chosen) <= kept * total
        assert math.fsum(c.loss for c in chosen) == pytest.approx(best, abs=1e-9)
        greedy = steepest(budget, {y.name: points(y)[0] for y in layers})
        assert best <= math.fsum(c.loss for c in greedy.values()) + 1e-9
        rough = least_loss(layers, budget.room, 20)  # units so large that little fits
        assert rough is None or sum(c.numbers for c in rough.values()) <= budget.room


@pytest.mark.parametrize("seed", range(4))
def test_the_database_predicts_no_more_than_greedy_where_any_share_can_be_kept(seed):
    layers, _, _ = masks(seed)
    budget = Budget(layers, 0.45)

    def predicted(options):
        return math.fsum(y.within(y.size * (1 - (options[y.name] or 0))).loss for y in layers)

    best, greedy = (predicted(strategy.allocate(budget)) for strategy in (Database(), Global()))
    uniform = predicted({layer.name: 0.55 for layer in layers})
    # rows keep equally many, which moves either by less than a column of each layer
    assert best <= 1.1 * greedy and max(best, greedy) < uniform


@pytest.mark.parametrize("strategy", ["global", "database"])
def test_beside_a_pattern_the_layers_that_lose_most_for_their_size_stay_dense(strategy, model, tmp_path):
    job, made, options = surveyed(tmp_path, {"strategy": strategy}, sparsity="2:4", kept=0.7)
    assert set(options.values()) == {None, "2:4"}
    sizes = {view.name: math.prod(view.shape) for view in job.targets}
    kept = sum(n if options[name] is None else n // 2 for name, n in sizes.items())
    assert 0.6 < kept / sum(sizes.values()) <= 0.7
    plan = make_plan(job, 72, [72])
    assert plan.at_most and kept <= plan.kept_parameters == int(0.7 * sum(sizes.values()))
    if strategy == "database":
        lost = math.fsum(made.choices[name][1].loss for name, option in options.items() if option)
        for a in (name for name in sizes if options[name]):  # no two layers of a size should change places
            for b in (name for name in sizes if options[name] is None and sizes[name] == sizes[a]):
                assert made.choices[a][1].loss <= made.choices[b][1].loss
        assert lost > 0


@pytest.mark.parametrize("strategy", OWN)
def test_what_is_kept_and_stored_is_what_the_plan_says(strategy, model, tmp_path, prune):
    raw = {"method": "magnitude", "options": {"sparsity": 0.63}, "allocation": {"strategy": strategy}}
    raw["targets"] = {"include": ["k_proj", "o_proj", "down_proj"]}
    job = resolve_job(ModelSource(tmp_path / "m", "m"), Recipe.parse(raw))
    plan = make_plan(job, 72, [72])
    result, _ = prune(tmp_path / "m", tmp_path / "out", **raw)
    if strategy != "uniform":  # which rounds in each layer, as without an allocation
        assert result.targeted - result.numbers == round(0.63 * result.targeted)
    assert plan.at_most == (job.allocation.reads != "shapes")
    # files have headers beside the weights
    written = sum(tensor.numel() * tensor.element_size() for tensor in stored(tmp_path / "out"))
    assert result.numbers <= plan.kept_parameters and written <= plan.bytes_after
    if not plan.at_most:
        assert (result.numbers, written) == (plan.kept_parameters, plan.bytes_after)


def stored(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors").values()


def test_uniform_is_as_without_an_allocation_and_reads_nothing(model, tmp_path, prune):
    prune(tmp_path / "m", tmp_path / "a", method="sparsegpt", sparsity=0.3)
    prune(tmp_path / "m", tmp_path / "b", method="sparsegpt", sparsity=0.3, allocation={"strategy": "uniform"})
    for a, b in zip(stored(tmp_path / "a"), stored(tmp_path / "b"), strict=True):
        assert torch.equal(a, b)
    job, made, options = surveyed(tmp_path, None, method="sparsegpt", sparsity=0.3)
    assert not job.surveyed and options is None and not made.scores and not made.choices


@pytest.mark.parametrize("strategy", OWN)
def test_the_experts_of_a_fused_weight_share_one_sparsity(strategy, tmp_path, save_model):
    config = t.MixtralConfig(**{**LLAMA.to_diff_dict(), "num_hidden_layers": 2}, num_local_experts=4)
    save_model(tmp_path / "m", config)
    job, _, options = surveyed(tmp_path, {"strategy": strategy})
    if strategy == "uniform":
        assert options is None
        return
    for view in job.targets:
        assert options[view.name] == options[next(v.name for v in job.targets if v.owner == view.owner)]
    removed = sum(round((options[v.name] or 0) * math.prod(v.shape)) for v in job.targets)
    assert removed == pytest.approx(0.6 * sum(math.prod(v.shape) for v in job.targets), abs=4)


def refused(folder, options, allocation=None, method="wanda"):
    raw = {"method": method, "options": options, **({"allocation": allocation} if allocation else {})}
    with pytest.raises(PareError) as fault:
        resolve_job(ModelSource(folder / "m", "m"), Recipe.parse(raw))
    return str(fault.value)


def test_what_an_allocation_cannot_do_is_said_in_a_sentence(model, tmp_path):
    pattern = {"sparsity": "2:4"}
    for strategy in ("owl", "global", "progression"):
        assert "an n:m pattern is the same in every layer. Say with kept" in refused(
            tmp_path, pattern, {"strategy": strategy}
        )
    assert "the same in every layer" in refused(tmp_path, pattern, method="owl_wanda")
    for allocation in ({"strategy": "owl"}, {"strategy": "sensitivity"}, None):
        said = refused(tmp_path, {**pattern, "kept": 0.7}, allocation)
        assert "kept leaves some layers dense, which database and global choose" in said
    assert "2:4 in every layer leaves 0.5" in refused(tmp_path, {**pattern, "kept": 0.4}, {"strategy": "global"})
    assert "sparsity 0.4" in refused(tmp_path, {"sparsity": 0.5, "kept": 0.6}, {"strategy": "global"})
    wide = {"strategy": "progression", "slope": 1.5}
    assert "slope" in refused(tmp_path, {"sparsity": 0.5}, wide)


def test_named_methods_spread_as_their_papers_do(model, tmp_path):
    for method, strategy in (("owl_wanda", "owl"), ("alpha_sparsegpt", "alpha_pruning")):
        job = resolve_job(ModelSource(tmp_path / "m", "m"), Recipe.parse({"method": method}))
        assert job.strategy == strategy and isinstance(job.allocation, ByScore)
