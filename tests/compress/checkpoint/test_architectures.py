"""The class that a checkpoint holds, and what other models are told that they are."""

import pytest
import transformers as t

from paredown.compress.checkpoint.architectures import auto_class, model_class
from paredown.compress.errors import PareError


def named(config, *architectures):
    config.architectures = list(architectures) or None
    return config


@pytest.mark.parametrize(
    ("config", "wanted", "auto"),
    [
        (named(t.LlamaConfig()), t.LlamaForCausalLM, t.AutoModelForCausalLM),
        (named(t.LlamaConfig(), "LlamaModel"), t.LlamaForCausalLM, t.AutoModelForCausalLM),
        (named(t.LlamaConfig(), "PackedLlamaForCausalLM"), t.LlamaForCausalLM, t.AutoModelForCausalLM),
        (named(t.LlamaConfig(), "LLaMAForCausalLM"), t.LlamaForCausalLM, t.AutoModelForCausalLM),
        (named(t.Qwen3_5Config()), t.Qwen3_5ForConditionalGeneration, t.AutoModelForImageTextToText),
        (named(t.Qwen3_5Config(), "Qwen3_5ForCausalLM"), t.Qwen3_5ForCausalLM, t.AutoModelForCausalLM),
        (named(t.Gemma3Config()), t.Gemma3ForConditionalGeneration, t.AutoModelForCausalLM),
        (named(t.Llama4Config()), t.Llama4ForConditionalGeneration, t.AutoModelForImageTextToText),
        (named(t.BartConfig(is_encoder_decoder=False), "BartForCausalLM"), t.BartForCausalLM, t.AutoModelForCausalLM),
    ],
)
def test_architectures_choose_among_the_classes_that_continue_a_text(config, wanted, auto):
    assert model_class(config) is wanted and auto_class(config) is auto


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (t.T5Config(), "t5 is an encoder-decoder model"),
        (named(t.BartConfig(), "BartForConditionalGeneration"), "names BartForConditionalGeneration"),
        (t.WhisperConfig(), "whisper is an encoder-decoder model"),
        (t.ViTConfig(), "vit models are vision models"),
        (t.CLIPConfig(), "compare images with texts"),
        (t.DebertaConfig(), "deberta models are encoders"),
        (named(t.BertConfig(), "BertForMaskedLM"), "BertForMaskedLM, a model that fills gaps"),
        (
            named(t.LlamaConfig(), "LlamaForSequenceClassification"),
            "LlamaForSequenceClassification, a classifier or reward",
        ),
        (named(t.Qwen2Config(), "Qwen2ForRewardModel"), "Qwen2ForRewardModel, a reward model"),
        (t.SamConfig(), "sam models are no language models"),
    ],
)
def test_other_models_are_told_what_they_are(config, said):
    with pytest.raises(PareError, match=said):
        model_class(config)
