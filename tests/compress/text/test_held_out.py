"""What calibrates is not scored: how one text is divided, and what two texts share."""

import random

import datasets
import pytest
import torch

from paredown.compress.text.corpus import Corpus, Rows
from paredown.compress.text.held_out import CHUNK, divided, overlap, shared_windows


def lines(count, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choice("abcdefgh ") for _ in range(20)) for _ in range(count)]


@pytest.mark.parametrize("documents", [1, 3, 40, 150, 1000])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_text_is_divided_without_loss_and_its_last_tenth_is_scored(documents, on_disk):
    texts = ["\n".join(lines(60_000 // 21 // documents, seed)) for seed in range(documents)]
    rows = Rows(datasets.Dataset.from_dict({"text": texts}), "text") if on_disk else texts
    whole = Corpus("ours", "all", rows)
    calibrating, scored = divided(whole)
    joiner = whole.joiner if documents >= 100 else ""
    assert calibrating.text + joiner + scored.text == whole.text
    assert 0.88 < calibrating.characters / whole.characters <= 0.9
    assert (calibrating.split, scored.split) == ("all but the last tenth", "last tenth")
    assert calibrating.whole == scored.whole == whole.sha256 and scored.title == "ours (last tenth)"
    assert overlap(calibrating, scored) is None


def test_a_text_of_one_line_is_divided_at_a_space_and_a_split_keeps_its_name():
    calibrating, scored = divided(Corpus("ours", "train", [" ".join("word" for _ in range(100))]))
    assert (
        calibrating.text.endswith("word ") and scored.text.startswith("word") and len(scored.text.split()) in (10, 11)
    )
    assert scored.split == "train, last tenth"


def test_shared_windows_counts_the_scored_passages_that_calibrate():
    generator = torch.Generator().manual_seed(0)
    scored = torch.randint(1000, (10, 4 * CHUNK), generator=generator)
    calibration = torch.randint(1000, (6, 3 * CHUNK + 5), generator=generator)
    assert shared_windows(calibration, scored) == 0
    calibration[2, 7 : 7 + CHUNK] = scored[3, CHUNK : 2 * CHUNK]  # at another place of the window
    calibration[4, : CHUNK - 1] = scored[5, : CHUNK - 1]  # one token too few
    assert shared_windows(calibration, scored) == pytest.approx(1 / 40)
    assert shared_windows(calibration[:, : CHUNK - 1], scored) == 0


def test_common_phrases_are_no_overlap_and_a_part_of_a_text_is():
    one, other = Corpus("one", "all", ["a"]), Corpus("other", "all", ["b"])
    assert overlap(one, other, 0.002) is None
    assert overlap(one, other, 0.05).much and "5.0% of what is scored of other" in overlap(one, other, 0.05).told
    many = [f"{line} {line} {line} {line}" for line in lines(200)]
    few = overlap(Corpus("ours", "train", many[:1]), Corpus("theirs", "test", many))
    assert not few.much and few.told.startswith("1 of the 200 documents of theirs (test) also calibrate")
    assert overlap(Corpus("ours", "train", many[:5]), Corpus("theirs", "test", many)).much
