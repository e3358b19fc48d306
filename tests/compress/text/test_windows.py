"""Windows: they lie in the text where they say, the same seed draws the same, and a short text is an error with numbers."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from paredown.compress.errors import PareError
from paredown.compress.text.corpus import Corpus
from paredown.compress.text.windows import ReadSizes, calibration_windows, evaluation_windows, special_prefix

BOS, EOS, MASK = 256, 257, 258
SPECIAL = {"<s>": BOS, "</s>": EOS, "[gMASK]": MASK}
FAR = 10**6


def byte_tokenizer(before="", after="", limit=64):
    """One token a byte, so that every position of a text can be checked by eye; `limit` is its pretended model's window.

    `before` and `after` are special tokens that it adds to each text.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={**{letter: i for i, letter in enumerate(letters)}, **SPECIAL}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if before or after:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=list(SPECIAL.items())
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", model_max_length=limit)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def words(count, seed=0):
    draw = random.Random(seed)
    return "".join(draw.choice("abcdefgh ij\n") for _ in range(count))


def corpus_of(*documents, **fields):
    return Corpus("ours", "all", list(documents), **fields)


def test_each_window_lies_within_a_document_of_its_own_where_enough_are_long_enough(tokenizer):
    documents = [words(100 + i, seed=i) for i in range(20)] + ["short"] * 30
    drawn = calibration_windows(corpus_of(*documents), tokenizer, 16, 40, seed=1, max_length=FAR)
    assert drawn.ids.shape == (16, 40) and drawn.ids.dtype == torch.int64
    homes = [[i for i, document in enumerate(documents) if tokenizer.decode(row) in document] for row in drawn.ids]
    assert all(homes) and len({home[0] for home in homes}) == 16
    assert drawn.provenance()["sampling"] == "documents"


def test_windows_come_from_the_joined_text_where_too_few_documents_are_long_enough(tokenizer):
    corpus = corpus_of(*[words(30, seed=i) for i in range(40)], joiner=" ")
    drawn = calibration_windows(corpus, tokenizer, 16, 40, seed=1, max_length=FAR)
    assert all(tokenizer.decode(row) in corpus.text for row in drawn.ids)
    told = drawn.provenance()
    assert (told["sampling"], told["text_tokens"], told["tokens"]) == ("joined", 40 * 31 - 1, 640)


def test_a_pooled_corpus_is_joined_even_where_its_documents_are_long(tokenizer):
    corpus = corpus_of(*[words(200, seed=i) for i in range(20)], pooled=True)
    assert calibration_windows(corpus, tokenizer, 4, 40, seed=0, max_length=FAR).sampling == "joined"


@pytest.mark.parametrize("pooled", [False, True])
def test_the_seed_decides_the_windows(tokenizer, pooled):
    corpus = corpus_of(*[words(200, seed=i) for i in range(20)], pooled=pooled)
    drawn = [calibration_windows(corpus, tokenizer, 8, 40, seed=seed, max_length=FAR).ids for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_no_more_documents_are_tokenised_than_are_needed(tokenizer):
    calls = []

    def counting(text, **options):
        calls.append(text)
        return tokenizer(text, **options)

    corpus = corpus_of(*[words(200, seed=i) for i in range(500)])
    calibration_windows(corpus, counting, 4, 40, seed=0, max_length=FAR)
    assert sum(len(text) > 1 for text in calls) == 4


def test_windows_of_a_huge_document_come_from_an_excerpt_of_it(tokenizer):
    sizes = ReadSizes(piece=500, per_token=4)
    documents = [words(5000, seed=i) for i in range(8)]
    longest = []

    def watching(text, **options):
        longest.append(len(text))
        return tokenizer(text, **options)

    drawn = calibration_windows(corpus_of(*documents), watching, 8, 40, seed=0, max_length=FAR, sizes=sizes)
    assert drawn.sampling == "documents" and max(longest) == 500
    places = [next(d.find(tokenizer.decode(row)) for d in documents if tokenizer.decode(row) in d) for row in drawn.ids]
    assert max(places) > 2500


def test_a_text_too_long_to_be_tokenised_gives_one_window_of_each_of_its_stretches(tokenizer):
    sizes = ReadSizes(one_call=1000, per_token=4)
    corpus = corpus_of(*[words(37, seed=i) for i in range(200)], joiner="\n\n")
    longest = []

    def watching(text, **options):
        longest.append(len(text))
        return tokenizer(text, **options)

    drawn = calibration_windows(corpus, watching, 10, 40, seed=0, max_length=FAR, sizes=sizes)
    assert drawn.sampling == "joined" and drawn.text_tokens is None and max(longest) <= 160
    stretch = corpus.characters / 10
    assert [int(corpus.text.find(tokenizer.decode(row)) // stretch) for row in drawn.ids] == list(range(10))


def test_a_slice_of_the_joined_text_is_read_without_joining_it():
    corpus = corpus_of("abc", "", "defg", "h", joiner="--")
    assert list(corpus.ends) == [5, 7, 13, 16]
    for start in range(corpus.characters):
        for stop in range(start, corpus.characters + 1):
            assert corpus.excerpt(start, stop) == corpus.text[start:stop]


def test_the_length_is_capped_by_what_the_model_allows_and_says_so(tokenizer):
    corpus = corpus_of(words(4000))
    drawn = calibration_windows(corpus, tokenizer, 4, 2048, seed=0, max_length=64)
    scored = evaluation_windows(corpus, tokenizer, 2048, max_length=64)
    assert (drawn.length, drawn.provenance()["capped_from"]) == (64, 2048)
    assert (scored.length, scored.provenance()["capped_from"]) == (64, 2048)
    assert "capped_from" not in evaluation_windows(corpus, tokenizer, 64, max_length=64).provenance()


@pytest.mark.parametrize(("sequences", "length"), [(128, 64), (4, 512), (300, 300)])
def test_a_text_too_short_to_calibrate_on_names_what_it_has_and_what_it_needs_and_its_advice_works(
    tokenizer, sequences, length
):
    corpus = corpus_of(words(300))
    with pytest.raises(PareError, match="has 300 tokens, and ") as fault:
        calibration_windows(corpus, tokenizer, sequences, length, seed=0, max_length=FAR)
    advice = dict(part.split()[0].split("=") for part in str(fault.value).split("--set calibration.")[1:])
    assert advice
    for key, value in advice.items():
        changed = {"sequences": sequences, "length": length, key.strip(): int(value.rstrip(",."))}
        drawn = calibration_windows(corpus, tokenizer, **changed, seed=0, max_length=FAR)
        assert drawn.ids.shape == (changed["sequences"], changed["length"])


def test_a_text_without_a_window_in_it_gets_no_advice_that_fails(tokenizer):
    with pytest.raises(PareError, match=r"has 1 tokens.*Name a longer text\.$"):
        calibration_windows(corpus_of("x"), tokenizer, 128, 64, seed=0, max_length=FAR)
    with pytest.raises(PareError, match=r"has 1 tokens.*Name a longer text\.$"):
        evaluation_windows(corpus_of("x"), tokenizer, 64, FAR)


def test_evaluation_cuts_the_whole_text_in_order_and_drops_the_tail(tokenizer):
    corpus = corpus_of(words(100), words(99, seed=1), joiner=" ")
    scored = evaluation_windows(corpus, tokenizer, 64, FAR)
    assert scored.ids.flatten().tolist() == tokenizer(corpus.text)["input_ids"][:192]
    told = scored.provenance()
    assert (told["sequences"], told["tokens"], told["text_tokens"]) == (3, 192, 200)
    assert "seed" not in told and "pieces" not in told


def test_a_limit_keeps_the_first_windows_and_so_does_the_protocol(tokenizer):
    corpus = corpus_of(*[words(50, seed=i) for i in range(40)])
    whole = evaluation_windows(corpus, tokenizer, 16, FAR).ids
    assert torch.equal(evaluation_windows(corpus, tokenizer, 16, FAR, limit=3).ids, whole[:3])
    capped = corpus_of(*corpus.documents, max_windows=5)
    assert torch.equal(evaluation_windows(capped, tokenizer, 16, FAR).ids, whole[:5])
    assert torch.equal(evaluation_windows(capped, tokenizer, 16, FAR, limit=3).ids, whole[:3])
    assert torch.equal(evaluation_windows(corpus, tokenizer, 16, FAR, limit=10**6).ids, whole)


def test_a_text_shorter_than_one_window_is_an_error_that_names_the_length_to_set(tokenizer):
    with pytest.raises(PareError, match=r"has 30 tokens, fewer than one window of 64.*--set evaluate.length=15"):
        evaluation_windows(corpus_of(words(30)), tokenizer, 64, FAR)
    assert evaluation_windows(corpus_of(words(30)), tokenizer, 15, FAR).ids.shape == (2, 15)


def test_a_very_long_text_tokenised_in_pieces_gives_the_tokens_of_the_whole():
    tokenizer = byte_tokenizer("<s>")
    # an accent is two bytes, so there are more tokens than characters
    corpus = corpus_of(*[words(45, seed=i).replace("a", "é") for i in range(60)])
    once = evaluation_windows(corpus, tokenizer, 64, FAR)
    sizes = ReadSizes(one_call=1000, piece=300)
    cut = evaluation_windows(corpus, tokenizer, 64, FAR, sizes=sizes)
    assert torch.equal(cut.ids, once.ids)
    assert cut.provenance()["pieces"] >= 9 and cut.text_tokens == once.text_tokens
    some = evaluation_windows(corpus, tokenizer, 64, FAR, limit=8, sizes=sizes)
    assert torch.equal(some.ids, once.ids[:8])
    assert some.provenance()["pieces"] == 2 and some.text_tokens is None


def test_pieces_are_cut_where_a_line_begins_and_make_up_the_text():
    corpus = corpus_of("one line\n    and one set in\nand a third\n\nand more", words(300), "x" * 120, "")
    pieces = list(corpus.pieces(corpus.characters, 50))
    assert "".join(pieces) == corpus.text
    assert pieces[0] == "one line\n    and one set in\nand a third\n\n"
    assert "".join(corpus.pieces(333, 50)) == corpus.text[:333]


def test_a_tokenizer_tells_which_tokens_it_puts_before_a_text():
    assert special_prefix(byte_tokenizer()) == special_prefix(byte_tokenizer(after="</s>")) == ()
    assert special_prefix(byte_tokenizer("<s>")) == special_prefix(byte_tokenizer("<s>", "</s>")) == (BOS,)
    assert special_prefix(byte_tokenizer("[gMASK] <s>")) == (MASK, BOS)


@pytest.mark.parametrize(
    ("before", "after", "opening"), [("<s>", "", [BOS]), ("<s>", "</s>", [BOS]), ("[gMASK] <s>", "", [MASK, BOS])]
)
def test_every_window_begins_with_the_bos_that_counts_within_its_length(before, after, opening):
    corpus, tokenizer, plain = corpus_of(words(645)), byte_tokenizer(before, after), byte_tokenizer()
    scored = evaluation_windows(corpus, tokenizer, 64, FAR)
    text = 64 - len(opening)
    assert scored.ids.shape == (645 // text, 64) and scored.bos == "every window" and scored.text_tokens == 645
    assert scored.ids[:, : len(opening)].tolist() == [opening] * len(scored.ids)
    assert torch.equal(scored.ids[:, len(opening) :], evaluation_windows(corpus, plain, text, FAR).ids)
    losses = torch.arange(63).expand(len(scored.ids), 63)  # of targets 1 to 63
    assert scored.of_text(losses)[0].tolist() == list(range(len(opening) - 1, 63))
    limited = evaluation_windows(corpus, tokenizer, 64, FAR, limit=3)
    assert torch.equal(limited.ids, scored.ids[:3])


@pytest.mark.parametrize("after", ["", "</s>"])
@pytest.mark.parametrize(
    "corpus",
    [
        corpus_of(*[words(100, seed=i) for i in range(20)]),
        corpus_of(*[words(30, seed=i) for i in range(60)], pooled=True),
        corpus_of(*[words(37, seed=i) for i in range(200)]),
    ],
    ids=["documents", "joined", "stretches"],
)
def test_calibration_draws_the_same_text_behind_a_bos_as_without_one(corpus, after):
    sizes = ReadSizes(one_call=2000, per_token=4)
    drawn, plain = (
        calibration_windows(corpus, tokenizer, 8, length, seed=1, max_length=FAR, sizes=sizes)
        for tokenizer, length in ((byte_tokenizer("<s>", after), 40), (byte_tokenizer(), 39))
    )
    assert drawn.ids.shape == (8, 40) and (drawn.bos, plain.bos) == ("every window", "none")
    assert drawn.ids[:, 0].tolist() == [BOS] * 8
    assert torch.equal(drawn.ids[:, 1:], plain.ids) and drawn.sampling == plain.sampling


def test_the_papers_protocol_has_one_bos_before_the_whole_text():
    corpus, tokenizer = corpus_of(words(640)), byte_tokenizer("<s>", "</s>")
    scored = evaluation_windows(corpus, tokenizer, 64, FAR, bos="none")
    assert scored.ids.flatten().tolist() == tokenizer(corpus.text)["input_ids"][:640]
    assert (scored.ids == BOS).nonzero().tolist() == [[0, 0]]
    assert scored.bos == "first window only"


def test_without_a_bos_in_the_tokenizer_the_rule_changes_nothing():
    corpus, tokenizer = corpus_of(*[words(200, seed=i) for i in range(9)]), byte_tokenizer()
    for read in (
        lambda bos: evaluation_windows(corpus, tokenizer, 64, FAR, bos=bos),
        lambda bos: calibration_windows(corpus, tokenizer, 4, 40, seed=0, max_length=FAR, bos=bos),
    ):
        auto, none = read("auto"), read("none")
        assert torch.equal(auto.ids, none.ids) and auto.bos == none.bos == "none"
        assert auto.of_text(torch.ones(3, 5)).shape == (3, 5)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_papers_bos_rule_of_calibration_counts_the_windows_that_begin_with_it(pooled):
    tokenizer = byte_tokenizer("<s>")
    corpus = corpus_of(*[words(12, seed=i) for i in range(60)], pooled=pooled)
    drawn = calibration_windows(corpus, tokenizer, 40, 8, seed=0, max_length=FAR, bos="none")
    begun = int((drawn.ids == BOS).sum())
    assert begun == int((drawn.ids[:, 0] == BOS).sum())
    assert drawn.bos == (f"first of {begun} of 40 windows" if begun else "none")
    assert pooled or begun


@pytest.mark.parametrize("count", [1, 2, 30])
def test_the_advice_for_a_short_text_counts_the_bos(count):
    corpus, tokenizer = corpus_of(words(count)), byte_tokenizer("<s>")
    with pytest.raises(PareError, match=f"has {count} tokens") as fault:
        evaluation_windows(corpus, tokenizer, 64, FAR)
    length = int(str(fault.value).rpartition("=")[2])
    assert evaluation_windows(corpus, tokenizer, length, FAR).length == length
    with pytest.raises(PareError, match=f"has {count} tokens") as fault:
        calibration_windows(corpus, tokenizer, 1, 64, 0, FAR)
    if count > 1:
        length = int(str(fault.value).rpartition("calibration.length=")[2].split()[0])
        assert calibration_windows(corpus, tokenizer, 1, length, 0, FAR).length == length


def test_a_window_holds_a_token_of_text_beside_what_opens_it():
    corpus, tokenizer = corpus_of(words(99)), byte_tokenizer("[gMASK] <s>")
    with pytest.raises(PareError, match=r"at least 3 tokens.*--set evaluate.length=2048"):
        evaluation_windows(corpus, tokenizer, 2, FAR)
    assert evaluation_windows(corpus, tokenizer, 3, FAR).ids.shape == (99, 3)


def test_a_text_longer_than_the_models_window_brings_no_warning(caplog, capsys):
    corpus = corpus_of(words(4000))
    calibration_windows(corpus, byte_tokenizer(limit=8), 4, 64, seed=0, max_length=FAR)
    evaluation_windows(corpus, byte_tokenizer(limit=8), 64, FAR)
    assert "longer than" not in caplog.text + "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sequences": 0}, "calibration.sequences=128"),
        ({"length": 1}, "calibration.length is 1"),
        ({"max_length": 1}, "the model allows 1"),
    ],
)
def test_impossible_windows_are_refused(tokenizer, changed, said):
    given = {"sequences": 4, "length": 64, "seed": 0, "max_length": FAR} | changed
    with pytest.raises(PareError, match=said):
        calibration_windows(corpus_of(words(1000)), tokenizer, **given)


def test_scoring_no_window_is_refused(tokenizer):
    with pytest.raises(PareError, match=r"evaluate\.windows=1"):
        evaluation_windows(corpus_of(words(1000)), tokenizer, 64, FAR, limit=0)
