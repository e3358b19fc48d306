"""Texts: named corpora ask the hub for what the papers used, local files are read as they lie, faults say the way out."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paredown.compress.errors import PareError
from paredown.compress.text.corpora import load_corpus
from paredown.compress.text.corpus import Corpus
from paredown.compress.text.held_out import overlap

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
    with pytest.raises(PareError, match="cannot be read: line 2 is no JSON"):
        load_corpus(str(tmp_path / "broken.jsonl"), "calibration")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt", ".jsonl.gz"])
@pytest.mark.parametrize(("name", "other"), [("a[1]", "a1"), ("q?", "qx"), ("s*", "st"), ("[!x]", "y"), ("a::b", "a")])
def test_a_name_with_signs_of_a_pattern_is_read_as_it_is(name, other, suffix, tmp_path):
    for stem in (name, other):
        put(tmp_path / f"{stem}{suffix}", stem)
    assert list(load_corpus(str(tmp_path / f"{name}{suffix}"), "calibration").documents) == [name]
    (tmp_path / "in[x]").mkdir()
    put(tmp_path / "in[x]" / f"{name}{suffix}", "within")
    assert list(load_corpus(str(tmp_path / "in[x]"), "calibration").documents) == ["within"]


def put(path, *texts):
    """A file of one row a text, in the format of its name, at a time long past."""
    if path.name.endswith(".txt"):
        path.write_text("".join(texts))
    elif path.name.endswith(".parquet"):
        pq.write_table(pa.table({"text": list(texts)}), path)
    else:
        content = lines(*({"text": text} for text in texts)).encode()
        path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    os.utime(path, (1, 1))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt", ".json.gz"])
def test_a_file_replaced_by_one_of_the_same_time_and_size_is_read_anew(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    for text in ("first", "other"):
        put(path, text)
        corpus = load_corpus(str(path), "calibration")
        assert list(corpus.documents) == [text]
        assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_a_copy_of_a_hub_repository_is_read_anew_when_its_files_are_replaced(hub_folder):
    shard = Path(hub_folder) / "main/train-00000-of-00001.jsonl"
    for text in ("first", "other"):
        write(shard, lines({"text": text, "title": text}))
        os.utime(shard, (1, 1))
        assert list(load_corpus(f"{hub_folder}:main:train:text", "calibration").documents) == [text]


def test_a_copy_of_a_hub_repository_in_a_folder_that_reads_as_a_pattern_is_refused(hub_folder):
    moved = Path(hub_folder).rename(Path(hub_folder).with_name("copy[1]"))
    with pytest.raises(PareError, match="may find another folder"):
        load_corpus(str(moved), "calibration")


@pytest.mark.parametrize("kind", [1, True, ["a"], {"a": "b"}])
def test_values_of_another_kind_are_told_and_not_converted(kind, tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"text": "one"}, {"text": kind}))
    with pytest.raises(PareError, match="values in its column 'text' that are no strings"):
        load_corpus(path, "calibration")
    with pytest.raises(PareError, match="values in its column 'text' that are no strings"):
        load_corpus(f"{path}:text", "calibration")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"null\nnull\n", "row 1 is null"),
        (b'{"text": "a"}\n[1, 2]\n', r"row 2 is \[1"),
        (b"1\n", "row 1 is 1"),
        (b'{"text": "caf\xe9"}\n', "can't decode byte 0xe9"),
        (b'{"text": "a\\ud800b"}\n', "surrogates not allowed"),
        (b'{"text": "x", "deep": ' + b"[" * 5000 + b"]" * 5000 + b"}\n", "recursion"),
        (b"", "holds no text"),
        (b"\n\n", "holds no text"),
        (b'{"text": null}\n', "holds no text"),
        (b'{"text": ""}\n', "holds no text"),
        (bytes(range(256)), "cannot be read"),
    ],
)
def test_lines_that_are_no_rows_of_text_are_one_sentence(content, said, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(PareError, match=said):
        load_corpus(str(tmp_path / "a.jsonl"), "calibration")


def test_parquet_and_gzip_that_are_damaged_or_hold_no_strings_are_one_sentence(tmp_path):
    put(tmp_path / "a.parquet", "one", "two")
    put(tmp_path / "a.jsonl.gz", "one")
    for name in ("a.parquet", "a.jsonl.gz"):
        content = (tmp_path / name).read_bytes()
        for damaged in (content[:-9], b"", content[4:], b"nonsense"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(PareError, match=rf"{name} (cannot be read|holds no text)"):
                load_corpus(str(tmp_path / name), "calibration")
    datasets.Dataset.from_dict({"text": [1, 2]}).to_parquet(tmp_path / "int.parquet")
    with pytest.raises(PareError, match="no strings"):
        load_corpus(str(tmp_path / "int.parquet"), "calibration")


def test_rows_are_strings_as_they_lie_whatever_they_look_like(tmp_path):
    rows = ["2020-01-01", "1", "null", "a\u0000b", "x" * 3_000_000]
    (tmp_path / "a.jsonl").write_text(
        "".join('{"text": ' + json.dumps(r) + ', "n": ' + "9" * 5000 + "}\n" for r in rows)
    )
    assert list(load_corpus(str(tmp_path / "a.jsonl"), "calibration").documents) == rows
    for name, content in {
        "list.json": json.dumps(rows), "pretty.json": json.dumps([{"text": r} for r in rows], indent=1),
        "mark.jsonl": "\ufeff" + lines(*({"text": r} for r in rows)), "strings.jsonl": lines(*rows),
    }.items():  # fmt: skip
        assert list(load_corpus(write(tmp_path / name, content), "calibration").documents) == rows, name


@pytest.mark.parametrize(
    "name", ["x" * 5000 + ".txt", "a\0b.txt", "a\ud800.jsonl", "~no-such-user/a.txt", "", ":", "::"]
)
def test_names_that_no_file_can_have_are_one_sentence(name):
    with pytest.raises(PareError) as fault:
        load_corpus(name, "calibration")
    assert str(fault.value).encode()


def test_what_is_no_file_is_no_text(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(PareError, match="is no text to read"):
        load_corpus(str(tmp_path / "pipe.txt"), "calibration")


def test_the_former_address_gives_the_same_function():
    from paredown.compress import corpora

    assert corpora.load_corpus is load_corpus


def test_scoring_what_was_calibrated_on_is_told_wholly_or_in_part():
    documents = [LONG + str(i) for i in range(4)]
    ours = Corpus("ours", "all", [*documents, "a heading"])
    assert "both calibrates and scores" in overlap(ours, Corpus("same", "all", list(ours.documents))).told
    part = Corpus("part", "test", [documents[2], LONG + "of another kind", "a heading"])
    assert overlap(ours, part).told.startswith("1 of the 2 documents of part (test) also calibrate")
    assert overlap(ours, Corpus("other", "test", [LONG + "apart", "a heading"])) is None


def test_naming_a_corpus_does_not_import_datasets():
    seen = "import sys, paredown.compress.text.corpora; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", seen]).returncode == 0
