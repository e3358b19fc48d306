"""Surveys that are kept: runs share one, to the same bytes, where and only where they measure the same."""

import pytest
import torch

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.job import resolve_job
from paredown.compress.recipe import Recipe
from paredown.compress.run import survey_cache
from paredown.compress.run.score_cache import ScoreCache
from paredown.compress.run.survey_cache import is_kept, surveyed
from paredown.compress.survey.survey import survey

OURS = {"method": "paredown_lowrank", "options": {"kept": 0.8}}
MASKS = {"method": "wanda", "options": {"sparsity": 0.5}, "allocation": {"strategy": "owl"}}


@pytest.fixture
def measured(monkeypatch):
    """The surveys that were not found, as the jobs that asked for them."""
    asked = []

    def counting(job, *rest):
        asked.append(job)
        return survey(job, *rest)

    monkeypatch.setattr(survey_cache, "survey", counting)
    return asked


@pytest.fixture
def ask(tiny_model, windows, tmp_path, measured):
    """`ask(recipe, **options)`: its survey by the cache in `tmp_path`; and whether it was measured now."""

    def go(raw, ids=windows.ids, most=10**9, **options):
        job = resolve_job(ModelSource(tiny_model, "m"), Recipe.parse({**raw, "options": {**raw["options"], **options}}))
        scratch, before = tmp_path / f"scratch-{len(list(tmp_path.iterdir()))}", len(measured)
        scratch.mkdir()
        return surveyed(job, ids, scratch, ScoreCache(tmp_path / "scores", most)), len(measured) > before

    return go


def same(one, other, source):
    facts, losses = one.state()
    facts_too, losses_too = other.state()
    assert facts == facts_too and losses.keys() == losses_too.keys()
    assert all(torch.equal(losses[name], losses_too[name]) for name in losses)
    assert [p.name for p in one.scratch.iterdir()] and {p.name: p.read_bytes() for p in one.scratch.iterdir()} == {
        p.name: p.read_bytes() for p in other.scratch.iterdir()
    }


def test_runs_that_keep_other_shares_take_one_survey_bit_for_bit(ask, measured, windows, tmp_path):
    first, new = ask(OURS)
    again, found = ask(OURS, kept=0.7)
    assert new and not found and first.choices
    assert is_kept(measured[0], windows.ids, ScoreCache(tmp_path / "scores", 10**9))
    assert not is_kept(measured[0], windows.ids[:1], ScoreCache(tmp_path / "scores", 10**9))
    same(first, again, measured[0].source)


def test_what_the_survey_depends_on_makes_another(ask, windows, monkeypatch):
    ask(OURS)
    assert ask(OURS, damping=0.2)[1] and ask(OURS, curves="kfac")[1] and ask(OURS, ids=windows.ids.flip(0))[1]
    assert ask({**OURS, "targets": {"skip": ["lm_head", "q_proj"]}})[1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert ask(OURS)[1]


def test_fractions_share_scores_and_a_pattern_has_its_own(ask):
    ask(MASKS)
    assert not ask(MASKS, sparsity=0.6)[1]
    assert ask({**MASKS, "allocation": {"strategy": "owl", "threshold": 7.0}})[1]
    pattern = {"method": "wanda", "options": {"sparsity": "2:4", "kept": 0.7}, "allocation": {"strategy": "global"}}
    assert ask(pattern)[1] and not ask(pattern, kept=0.8)[1] and ask(pattern, sparsity="1:4")[1]


def test_what_is_damaged_incomplete_or_too_large_is_measured_anew(ask, tmp_path):
    ask(OURS, most=1000)
    assert ask(OURS)[1] and not ask(OURS)[1]
    entry = sorted((tmp_path / "surveys").glob("*.gradients-0.safetensors"))[0]
    entry.write_bytes(entry.read_bytes()[:-1] + b"x")
    whole, new = ask(OURS)
    assert new and len(list(whole.scratch.iterdir())) == 2
    entry.unlink()
    assert ask(OURS)[1] and not ask(OURS)[1]
    facts = next((tmp_path / "surveys").glob("*.survey.safetensors"))
    facts.write_bytes(b"")
    assert ask(OURS)[1]


def test_without_anything_to_measure_nothing_is_kept(ask, tmp_path):
    assert ask({"method": "wanda", "options": {"sparsity": 0.5}})[1]
    assert not (tmp_path / "surveys").exists()
