"""What the first pass finds, against the whole model in memory; and that there is none where nothing needs it."""

import math
from dataclasses import replace

import pytest
import torch
import transformers as t
from oracles import data_of
from safetensors.torch import load_file

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.model.blocks import blocks
from paredown.compress.model.stream import start
from paredown.compress.numerics.metric import OUTPUT_DAMPING
from paredown.compress.numerics.moments import InputStats, Need, Stats
from paredown.compress.recipe import Recipe
from paredown.compress.survey.gradients import backward
from paredown.compress.survey.survey import survey

C = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = t.LlamaConfig(**C)
IDS = torch.randint(3, 64, (6, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tmp_path, save_model):
    """In float64, so that what is compared is not the rounding."""
    return save_model(tmp_path / "m", LLAMA, torch.float64)


@pytest.fixture
def source(tmp_path, model):
    return ModelSource(tmp_path / "m", "m")


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def layers_of(source):
    return {v.name: v for block in blocks(source) for v in block.views()}


def surveyed(source, scratch, method, options=None, allocation=None, targets=("*",)):
    """A job and its survey."""
    given = {"options": options or {}, "allocation": allocation, "targets": {"include": sorted(targets)}}
    job = resolve_job(source, Recipe.parse({"method": method, **given}))
    return job, survey(job, IDS, scratch)


def chosen(job, made):
    """Names of the layers that are edited."""
    return {view.name for view in job.targets_within(made.angles)}


def ranks_of(job, made):
    """By layer, as a run allocates them."""
    return job.allocate(job.targets_within(made.angles), made.choices or None, IDS.numel(), made.sensitivities)


def test_gradients_are_taken_on_the_first_windows_and_all_else_on_all(source):
    def read(method, **options):
        return resolve_job(source, Recipe.parse({"method": method, "options": options})).surveyed_of(IDS)

    assert torch.equal(read("paredown_lowrank", gradient_windows=2), IDS[:2])
    assert torch.equal(read("paredown_lowrank", gradient_windows=2, two_sided=False), IDS)
    assert torch.equal(read("fisher_svd"), IDS)


class Sealed(ModelSource):
    """A model of which no weight may be read."""

    def materialise(self, *args):
        pytest.fail("weights were read")


def test_the_dense_model_is_not_read_where_nothing_is_to_be_known_beforehand(source, scratch):
    sealed = Sealed(source.folder, "m")
    for method, options in [
        ("wanda", {}),
        ("sparse_low_rank", {}),
        ("svd_llm", {"kept": 0.5}),
        ("svd_llm", {"rank": 3}),
        ("rom", {"energy": 0.9}),
        ("paredown_lowrank", {"rank": 3, "two_sided": False}),
    ]:
        job, made = surveyed(sealed, scratch, method, options)
        assert ranks_of(job, made) is None and not made.angles and job.strategy == "uniform"
        assert chosen(job, made) == set(layers_of(source)) and not made.choices
        assert job.method_for(job.targets[0], None) is job.method
        assert not any(made.gradients(block, torch.device("cpu")) for block in job.blocks)
    job, made = surveyed(sealed, scratch, "lorap")  # spread by shapes alone: ranks, and still nothing read
    assert job.strategy == "per_type" and ranks_of(job, made).keys() == layers_of(source).keys()
    assert not list(scratch.iterdir())


def test_every_layer_is_told_the_rank_that_the_allocation_gives_it(source, scratch):
    job, made = surveyed(source, scratch, "svd_llm", {"kept": 0.7}, {"strategy": "global"})
    ranks = ranks_of(job, made)
    assert len(set(ranks.values())) > 2 and None in ranks.values()
    for name, rank in ranks.items():
        told = job.method_for(layers_of(source)[name], ranks)
        assert told is None if rank is None else (told.rank, told.kept) == (rank, None)


def brute_force_angles(model):
    """Mean of arccos of the cosine between each token's hidden state before and after a block, over pi."""
    found = []
    hooks = [
        layer.register_forward_hook(
            lambda m, args, out: found.append((args[0], out[0] if isinstance(out, tuple) else out))
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    angles = []
    for before, after in found:
        pairs = zip(before.flatten(0, 1).tolist(), after.flatten(0, 1).tolist(), strict=True)
        turned = [
            math.acos(sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b)))
            for a, b in pairs
        ]
        angles.append(sum(turned) / len(turned) / math.pi)
    return angles


def turning(model, sizes):
    """Blocks that turn their input by clearly different angles."""
    with torch.no_grad():
        for layer, size in zip(model.model.layers, sizes, strict=True):
            layer.self_attn.o_proj.weight *= size
            layer.mlp.down_proj.weight *= size
    return model


@pytest.mark.parametrize(("sizes", "wanted"), [((1, 9, 50, 3, 1), [1, 3]), ((90, 30, 3, 9, 9), [2, 3])])
def test_curing_edits_the_inner_blocks_that_turn_their_input_least(sizes, wanted, model, source, scratch):
    turning(model, sizes).save_pretrained(source.folder)
    source = ModelSource(source.folder, "m")
    job, made = surveyed(source, scratch, "cur", {"blocks": 2})
    angles = brute_force_angles(model)
    assert made.angles == pytest.approx(angles, rel=1e-3)
    assert sorted(sorted(range(1, 4), key=angles.__getitem__)[:2]) == wanted
    assert {int(name.split(".")[2]) for name in chosen(job, made)} == set(wanted)
    assert chosen(job, made) == {n for n in layers_of(source) if int(n.split(".")[2]) in wanted}
    assert chosen(*surveyed(source, scratch, "cur", {"blocks": None})) == set(layers_of(source))
    assert all(p.is_meta for p in source.model.parameters())


def test_blocks_that_are_not_chosen_are_written_as_they_were(model, source, tmp_path, prune):
    turning(model, (1, 9, 50, 3, 1)).save_pretrained(source.folder)
    result, _ = prune(source.folder, tmp_path / "out", method="cur", options={"blocks": 2})
    before, after = (load_file(f / "model.safetensors") for f in (source.folder, tmp_path / "out"))
    assert {int(layer["name"].split(".")[2]) for layer in result.layers} == {1, 3}
    for name, tensor in before.items():
        if not name.startswith(("model.layers.1.", "model.layers.3.")):
            assert torch.equal(after[name], tensor), name


FAMILIES = {
    "llama": LLAMA,
    "llama tied": t.LlamaConfig(**C, tie_word_embeddings=True),
    "gpt2": t.GPT2Config(vocab_size=128, n_embd=32, n_layer=3, n_head=4, n_positions=64),
}


@pytest.mark.parametrize("share", [0.35, 0.8])
@pytest.mark.parametrize(
    ("family", "method", "options", "allocation"),
    [
        ("llama", "svd_llm", {}, None),
        ("llama tied", "svd_llm", {"storage": "pifa"}, None),
        ("gpt2", "svd_llm", {}, {"strategy": "per_type", "weights": {"c_attn": 0.5, "c_fc": 2}}),
        ("llama", "rom", {}, {"strategy": "theoretical_loss"}),
        ("gpt2", "rom", {}, None),
        ("llama", "svd_llm", {"storage": "pifa"}, {"strategy": "global"}),
        ("llama tied", "rom", {}, {"strategy": "global"}),
    ],
)
def test_target_parameters_are_met_by_the_written_model(
    family, method, options, allocation, share, tmp_path, save_model, prune
):
    """Below the target, by less than one rank of each layer; a global split may lack room for one layer's whole step."""
    save_model(tmp_path / "m", FAMILIES[family])
    source = ModelSource(tmp_path / "m", "m")
    whole = sum(p.numel() for p in source.parameters.values())
    shapes = {name: v.shape for name, v in layers_of(source).items()}
    target = whole - int((1 - share) * sum(math.prod(shape) for shape in shapes.values()))
    spread = {"allocation": allocation} if allocation else {}
    result, _ = prune(
        tmp_path / "m", tmp_path / "out", method=method, options={**options, "target_parameters": target}, **spread
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    written = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
    assert written == whole - result.targeted + result.numbers
    slack = sum(sum(shapes[layer["name"]]) for layer in result.layers)  # a rank of each
    if family == "gpt2" and method == "rom":  # a bias is paid for where the layer has one already
        slack += sum(shapes[layer["name"]][0] for layer in result.layers)
    if allocation == {"strategy": "global"}:
        slack = max(math.prod(shape) for shape in shapes.values())
    assert target - slack < written <= target


@pytest.mark.parametrize("options", [{}, {"target_parameters": 20000}])
def test_a_model_without_inner_blocks_is_told_that_curing_finds_none(options, tmp_path, save_model, scratch):
    save_model(tmp_path / "two", t.LlamaConfig(**{**C, "num_hidden_layers": 2}))
    with pytest.raises(PareError, match="blocks"):
        surveyed(ModelSource(tmp_path / "two", "two"), scratch, "cur", options)


def weighed_losses(weight, x, delta=None, centred=False):
    """Squared singular values of (G + damping)^1/2 W A^1/2, largest first."""
    moment = (x - x.mean(0) if centred else x).double()
    moment = moment.T @ moment / len(x)  # (in, in)
    values, basis = torch.linalg.eigh(moment)
    scaled = weight.double() @ basis * values.clamp_min(0).sqrt()
    if delta is not None:
        outer = delta.T @ delta / len(delta)  # (out, out)
        outer += OUTPUT_DAMPING * outer.diagonal().mean() * torch.eye(len(outer), dtype=torch.float64)
        scaled = torch.linalg.cholesky(outer).T @ scaled
    return torch.linalg.svdvals(scaled).square()


@pytest.mark.parametrize(
    ("method", "options", "strategy", "two_sided", "centred"),
    [
        ("svd_llm", {}, "global", False, False),
        ("svd_llm", {}, "theoretical_loss", False, False),
        ("rom", {}, "global", False, True),
        ("rom", {"affine": False}, "global", False, False),
        ("fisher_svd", {}, "global", True, False),
        ("paredown_lowrank", {"curves": "kfac"}, None, True, False),
        ("paredown_lowrank", {"two_sided": False}, None, False, False),
        ("paredown_lowrank", {"curves": "kfac", "output_damping": 3.0}, None, True, False),
    ],
)
def test_choices_have_the_losses_of_the_whole_models_own_data(
    method, options, strategy, two_sided, centred, model, source, scratch
):
    allocation = {"strategy": strategy} if strategy else None
    job, made = surveyed(source, scratch, method, {"kept": 0.6, **options}, allocation)
    assert made.choices.keys() == layers_of(source).keys()
    for name, (x, delta) in data_of(model, IDS).items():
        weight = model.get_parameter(f"{name}.weight").detach()
        wanted = weighed_losses(weight, x, delta if two_sided else None, centred)
        wanted = wanted / 2 if method == "paredown_lowrank" else wanted  # in nats
        choices, shape = made.choices[name], tuple(weight.shape)
        # nothing, and every rank that stores less than the weight
        assert [c.option for c in choices] == [None, *range(1, len(choices))]
        assert [c.numbers for c in choices] == [0, *(job.method.numbers(shape, k) for k in range(1, len(choices)))]
        assert choices[-1].numbers < weight.numel() and len(choices) <= len(wanted) + 1
        assert len(choices) > len(wanted) or job.method.numbers(shape, len(choices)) >= weight.numel()
        losses = torch.tensor([c.loss for c in choices], dtype=torch.float64)
        found = losses[:-1] - losses[1:]  # squared singular values
        assert (found - wanted[: len(found)]).abs().max() <= 1e-4 * wanted[0]
        for rank in (0, 1, 5, len(choices) - 1):
            tail = float(wanted[rank:].sum())
            assert choices[rank].loss == pytest.approx(tail, abs=1e-4 * float(wanted.sum()))
            assert made.predicted(name, rank or None) == pytest.approx(tail / float(wanted.sum()), abs=1e-4)


def test_ranks_are_chosen_by_what_each_token_loses(model, source, scratch):
    """E[(g . (W - W_k) x)^2] / 2, where W_k is nearest to W in the damped metric of both sides; never more at a higher rank."""
    _, made = surveyed(source, scratch, "paredown_lowrank", {"kept": 0.6, "damping": 0.2, "output_damping": 0.4})
    for name, (x, delta) in data_of(model, IDS).items():
        weight = model.get_parameter(f"{name}.weight").detach().double()
        roots = []
        for data in (delta.double(), x.double()):
            moment = data.T @ data / len(data)
            sizes = moment.diagonal()
            added = 0.2 * sizes if roots else 0.4 * sizes.mean().expand_as(sizes)
            roots.append(torch.linalg.cholesky(moment + torch.diag(added)))
        left, right = roots  # of G = left left^T and A = right right^T
        u, s, v = torch.linalg.svd(left.T @ weight @ right, full_matrices=False)
        least = math.inf
        for choice in made.choices[name]:
            rank = choice.option or 0
            low = torch.linalg.solve(left.T, u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(right)
            errors = ((x.double() @ (weight - low).T) * delta.double()).sum(1)  # (tokens,)
            least = min(least, float(errors.square().mean()) / 2)
            assert choice.loss == pytest.approx(least, rel=1e-3, abs=1e-4 * made.choices[name][0].loss)


@pytest.mark.parametrize(("method", "strategy"), [("fisher_svd", "global"), ("svd_llm", "global"), ("rom", "global")])
def test_the_first_block_loses_what_was_predicted(method, strategy, model, source, tmp_path, prune):
    """Before anything is compressed, the walk's data are the survey's; later layers are told both losses."""
    result, _ = prune(
        source.folder, tmp_path / "out", method=method, options={"kept": 0.6}, allocation={"strategy": strategy}
    )
    first = [layer for layer in result.layers if layer["name"].startswith("model.layers.0.")]
    assert first
    for layer in first:
        assert (
            layer["measured_loss"] == pytest.approx(layer["predicted_loss"], rel=1e-3) and layer["predicted_loss"] > 0
        )
    assert all(layer["predicted_loss"] > 0 and layer["measured_loss"] > 0 for layer in result.layers)


@pytest.mark.parametrize(
    ("method", "options", "needs"),
    [
        ("fwsvd", {}, {"fisher_rows"}),
        ("fwsvd", {"gradient": "per_token"}, {"fisher_rows_per_token"}),
        ("fisher_svd", {}, {"output_gradient", "output_gradient_diagonal"}),
        ("fisher_svd", {"labels": "sampled"}, {"output_gradient", "output_gradient_diagonal"}),
        ("paredown_lowrank", {"rank": 4}, {"output_gradient", "output_gradient_diagonal"}),
    ],
)
def test_gradients_are_read_back_by_layer_and_block(method, options, needs, source, scratch, tmp_path):
    only = {n for n in layers_of(source) if "mlp" in n and ".2." not in n}
    job, made = surveyed(source, scratch, method, options, targets=only)
    assert sorted(f.name for f in scratch.iterdir()) == [f"gradients-{i}.safetensors" for i in (0, 1, 3, 4)]
    (tmp_path / "again").mkdir()
    stream, labels = start(source, IDS), job.method.labels
    for block, stats in backward(source, stream, only, frozenset(), frozenset(needs), tmp_path / "again", labels):
        found = made.gradients(block, torch.device("cpu"))
        assert found.keys() == stats.keys()
        for name, s in stats.items():
            assert found[name].keys() == needs
            for need in needs:
                assert torch.equal(found[name][need], s.gradient(need).float())


def test_all_experts_of_a_fused_weight_are_one_layer_of_the_budget(tmp_path, save_model, scratch):
    """Their numbers and losses are added, each loss for the share of the tokens that reaches the expert."""
    save_model(tmp_path / "m", t.MixtralConfig(**{**C, "num_hidden_layers": 2}, num_local_experts=4))
    source = ModelSource(tmp_path / "m", "m")
    job, made = surveyed(source, scratch, "fisher_svd", {"kept": 0.5}, {"strategy": "global"})
    views = layers_of(source)
    assert made.choices.keys() == {view.owner for view in views.values()} and len(made.choices) == 2 * (4 + 2)
    ranks = ranks_of(job, made)
    assert ranks.keys() == views.keys()
    for owner, choices in made.choices.items():
        members = [view for view in views.values() if view.owner == owner]
        assert len({ranks[view.name] for view in members}) == 1
        own = job.method_of(members[0]).choices(members[0].shape)
        assert [c.numbers for c in choices] == [len(members) * c.numbers for c in own]
    for block in blocks(source):
        reached = made.gradients(block, torch.device("cpu")).keys()
        assert {n for n in views if n.startswith(block.prefix) and "self_attn" in n} < reached <= views.keys()


def test_measured_sensitivities_are_the_losses_of_the_model_with_one_layer_compressed(model, source, scratch):
    job, made = surveyed(source, scratch, "svd_llm", {"kept": 0.6}, {"strategy": "sensitivity"})
    assert ranks_of(job, made).keys() == layers_of(source).keys()
    assert made.sensitivities.keys() == layers_of(source).keys()
    data = data_of(model, IDS)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj", "model.layers.4.mlp.up_proj"):
        parameter, (x, _) = model.get_parameter(f"{name}.weight"), data[name]
        weight, moment = parameter.detach().clone(), (x.T @ x / len(x)).detach()
        vectors = torch.linalg.eigh(weight @ moment @ weight.T)[1].flip(1)  # (out, out)
        for share, found in made.sensitivities[name].items():
            rank = int(share * weight.numel() / sum(weight.shape) + 1e-9)
            with torch.no_grad():
                parameter.copy_(vectors[:, :rank] @ vectors[:, :rank].T @ weight)
                assert found == pytest.approx(float(model(IDS, labels=IDS, use_cache=False).loss), rel=1e-5)
                parameter.copy_(weight)


def test_a_method_with_gradients_is_probed_with_them(model, source, scratch):
    job, made = surveyed(source, scratch, "fisher_svd", {"kept": 0.6}, {"strategy": "sensitivity"})
    assert made.sensitivities.keys() == layers_of(source).keys()
    name, block = "model.layers.2.mlp.down_proj", blocks(source)[2]
    parameter, inputs = model.get_parameter(f"{name}.weight"), InputStats(48, frozenset({Need.GRAM}))
    inputs.update(data_of(model, IDS)[name][0])
    stats = Stats(inputs, made.gradients(block, torch.device("cpu"))[name])
    weight = parameter.detach().clone()
    for share, found in made.sensitivities[name].items():
        rank = int(share * weight.numel() / sum(weight.shape) + 1e-9)
        with torch.no_grad():
            parameter.copy_(job.method.at(rank).compress(weight, stats).dense())
            assert found == pytest.approx(float(model(IDS, labels=IDS, use_cache=False).loss), rel=1e-5)


def test_measured_sensitivities_of_an_affine_method_count_its_bias(model, source, scratch):
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[:8] += 3  # so that a mean is worth keeping
        model.model.embed_tokens.weight[:, :8] += 0.1
    model.save_pretrained(source.folder)
    job, made = surveyed(ModelSource(source.folder, "m"), scratch, "rom", {"kept": 0.6}, {"strategy": "sensitivity"})
    name = "model.layers.1.self_attn.v_proj"
    x, weight, module = data_of(model, IDS)[name][0], model.get_parameter(f"{name}.weight"), model.get_submodule(name)
    dense, mean = weight.detach().clone(), x.mean(0)
    spread = (x - mean) @ dense.T  # (tokens, out)
    for share, found in made.sensitivities[name].items():
        rank = replace(job.method, kept=share).planned_rank(tuple(dense.shape))
        top = torch.linalg.svd(spread, full_matrices=False)[2][:rank].T  # (out, rank)
        with torch.no_grad():
            weight.copy_(top @ top.T @ dense)
            without = float(model(IDS, labels=IDS, use_cache=False).loss)
            module.bias = torch.nn.Parameter((dense - weight) @ mean)
            assert found == pytest.approx(float(model(IDS, labels=IDS, use_cache=False).loss), rel=1e-6)
            assert found != pytest.approx(without, rel=1e-6)
            module.bias = None
            weight.copy_(dense)
