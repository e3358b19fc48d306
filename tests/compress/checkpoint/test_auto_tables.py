"""A packed checkpoint gets the tokenizer that the dense one gets, whatever transformers decides by the model type."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.architectures import model_types
from paredown.compress.checkpoint.auto_tables import enter
from paredown.compress.checkpoint.packed_classes import packed_model_type

TEXTS = [
    " a leading space",
    "x = 12345 + 0.5",
    "naïve café, Übung",
    "emoji 🙂👍🏽",
    "<s>it</s>: def f():\n\treturn 1\n\n",
    "  ",
]
DECLARED = [None, "LlamaTokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"]
MERGES = ["i t", "Ġ a", "Ġ l", "e a", "d e", "f (", "1 2", "12 3", "c a", "Ġ Ġ", "r e", "re t", "n a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a byte-level BPE of a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", "<|endoftext|>", *alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(m.split()) for m in MERGES])
    tokenizer = Tokenizer(bpe)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|endoftext|>"])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def ids(folder, model_type, declared):
    """The class of the tokenizer that a model of this type gets in `folder`, and its ids; or the kind of error."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "5.23.0"}))
    named = {} if declared is None else {"tokenizer_class": declared}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return type(tokenizer).__name__, [tokenizer(text).input_ids for text in TEXTS]
    except Exception as fault:
        return type(fault).__name__, []


def cases():
    """A family for each tokenizer class, and one for each class that is wrong on the hub."""
    transformers_plugin.register()
    wrong = MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    alike = {
        (TOKENIZER_MAPPING_NAMES.get(name), name in wrong): name for name in reversed(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    }
    return sorted({*alike.values(), "bart", "llama", "qwen2", "qwen3_5", "mistral"})


@pytest.mark.parametrize("family", cases())
def test_a_family_gets_the_same_tokenizer_packed_as_dense(family, folder):
    found = [ids(folder, family, declared) for declared in DECLARED]
    assert [ids(folder, packed_model_type(family), declared) for declared in DECLARED] == found
    assert any(tokens for _, tokens in found)


def test_the_tables_know_every_family_packed():
    transformers_plugin.register()
    wrong = MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    for name in model_types():
        packed = packed_model_type(name)
        assert TOKENIZER_MAPPING_NAMES.get(packed) == TOKENIZER_MAPPING_NAMES.get(name)
        assert (packed in wrong) == (name in wrong)


def test_a_class_is_entered_also_where_transformers_passes_over_those_with_its_module(monkeypatch):
    """As its versions 5.17 and 5.18 do."""
    monkeypatch.setattr(_LazyAutoMapping, "register", lambda *_, exist_ok: None)
    table = AutoModelForCausalLM._model_mapping
    config = type("PackedGPT2Config", (GPT2Config,), {"__module__": GPT2Config.__module__})
    try:
        for value in (("one",), ("one", "two")):
            enter(table, config, value)
            assert table[config] is value
    finally:
        table._extra_content.pop(config, None)
