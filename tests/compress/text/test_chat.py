"""Conversations: found by what a column holds, written by the model's own template, with one BOS and no more."""

import json
from copy import deepcopy

import datasets
import pytest
from tokenizers.processors import TemplateProcessing

from paredown.compress.errors import PareError
from paredown.compress.text.chat import Chat
from paredown.compress.text.corpora import load_corpus
from paredown.compress.text.windows import calibration_windows, opening_text

TALK = [{"role": "user", "content": "a cat?"}, {"role": "assistant", "content": "a dog."}]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}|"
WITH_BOS = "{{ bos_token }}" + PLAIN


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def chat_of(tokenizer, template=PLAIN, adds_bos=False):
    """The chat of a tokenizer with this template, which puts a BOS before a text by itself or does not."""
    inner = deepcopy(tokenizer)
    inner.chat_template = template
    if adds_bos:
        made = TemplateProcessing(single="<eos> $A", pair="<eos> $A $B", special_tokens=[("<eos>", 256)])
        inner.backend_tokenizer.post_processor = made
    return Chat(inner, opening_text(inner))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_column_of_messages_is_found_and_written_by_the_template(tmp_path, tokenizer, form):
    rows = [{"id": "1", "messages": TALK}, {"id": "2", "messages": TALK[:1]}]
    path = tmp_path / f"talk.{form}"
    datasets.Dataset.from_list(rows).to_parquet(path) if form == "parquet" else write(path, *rows)
    chat = chat_of(tokenizer)
    for _ in range(2):  # the second time from the cache
        corpus = load_corpus(str(path), "calibration", chat)
        assert list(corpus.documents) == ["<user>a cat?<assistant>a dog.|", "<user>a cat?|"] and corpus.chat
    assert corpus.text == "".join(corpus.documents)
    other = load_corpus(str(path), "calibration", chat_of(tokenizer, "{{ messages[0].content }}"))
    assert list(other.documents) == ["a cat?", "a cat?"]  # another template, and not what the first one left


def test_text_is_preferred_and_chat_true_demands_messages(tmp_path, tokenizer):
    both, chat = write(tmp_path / "both.jsonl", {"text": "plain", "messages": TALK}), chat_of(tokenizer)
    assert not load_corpus(both, "calibration", chat).chat
    assert load_corpus(both, "calibration", chat, only_chat=True).text == "<user>a cat?<assistant>a dog.|"
    named = load_corpus(f"{both}:messages", "calibration", chat)
    assert named.chat and named.text.startswith("<user>")
    plain = write(tmp_path / "plain.jsonl", {"text": "plain", "tags": ["a"]})
    with pytest.raises(PareError, match=r"no column 'messages', and not just one of messages \(\[\{role, content\}"):
        load_corpus(plain, "calibration", chat, only_chat=True)
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(PareError, match=r"a.txt holds no conversations: leave out `chat: true`"):
        load_corpus(str(tmp_path / "a.txt"), "calibration", chat, only_chat=True)


def test_hub_datasets_and_missing_rows(tmp_path, tokenizer, monkeypatch):
    data = datasets.Dataset.from_list([{"messages": TALK, "n": 1}, {"messages": None, "n": 2}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: data)
    corpus = load_corpus("org/name::train", "calibration", chat_of(tokenizer))
    assert list(corpus.documents) == ["<user>a cat?<assistant>a dog.|", ""] and corpus.chat


def test_a_tokenizer_without_a_template_and_a_template_that_refuses_are_told(tmp_path, tokenizer):
    talk = write(tmp_path / "talk.jsonl", {"messages": TALK})
    with pytest.raises(PareError, match="the tokenizer of this model has no chat template"):
        load_corpus(talk, "calibration", chat_of(tokenizer, None))
    strict = "{% if messages[0].role == 'user' %}{{ raise_exception('a system prompt comes first') }}{% endif %}"
    with pytest.raises(PareError, match=r"talk.jsonl cannot be read: row 1: .*a system prompt comes first"):
        load_corpus(talk, "calibration", chat_of(tokenizer, strict))
    with pytest.raises(PareError, match="holds conversations, and a chat template is not known here"):
        load_corpus(talk, "evaluation")


def test_a_bos_of_the_template_is_not_doubled_and_stands_between_joined_conversations(tmp_path, tokenizer):
    rows = [{"messages": [{"role": "user", "content": letter * 20}]} for letter in "abcdefgh"]
    talk = write(tmp_path / "talk.jsonl", *rows)
    chat = chat_of(tokenizer, WITH_BOS, adds_bos=True)
    corpus = load_corpus(talk, "calibration", chat)
    assert corpus.text.count("<eos>") == 7 and not corpus.text.startswith("<eos>")
    drawn = calibration_windows(corpus, chat.tokenizer, 150, 12, 0, 99)
    begins, second = drawn.ids[:, 0], drawn.ids[:, 1]
    assert drawn.sampling == "joined"
    assert (begins == 256).all() and not (second == 256).any() and (drawn.ids[:, 2:] == 256).any()
    without = load_corpus(talk, "calibration", chat_of(tokenizer, WITH_BOS))
    assert without.text.startswith("<eos>") and without.text.count("<eos>") == 8
