"""Training what a checkpoint stores: masks hold, the lowest divergence is kept, and a stop changes nothing."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from packing import pack_model
from transformers import LlamaConfig, LlamaForCausalLM

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.progress import Progress
from paredown.compress.recipe import DistillSpec
from paredown.compress.recovery import distill
from paredown.compress.recovery.distill import Distillation, Diverged
from paredown.compress.recovery.divergence import mean_divergence
from paredown.compress.recovery.hidden import layers_of, outputs_of
from paredown.compress.recovery.targets import Targets, target_bytes, teach
from paredown.compress.recovery.trainable import Trainable, pruned_layers
from paredown.compress.storage.kinds import KINDS, MASKS, pack
from paredown.compress.storage.modules import PACKED

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.randint(3, 60, (12, 16), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3, tie_word_embeddings=True)).eval()


@pytest.fixture(scope="module")
def teacher(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    dense.save_pretrained(folder)
    return ModelSource(folder, "teacher")


def packed(dense, kind):
    torch.manual_seed(1)
    return pack_model(dense, kind)[0]


def trainable(model, **options):
    return Trainable(model, ("model.layers.0.", "model.layers.1."), frozenset(), torch.float32, **options)


@pytest.fixture
def training(dense, teacher, tmp_path):
    """`training(kind, ...)`: 8 windows to train on, 4 held out."""

    def make(kind="sparse24", model=None, spec=(), notes=None, embeddings=False):
        settings = DistillSpec(**{"tokens": 24 * 32, "length": 16, "batch": 2, "lr": 0.01, "heldout": 4, **dict(spec)})
        layers = layers_of(settings.hidden, 2)
        targets = Targets.of(tmp_path, f"t{len(layers)}", IDS, 8, 1.0, CPU, layers)
        targets.write(teacher)
        student = trainable(model or packed(dense, kind), embeddings=embeddings)
        progress = Progress(note=(notes if notes is not None else []).append)
        work = Distillation(student, IDS[:8], IDS[8:], targets, settings, 0, CPU, progress)
        work.compared = [student.blocks[i] for i in layers]
        return work

    return make


def test_targets_are_the_model_s_own_probabilities(dense, teacher, tmp_path):
    targets = Targets(tmp_path, "t", IDS, 8, 2.0, 5)
    targets.write(teacher)
    assert targets.files == 3 and targets.bytes > target_bytes(12 * 15, 8)
    found = targets.read([11, 0, 4])
    log_probs, indices = (dense(IDS[[11, 0, 4]]).logits[:, :-1] / 2).log_softmax(-1).topk(8)
    assert torch.equal(found.indices.long(), indices)
    torch.testing.assert_close(found.log_probs.float(), log_probs, atol=5e-3, rtol=0)
    rest = (1 - log_probs.exp().sum(-1)).log()
    torch.testing.assert_close(found.rest.float(), rest, atol=2e-2, rtol=0)


def test_files_that_are_there_are_not_computed_again(teacher, tmp_path, monkeypatch):
    seen = []
    Targets(tmp_path, "t", IDS, 8, 1.0, 4).write(teacher, seen.append)
    monkeypatch.setattr("paredown.compress.recovery.targets.teach", None)
    Targets(tmp_path, "t", IDS, 8, 1.0, 4).write(teacher, seen.append)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("kind", ["sparse24", "bitmap", "lowrank", "pifa"])
def test_gradients_of_a_whole_model_reach_what_is_stored_as_through_dense_weights(dense, teacher, kind):
    model, twin, target = packed(dense, kind), copy.deepcopy(dense), teach(teacher, IDS[:2], 8, 1.0)[0]
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PACKED)}
    for name, layer in layers.items():
        twin.get_submodule(name).weight.data = layer.weight.detach().clone()
    student = trainable(model)
    for own in (twin, model):
        mean_divergence(own(IDS[:2], use_cache=False).logits[:, :-1], target).backward()
    for name, layer in layers.items():
        through = twin.get_submodule(name).weight.grad.double()  # (out, in)
        stored = {part: t.detach().clone() for part, t in layer.tensors().items()}
        free = {part: t.double().requires_grad_() for part, t in stored.items() if t.is_floating_point()}
        if kind in MASKS:
            keep = KINDS[kind].unpack({**stored, "values": torch.ones_like(stored["values"])}, layer.spec.shape) > 0
            wanted = [pack(kind, through, keep)["values"]]
        elif kind == "pifa":
            rows = torch.cat([free["pivots"], free["coefficients"] @ free["pivots"]])[stored["order"].long()]
            wanted = torch.autograd.grad(rows, list(free.values()), through)
        else:
            wanted = torch.autograd.grad(free["left"] @ free["right"], list(free.values()), through)
        found = [student.weights[f"{name}.{part}"].master.grad.double() for part in free]
        torch.testing.assert_close(found, list(wanted), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["sparse24", "bitmap", "lowrank", "pifa", "sparse24_lowrank"])
def test_training_lowers_the_held_out_divergence_and_leaves_the_form(training, kind):
    work = training(kind)
    layer = work.student.model.model.layers[1].mlp.down_proj
    before = {name: t.detach().clone() for name, t in layer.tensors().items()}
    zeros = layer.weight == 0
    work.run(lambda: None)
    curve = [value for _, value in work.course.curve]
    assert min(curve) < 0.9 * curve[0] and work.course.stopped == "all its tokens were seen"
    for name, tensor in layer.tensors().items():
        assert torch.equal(tensor, before[name]) != tensor.is_floating_point()
    if kind in ("sparse24", "bitmap"):
        assert torch.equal(layer.weight == 0, zeros)


def test_zeros_of_a_dense_weight_stay_zeros(training, dense):
    model = copy.deepcopy(dense)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data *= torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    zeros, few = weight == 0, model.model.layers[0].mlp.gate_proj.weight
    few.data[0, 0] = 0
    work = training(model=model)
    work.run(lambda: None)
    result = work.student.results()
    assert torch.equal(result["model.layers.0.mlp.up_proj.weight"] == 0, zeros)
    assert result["model.layers.0.mlp.gate_proj.weight"][0, 0] != 0  # a zero by chance trains
    assert "model.embed_tokens.weight" not in result and "model.norm.weight" in result


def test_a_layer_of_the_record_is_pruned_however_few_its_zeros():
    layers = {"a.q": {"sparsity": 0.01}, "a.k": {"kind": "lowrank"}, "a.experts.up.3": {"sparsity": "2:4"}}
    assert pruned_layers(["a.q.weight", "a.k.weight", "a.experts.up"], layers) == {"a.q.weight", "a.experts.up"}


def test_embeddings_train_if_they_are_asked_for(training):
    work = training(embeddings=True)
    before = work.student.model.model.embed_tokens.weight.detach().clone()
    work.run(lambda: None)
    assert not torch.equal(work.kept["model.embed_tokens.weight"], before)


WAYS = {"hidden": {"weight": 0.5, "every": 1}, "taid": {"alpha": 0.1}}


@pytest.mark.parametrize("ways", [{}, WAYS], ids=["plain", "hidden states and TAID"])
def test_a_training_that_is_stopped_goes_on_to_the_same_numbers(training, ways):
    whole = training(spec=ways)
    whole.run(lambda: None)
    saved = {}
    first = training(spec=ways)

    def save():
        if first.course.step == 7:
            saved["course"] = copy.deepcopy(first.course)
            saved["state"] = {name: t.clone() for name, t in first.state().items()}
            raise InterruptedError

    with pytest.raises(InterruptedError):
        first.run(save)
    second = training(spec=ways)
    second.restore(saved["course"], saved["state"])
    second.run(lambda: None)
    assert second.course.losses == whole.course.losses and second.course.curve == whole.course.curve
    assert (second.course.share, second.course.momentum) == (whole.course.share, whole.course.momentum)
    assert (whole.course.share == 1, whole.course.momentum == 0) == (True, not ways)
    assert all(torch.equal(t, whole.kept[name]) for name, t in second.kept.items())


def test_hidden_states_come_closer_to_the_teacher_s_if_they_are_asked_for(training, dense):
    def error(spec):
        """Relative, of both blocks, after training; by transformers' own hidden states."""
        work = training(spec=spec)
        work.run(lambda: None)
        found = []
        for model in (work.student.model, dense):
            with outputs_of(model.model.layers) as outputs, torch.no_grad():
                model(IDS[8:], use_cache=False)
            found.append(torch.stack(outputs)[:, :, :-1].double())
        return float(((found[0] - found[1]).square().sum(-1) / found[1].square().sum(-1)).mean())

    assert error({"hidden": {"weight": 30.0, "every": 1}, "lr": 0.03}) < 0.97 * error({"lr": 0.03})


def test_hidden_states_on_the_disk_are_the_teacher_s(training, dense, teacher, tmp_path):
    targets = Targets(tmp_path, "h", IDS, 8, 1.0, 5, (0, 1))
    targets.write(teacher)
    assert targets.bytes > target_bytes(12 * 15, 8, 2, 32)
    found = targets.states([11, 0])
    with outputs_of([dense.model.layers[0], dense.model.layers[1]]) as outputs, torch.no_grad():
        dense(IDS[[11, 0]], use_cache=False)
    wanted = torch.stack(outputs, 1)[:, :, :-1]  # (windows, layers, length - 1, hidden)
    torch.testing.assert_close(found.values * found.sizes[..., None], wanted, atol=1e-2, rtol=2e-3)


def test_a_survey_gives_each_window_its_divergence_and_only_chosen_ones_are_trained_on(training):
    work = training(spec={"batch": 3})
    divergence, features = work.survey()
    assert features.shape == (8, 32)
    for window in (0, 5):
        with torch.no_grad():
            logits = work.student.model(IDS[[window]], use_cache=False).logits[:, :-1]
        assert float(divergence[window]) == pytest.approx(float(mean_divergence(logits, work.targets.read([window]))))
    work.rows = [1, 4, 6, 7]
    assert {window for step in range(8) for window in work._windows(step)} == {1, 4, 6, 7}


def test_what_had_the_lowest_divergence_is_kept_and_a_rise_ends_training(training):
    notes = []
    spec = {"tokens": 4000 * 32, "lr": 0.3, "warmup": 0.0, "evaluations": 500, "patience": 2}
    work = training("bitmap", spec=spec, notes=notes)
    work.run(lambda: None)
    curve = [value for _, value in work.course.curve]
    assert work.course.step < work.steps and "has not fallen for 2 evaluations" in work.course.stopped
    work.student.take(work.kept)
    work._evaluate()
    assert work.course.curve[-1][1] == pytest.approx(min(curve)) and len(notes) == len(curve) + 1


def test_a_loss_that_is_not_finite_is_told(training, monkeypatch):
    work = training()
    monkeypatch.setattr(work, "_loss", lambda *_: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(Diverged, match="step 1 of 24"):
        work._step()


def test_micro_batches_and_checkpointed_blocks_give_the_same_step(training, monkeypatch):
    whole = training(spec={"batch": 4, "tokens": 6 * 64})
    whole.run(lambda: None)
    monkeypatch.setitem(distill.MICRO_TOKENS, "cpu", 16)
    parts = training(spec={"batch": 4, "tokens": 6 * 64, "checkpointing": True})
    parts.run(lambda: None)
    torch.testing.assert_close(parts.course.losses, whole.course.losses, rtol=1e-3, atol=1e-5)


def test_each_window_is_seen_once_in_a_pass(training):
    work = training(spec={"batch": 3})
    seen = [window for step in range(8) for window in work._windows(step)]
    assert all(sorted(seen[i : i + 8]) == list(range(8)) for i in (0, 8, 16)) and seen[:8] != seen[8:16]


def test_the_rate_rises_and_falls(training):
    work = training(spec={"warmup": 0.25})
    rates = [work._schedule(step) for step in range(work.steps)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]) and rates[-1] < 0.02
    assert all(a >= b for a, b in pairwise(rates[6:]))
