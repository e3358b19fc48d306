"""Two models on the same tokens: from two streams as from two whole models, and the dense one's part from a cache."""

import os

import pytest
import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.model.stream import next_token_nll
from paredown.compress.progress import Progress
from paredown.compress.recipe import Recipe
from paredown.compress.run import scoring
from paredown.compress.run.baseline import Baseline
from paredown.compress.run.pipeline import Run
from paredown.compress.run.result import Result
from paredown.compress.run.score_cache import STATES, ScoreCache, content_key
from paredown.compress.run.scoring import compare, evaluation_entry, walked
from paredown.compress.run.streams import Streams
from paredown.compress.shape_job import resolve


def silent(done, total):
    pass


@pytest.fixture
def dense(tmp_path, save_model, tiny_config):
    save_model(tmp_path / "dense", tiny_config, torch.float32)
    return tmp_path / "dense"


@pytest.fixture
def other(tmp_path, dense):
    """The dense model with a little noise."""
    model = transformers_plugin.load(dense)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture
def cache(tmp_path):
    return ScoreCache(tmp_path / "cache", 1 << 30)


def probabilities(folder, windows):
    model = transformers_plugin.load(folder).eval()
    with torch.no_grad():
        return model(windows.ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("at_once", [1, 1 << 30])
def test_divergence_of_two_streams_is_that_of_two_whole_models(dense, other, windows, at_once, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_BYTES", at_once)
    first, second = ModelSource(dense, "dense"), ModelSource(other, "other")
    (before,), (after,) = walked(first, [windows], silent), walked(second, [windows], silent)
    found = compare(before, after, first, second)
    log_p, log_q = probabilities(dense, windows), probabilities(other, windows)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert kl.min() > 1e-4
    torch.testing.assert_close(found.divergence.kl, kl, atol=1e-6, rtol=0)
    assert torch.equal(found.divergence.same_top, log_p.argmax(-1) == log_q.argmax(-1))
    for losses, folder in ((found.before, dense), (found.after, other)):
        with torch.no_grad():
            whole = next_token_nll(transformers_plugin.load(folder).eval(), windows.ids)
        torch.testing.assert_close(losses, whole)
    entry = evaluation_entry(windows, found)
    assert entry["divergence"]["kl_mean"] == pytest.approx(kl.mean().item(), abs=1e-6)
    assert entry["divergence"]["by_position"][0]["first"] == 1


def test_a_run_reports_the_divergence_of_the_checkpoint_that_it_writes(dense, windows, tmp_path, prune):
    result, _ = prune(dense, tmp_path / "out")
    log_p, log_q = probabilities(dense, windows), probabilities(tmp_path / "out", windows)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert result.evaluation[0]["divergence"]["kl_mean"] == pytest.approx(kl.mean().item(), abs=1e-6)


def test_models_with_other_vocabularies_are_not_compared(dense, tmp_path, save_model, tiny_config, windows):
    tiny_config.vocab_size = 328
    save_model(tmp_path / "wider", tiny_config, torch.float32)
    first, second = ModelSource(dense, "dense"), ModelSource(tmp_path / "wider", "wider")
    with pytest.raises(PareError, match="320 and 328 tokens"):
        compare(*walked(first, [windows], silent), *walked(second, [windows], silent), first, second)


# The cache


def test_a_text_is_walked_once_and_its_states_are_the_same_from_the_cache(dense, windows, cache, monkeypatch):
    notes = []
    first = Baseline(ModelSource(dense, "dense"), cache, notes.append)
    assert not first.has(windows)
    (walked_now,) = first.behind([windows])
    second = Baseline(ModelSource(dense, "elsewhere"), cache, notes.append)
    monkeypatch.setattr("paredown.compress.run.baseline.walked", lambda source, texts, progress: [None] * len(texts))
    assert second.has(windows) and not notes
    (kept,) = second.behind([windows])
    assert all(torch.equal(a, b) for a, b in zip(kept.hidden, walked_now.hidden, strict=True))
    assert len(notes) == 1 and "dense scores of random taken from" in notes[0] and "--no-cache" in notes[0]


def test_what_a_score_depends_on_decides_its_name(dense, other, windows):
    source = ModelSource(dense, "dense")
    name = content_key(dense, source, text="a")
    assert name == content_key(dense, ModelSource(dense, "renamed"), text="a")
    assert name != content_key(dense, source, text="b")
    assert name != content_key(dense, ModelSource(dense, "dense", dtype=torch.bfloat16), text="a")
    assert name != content_key(other, ModelSource(other, "other"), text="a")
    config = (dense / "config.json").read_text()
    (dense / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert name != content_key(dense, source, text="a")


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda raw: b""]
)
def test_a_damaged_entry_is_measured_anew_and_replaced(dense, windows, cache, damage):
    baseline = Baseline(ModelSource(dense, "dense"), cache)
    (walked_now,) = baseline.behind([windows])
    (path,) = cache.folder.glob(f"*{STATES}")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    (again,) = baseline.behind([windows])
    assert torch.equal(torch.cat(again.hidden), torch.cat(walked_now.hidden))
    assert path.read_bytes() == whole


def test_room_is_made_by_what_was_not_used_for_longest_and_nothing_half_written_is_seen(tmp_path):
    cache = ScoreCache(tmp_path, 3000)
    for n, name in enumerate("abc"):
        cache.keep_states(name, [torch.zeros(1, 2, 100)])
        os.utime(tmp_path / f"{name}{STATES}", (n, n))
    assert cache.states("a") is not None  # used now
    cache.keep_states("d", [torch.zeros(1, 2, 100)])
    assert cache.has_states("a") and cache.has_states("d") and not cache.has_states("b")
    cache.keep_states("huge", [torch.zeros(1, 2, 1000)])
    assert not cache.has_states("huge") and cache.has_states("d")
    with pytest.raises(RuntimeError), cache.adding() as place:
        (place / "half").write_text("x")
        raise RuntimeError
    assert not (tmp_path / "half").exists() and not list(tmp_path.glob(".new-*"))


def test_a_cache_that_cannot_be_written_is_none_at_all(dense, windows, tmp_path):
    (tmp_path / "file").write_text("")
    baseline = Baseline(ModelSource(dense, "dense"), ScoreCache(tmp_path / "file", 1 << 30))
    assert len(baseline.behind([windows])) == 1


def test_the_cache_lies_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.delenv("PAREDOWN_CACHE_GB")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ScoreCache.of_user() == ScoreCache(tmp_path / "paredown" / "scores", 2_000_000_000)
    monkeypatch.setenv("PAREDOWN_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("PAREDOWN_CACHE_GB", "0.5")
    assert ScoreCache.of_user() == ScoreCache(tmp_path / "own" / "scores", 500_000_000)
    monkeypatch.setenv("PAREDOWN_CACHE_GB", "0")
    assert ScoreCache.of_user() is None
    monkeypatch.setenv("PAREDOWN_CACHE_GB", "much")
    with pytest.raises(PareError, match="wanted a number of gigabytes"):
        ScoreCache.of_user()


def run(folder, out, windows, cache):
    job = resolve(ModelSource(folder, folder.name), Recipe.parse({"method": "wanda", "options": {"sparsity": 0.5}}))
    with CheckpointWriter(out) as writer:
        return Run(job, windows, [windows], writer, Progress(), cache=cache).run()


def test_a_second_run_takes_the_dense_text_from_the_cache_and_reports_the_same(
    dense, windows, cache, tmp_path, monkeypatch
):
    first = run(dense, tmp_path / "a", windows, cache)
    walks = []
    monkeypatch.setattr(
        "paredown.compress.run.baseline.walked", lambda source, texts, progress: walks.append(texts) or []
    )
    second = run(dense, tmp_path / "b", windows, cache)
    assert second.evaluation == first.evaluation and walks == [[]]
    assert run(dense, tmp_path / "c", windows, None).evaluation == first.evaluation


def test_a_run_that_goes_on_without_its_dense_stream_walks_that_text_apart(dense, windows, cache):
    """It was in the cache when the run began, and is not any more."""
    source = ModelSource(dense, "dense")
    job = resolve(source, Recipe.parse({"method": "wanda", "options": {"sparsity": 0.5}}), "packed")
    began = Streams.start(job, windows.ids, [windows, windows], Result(), known={0})
    assert set(began.before) == {1} and len(began.after) == 2 and "before-1" in began.named()
    now = Streams.start(job, windows.ids, [windows, windows], Result())
    assert set(now.saved(began.named())) == set(began.named()) and set(now.before) == {1}
    expected = walked(source, [windows], silent)[0]
    found = Baseline(source, cache).behind([windows, windows], {1: expected})
    assert found[1] is expected and torch.equal(torch.cat(found[0].hidden), torch.cat(expected.hidden))
