"""Text: the standard library's splits, named corpora by the field's protocol, files, windows, and losses."""

import json

import datasets
import pytest
import torch

from paredown.compress.errors import PareError
from paredown.compress.numerics.perplexity import paired_delta, perplexity, token_nll
from paredown.compress.text import corpora, stdlib_text
from paredown.compress.text.corpora import load_corpus
from paredown.compress.text.corpus import Corpus
from paredown.compress.text.held_out import overlap
from paredown.compress.text.windows import calibration_windows, evaluation_windows


def test_the_splits_of_the_standard_library_share_no_package():
    families = {
        s: {stdlib_text.family_of(d.module.split(".")[0]) for d in stdlib_text.documents(s)} for s in stdlib_text.SPLITS
    }
    assert not families["train"] & families["evaluation"] and not families["train"] & families["calibration"]
    assert not families["calibration"] & families["evaluation"]


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_held_out_text_is_large_and_is_there_in_every_distribution(split):
    documents = stdlib_text.documents(split)
    parts = {part for d in documents for part in d.module.split(".")}
    assert not parts & {"test", "tests", "idlelib", "tkinter", "lib2to3", "distutils"}
    assert sum(len(d.text) for d in documents) > 500_000 and stdlib_text.text(split) == stdlib_text.text(split)


def test_an_unknown_split_is_named():
    with pytest.raises(PareError, match="Did you mean 'train'"):
        stdlib_text.documents("trian")


@pytest.mark.parametrize(
    ("name", "role", "args", "options", "joined"),
    [
        ("wikitext2", "evaluation", ("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"}, "a\n\nb"),
        ("wikitext2", "calibration", ("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"}, "a b"),
        ("ptb", "evaluation", ("ptb-text-only/ptb_text_only", None), {"split": "test", "data_files": {"test": "penn_treebank/test/*.parquet"}, "revision": "refs/convert/parquet"}, "a b"),
        ("c4", "calibration", ("allenai/c4", None), {"split": "train", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}, "a b"),
        ("c4", "evaluation", ("allenai/c4", None), {"split": "validation", "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}}, "a b"),
        ("org/name:conf:dev:body", "evaluation", ("org/name", "conf"), {"split": "dev"}, "a\n\nb"),
    ],
)  # fmt: skip
def test_named_corpora_follow_the_protocol(name, role, args, options, joined, monkeypatch):
    asked = []
    column = {"ptb": "sentence", "org/name:conf:dev:body": "body"}.get(name, "text")

    def fake(*given, **more):
        asked.append((given, more))
        return datasets.Dataset.from_dict({column: ["a", "b"], "other": ["c", "d"]})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    corpus = load_corpus(name, role)
    assert asked == [(args, options)] and corpus.text == joined
    assert (corpus.max_windows == 256) == (name == "c4" and role == "evaluation")


def test_files_and_folders_are_read_through_datasets(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three", "id": 1}\n{"text": "four", "id": 2}\n')
    datasets.Dataset.from_dict({"content": ["five"]}).to_parquet(tmp_path / "c.parquet")
    assert list(load_corpus(str(tmp_path), "evaluation").documents) == ["one\n\ntwo", "three", "four", "five"]
    (tmp_path / "d.jsonl").write_text('{"x": "three", "y": "z"}\n')
    with pytest.raises(PareError, match="Columns: x, y"):
        load_corpus(str(tmp_path / "d.jsonl"), "evaluation")
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(PareError, match="holds no text"):
        load_corpus(str(tmp_path / "empty.txt"), "evaluation")


def test_scoring_on_the_calibration_text_is_told():
    one = Corpus("words", "all", ["a", "b"])
    assert (
        "flattered" in overlap(one, Corpus("same", "all", ["a\n\nb"])).told
        and overlap(one, Corpus("x", "all", ["c"])) is None
    )


def test_calibration_windows_are_seeded_capped_and_from_the_text(tokenizer):
    corpus = Corpus("words", "train", ["".join(chr(97 + (i * 7 + d) % 26) for i in range(300)) for d in range(9)])
    windows = calibration_windows(corpus, tokenizer, 5, 2048, 3, 50)
    again = calibration_windows(corpus, tokenizer, 5, 2048, 3, 50)
    assert torch.equal(windows.ids, again.ids) and windows.ids.shape == (5, 50)
    assert windows.capped_from == 2048 and windows.sampling == "documents" and windows.provenance()["seed"] == 3
    assert not torch.equal(windows.ids, calibration_windows(corpus, tokenizer, 5, 2048, 4, 50).ids)
    assert all(any(tokenizer.decode(row) in d for d in corpus.documents) for row in windows.ids)
    joined = calibration_windows(corpus, tokenizer, 4, 1000, 0, 1000)
    assert joined.sampling == "joined" and all(tokenizer.decode(row) in corpus.text for row in joined.ids)


def test_text_that_is_too_short_says_what_to_type(tokenizer):
    corpus = Corpus("words", "train", ["a" * 100])
    with pytest.raises(PareError, match=r"has 100 tokens, and a window needs 201.*--set calibration.length=50"):
        calibration_windows(corpus, tokenizer, 1, 200, 0, 200)
    with pytest.raises(PareError, match=r"--set calibration.sequences=2"):
        calibration_windows(corpus, tokenizer, 500, 50, 0, 50)
    with pytest.raises(PareError, match=r"--set evaluate.length=50"):
        evaluation_windows(corpus, tokenizer, 200, 200)


def test_evaluation_windows_are_cut_in_order_and_the_tail_is_dropped(tokenizer):
    corpus = Corpus("words", "test", ["abcdefghij", "klm"])
    windows = evaluation_windows(corpus, tokenizer, 4, 99)
    assert [tokenizer.decode(row) for row in windows.ids] == ["abcd", "efgh", "ij\n\n"]
    assert evaluation_windows(corpus, tokenizer, 4, 99, limit=2).tokens == 8
    assert windows.sha256 == corpus.sha256 and json.dumps(windows.provenance())


def test_losses_and_perplexity_are_what_they_say():
    logits, ids = torch.randn(3, 9, 11).bfloat16(), torch.randint(11, (3, 9))
    wanted = -logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    nll = token_nll(logits, ids)
    torch.testing.assert_close(nll, wanted, rtol=1e-5, atol=1e-5)
    figure = perplexity(nll)
    assert figure["token_perplexity"] == pytest.approx(float(wanted.double().mean().exp()), rel=1e-5)
    with pytest.raises(PareError, match="not finite"):
        token_nll(torch.full((1, 3, 4), float("nan")), torch.zeros(1, 3, dtype=torch.long))


def test_errors_are_those_of_resampled_windows_and_differences_are_paired():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(400, 8, generator=generator) + torch.randn(400, 1, generator=generator)
    error = perplexity(before)["stderr"] / perplexity(before)["token_perplexity"]
    assert error == pytest.approx(float(before.mean(1).std() / 20), rel=0.15)
    same, shifted = paired_delta(before, before), paired_delta(before, before + 0.25)
    assert same["log_ratio"] == same["stderr"] == 0
    assert shifted["log_ratio"] == pytest.approx(0.25, abs=1e-6) and shifted["stderr"] < 1e-6
    noisy = paired_delta(before, before + 0.1 * torch.randn(400, 8, generator=generator))
    assert noisy["low"] < noisy["log_ratio"] < noisy["high"] and noisy["stderr"] < 0.01


def test_chunks_of_tokens_change_nothing():
    logits, ids = torch.randn(2, 9, 11), torch.randint(11, (2, 9))
    whole = token_nll(logits, ids)
    torch.testing.assert_close(token_nll(logits, ids, chunk_bytes=4 * 11 * 3), whole)


def test_named_corpora_are_all_listed_in_the_message():
    with pytest.raises(PareError, match="stdlib, wikitext2, ptb, c4"):
        load_corpus("nothing", "evaluation")
    assert set(corpora.NAMED) == {"wikitext2", "ptb", "c4"}
