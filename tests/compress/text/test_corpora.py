"""Texts: named corpora ask the hub for what the papers used, local files are read as they lie, faults say the way out."""

import hashlib
import json
import subprocess
import sys

import datasets
import pytest

from paredown.compress.errors import PareError
from paredown.compress.text.corpora import load_corpus
from paredown.compress.text.corpus import Corpus, overlap

LONG = "a document that is long enough to be told from a heading or a blank row, number "


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: remembers what was asked for and gives `data`, or else `rows`."""

    class Hub:
        asked = None
        data = None
        rows = {"text": ["one", "", "two"]}

        def load_dataset(self, path, name=None, **options):
            self.asked = {"path": path, "name": name, **options}
            return self.data or datasets.Dataset.from_dict(self.rows)

    stand_in = Hub()
    monkeypatch.setattr(datasets, "load_dataset", stand_in.load_dataset)
    return stand_in


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("role", "split", "joined"), [("calibration", "train", "one  two"), ("evaluation", "test", "one\n\n\n\ntwo")]
)
def test_wikitext2_keeps_its_empty_rows_and_joins_as_sparsegpt_does(hub, role, split, joined):
    corpus = load_corpus("wikitext2", role)
    assert hub.asked == {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": split}
    assert (corpus.text, corpus.split, corpus.pooled) == (joined, split, True)


def test_c4_calibrates_on_one_shard_and_scores_the_first_1100_documents_in_at_most_256_windows(hub):
    hub.rows = {"text": [str(i) for i in range(1200)], "url": ["u"] * 1200}
    drawn = load_corpus("c4", "calibration")
    assert hub.asked == {
        "path": "allenai/c4",
        "name": None,
        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
        "split": "train",
    }
    assert (len(drawn.documents), drawn.max_windows, drawn.pooled) == (1200, None, False)
    scored = load_corpus("c4", "evaluation")
    assert hub.asked == {
        "path": "allenai/c4",
        "name": None,
        "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
        "split": "validation",
    }
    assert scored.text == " ".join(str(i) for i in range(1100))
    assert scored.max_windows == 256


@pytest.mark.parametrize(("role", "split"), [("calibration", "train"), ("evaluation", "test")])
def test_ptb_asks_for_the_parquet_branch_because_its_script_no_longer_loads(hub, role, split):
    hub.rows = {"sentence": ["no it was", "n't black monday"]}
    corpus = load_corpus("ptb", role)
    assert hub.asked == {
        "path": "ptb-text-only/ptb_text_only",
        "name": None,
        "data_files": {split: f"penn_treebank/{split}/*.parquet"},
        "revision": "refs/convert/parquet",
        "split": split,
    }
    assert corpus.text == "no it was n't black monday"


def test_stdlib_gives_different_text_to_each_role_and_names_its_python():
    drawn, scored = load_corpus("stdlib", "calibration"), load_corpus("stdlib", "evaluation")
    assert not set(drawn.documents) & set(scored.documents)
    assert drawn.revision == "Python " + sys.version.split()[0]
    assert overlap(drawn, scored) is None


def test_the_digest_and_the_length_are_those_of_the_joined_text():
    corpus = Corpus("c", "all", ["één", "", "two"], joiner=" ")
    assert corpus.text == "één  two"
    assert corpus.sha256 == hashlib.sha256("één  two".encode()).hexdigest()
    assert corpus.characters == len(corpus.text)


def test_a_txt_file_is_one_document_read_whole(tmp_path):
    corpus = load_corpus(write(tmp_path / "a.txt", "one\n\ntwo — three\n"), "calibration")
    assert corpus.documents == ["one\n\ntwo — three\n"]
    assert (corpus.name, corpus.split) == ("a.txt", "all")


def test_jsonl_json_and_parquet_give_one_document_a_row(tmp_path):
    rows = [{"text": "one", "n": 1}, {"text": None, "n": 2}, {"text": "three", "n": 3}]
    write(tmp_path / "a.jsonl", lines(*rows))
    write(tmp_path / "b.json", json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json", "c.parquet"):
        documents = load_corpus(str(tmp_path / name), "evaluation").documents
        assert list(documents) == ["one", "", "three"], name
        assert (documents[2], documents[1:], len(documents)) == ("three", ["", "three"], 3)


def test_a_folder_is_read_recursively_in_sorted_order_and_hidden_files_are_left_alone(tmp_path):
    write(tmp_path / "f/b.txt", "b")
    write(tmp_path / "f/a/z.jsonl", lines({"text": "z1"}, {"text": "z2"}))
    write(tmp_path / "f/c.txt", "c")
    write(tmp_path / "f/.git/x.txt", "hidden")
    write(tmp_path / "f/notes.md", "not text of ours")
    assert list(load_corpus(str(tmp_path / "f"), "calibration").documents) == ["z1", "z2", "b", "c"]


def test_the_only_column_of_strings_is_taken_and_another_can_be_named(tmp_path):
    one = write(tmp_path / "one.jsonl", lines({"body": "x", "n": 1}))
    two = write(tmp_path / "two.jsonl", lines({"body": "x", "title": "t"}))
    assert list(load_corpus(one, "calibration").documents) == ["x"]
    assert list(load_corpus(f"{two}:title", "calibration").documents) == ["t"]
    with pytest.raises(PareError, match=r"body, title.*two.jsonl:column"):
        load_corpus(two, "calibration")
    with pytest.raises(PareError, match="Did you mean 'title'"):
        load_corpus(f"{two}:titel", "calibration")


@pytest.fixture
def hub_folder(tmp_path):
    """A copy of a hub repository: a card with two configurations, the first of them with three splits."""
    files = {name: f"{name}-*" for name in ("train", "validation", "test")}
    listed = "".join(f"  - split: {split}\n    path: main/{pattern}\n" for split, pattern in files.items())
    write(
        tmp_path / "copy/README.md",
        f"---\nconfigs:\n- config_name: main\n  default: true\n  data_files:\n{listed}"
        "- config_name: other\n  data_files: other.jsonl\n---\n# A data set\n",
    )
    for split in files:
        write(tmp_path / f"copy/main/{split}-00000-of-00001.jsonl", lines({"text": split, "title": "of " + split}))
    write(tmp_path / "copy/other.jsonl", lines({"text": "other"}))
    return str(tmp_path / "copy")


def test_a_copy_of_a_hub_repository_gives_train_to_calibrate_and_test_to_score(hub_folder):
    assert list(load_corpus(hub_folder, "calibration").documents) == ["train"]
    assert list(load_corpus(hub_folder, "evaluation").documents) == ["test"]
    assert list(load_corpus(f"{hub_folder}:main:validation", "evaluation").documents) == ["validation"]
    assert list(load_corpus(f"{hub_folder}:main:train[:1]:title", "evaluation").documents) == ["of train"]


def test_train_is_never_scored_unless_it_is_named(hub_folder):
    with pytest.raises(PareError, match=r"no split test or validation for evaluation; it has train.*:other:train"):
        load_corpus(f"{hub_folder}:other", "evaluation")
    assert list(load_corpus(f"{hub_folder}:other:train", "evaluation").documents) == ["other"]


def test_a_hub_name_is_passed_on_part_by_part(hub):
    hub.rows = {"story": ["s"], "title": ["t"]}
    corpus = load_corpus("org/name:v2:train[:5%]:story", "evaluation")
    assert hub.asked == {"path": "org/name", "name": "v2", "split": "train[:5%]"}
    assert (corpus.name, corpus.split, list(corpus.documents)) == ("org/name", "train[:5%]", ["s"])


@pytest.mark.parametrize("spec", ["wikitext2", "c4", "ptb", "org/name", "org/name:config:train"])
@pytest.mark.parametrize(
    ("role", "key"), [("calibration", "calibration.source"), ("evaluation", "evaluate.perplexity")]
)
def test_without_a_network_the_error_says_how_to_name_a_file(spec, role, key):
    with pytest.raises(PareError, match=rf"{spec} cannot be loaded: .*--set '?{key}=.*text\.txt"):
        load_corpus(spec, role)


def test_the_commit_of_a_hub_data_set_is_read_from_its_cache(hub, tmp_path):
    assert load_corpus("org/name:config:train", "calibration").revision is None
    cached = tmp_path / "cache/org___name/default/0.0.0" / ("b0" * 20)
    datasets.Dataset.from_dict(hub.rows).save_to_disk(cached)
    hub.data = datasets.load_from_disk(cached)
    corpus = load_corpus("org/name:config:train", "calibration")
    assert (corpus.revision, list(corpus.documents)) == ("b0" * 20, ["one", "", "two"])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("wikitext", "Did you mean 'wikitext2'"),
        ("nonsense", "stdlib, wikitext2"),
        ("a/b:c:d:e:f", "unknown text"),
        ("./missing.txt", "does not exist"),
        ("missing.jsonl", "does not exist"),
        ("C:\\missing.jsonl:body", "does not exist"),  # the colon of a drive is not one between two parts
    ],
)
def test_what_cannot_be_found_is_an_error_that_lists_what_could_be(spec, said):
    with pytest.raises(PareError, match=said):
        load_corpus(spec, "calibration")


def test_files_that_hold_no_text_are_errors(tmp_path):
    with pytest.raises(PareError, match="holds no text"):
        load_corpus(write(tmp_path / "blank.txt", " \n\n"), "calibration")
    with pytest.raises(PareError, match="is no text to read"):
        load_corpus(write(tmp_path / "table.csv", "a,b"), "calibration")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PareError, match="is no text to read"):
        load_corpus(str(tmp_path / "empty"), "calibration")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(PareError, match="byte 3 is 0xe9"):
        load_corpus(str(tmp_path / "latin.txt"), "calibration")
    with pytest.raises(PareError, match="has no columns"):
        load_corpus(write(tmp_path / "a.txt", "text") + ":body", "calibration")
    write(tmp_path / "broken.jsonl", '{"text": "x"}\n{"text": ')
    with pytest.raises(PareError, match="cannot be loaded"):
        load_corpus(str(tmp_path / "broken.jsonl"), "calibration")


def test_scoring_what_was_calibrated_on_is_told_wholly_or_in_part():
    documents = [LONG + str(i) for i in range(4)]
    ours = Corpus("ours", "all", [*documents, "a heading"])
    assert "both calibrates and scores" in overlap(ours, Corpus("same", "all", list(ours.documents)))
    part = Corpus("part", "test", [documents[2], LONG + "of another kind", "a heading"])
    assert overlap(ours, part).startswith("1 of the 2 documents of part (test) also calibrate")
    assert overlap(ours, Corpus("other", "test", [LONG + "apart", "a heading"])) is None


def test_naming_a_corpus_does_not_import_datasets():
    seen = "import sys, paredown.compress.text.corpora; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", seen]).returncode == 0
