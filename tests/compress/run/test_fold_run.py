"""A model whose channels come in equal pairs is the same model with half of them, once they are folded."""

import torch
import transformers as t
import yaml
from transformers import AutoModelForCausalLM

from paredown.compress import compress
from paredown.evaluation.schema import check_report

SMALL = ("calibration.sequences=2", "calibration.length=16", "evaluate.length=16", "evaluate.windows=2")


def test_folding_equal_channels_changes_nothing(tmp_path, save_model, text_file, verified_here):
    config = t.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    model = save_model(tmp_path / "model", config, torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("gate_proj", "up_proj"):
                weight = layer.mlp.get_submodule(name).weight
                weight[24:] = weight[:24]
            columns = layer.mlp.down_proj.weight
            columns[:, 24:] = 0.9 * columns[:, :24]
    model.save_pretrained(tmp_path / "model")
    recipe = tmp_path / "fold.yaml"
    recipe.write_text(yaml.safe_dump({"method": "fold", "options": {"units": 24, "multiple": 8}}))
    text = {"calibration": str(text_file), "eval_text": [str(text_file)]}
    report = compress(tmp_path / "model", str(recipe), tmp_path / "out", overrides=SMALL, **text)
    check_report(report)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 19)[None]
    assert small.config.intermediate_size == 24 and report["layers"][0]["relative_error"] is None
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)
