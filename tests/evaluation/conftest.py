"""Tiny models to be timed, and a report."""

import pytest
import torch
import transformers as t

from paredown.compress.checkpoint import transformers_plugin
from paredown.evaluation.schema import SCHEMA


@pytest.fixture(scope="session")
def random_model():
    """`random_model(config)`: weights so large that the logits depend on every token before."""

    def make(config):
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture
def llama(random_model, tiny_config):
    return random_model(tiny_config)


@pytest.fixture
def packed(tmp_path, tiny_model, prune):
    prune(tiny_model, tmp_path / "packed")
    return transformers_plugin.load(tmp_path / "packed").eval()


@pytest.fixture
def dense(tiny_model):
    return transformers_plugin.load(tiny_model).eval()


@pytest.fixture
def report():
    layers = [
        {
            "name": f"model.layers.{block}.{kind}",
            "method": "wanda",
            "kept": 0.5,
            "relative_error": 0.01 * (block + 1),
            "damping": None,
            "seconds": 0.5,
        }
        for block in range(40)
        for kind in ("self_attn.q_proj", "mlp.down_proj", "mlp.experts.3.down_proj")
    ]
    return {
        "schema": SCHEMA,
        "model": {
            "id": "meta-llama/Llama-3.2-1B",
            "revision": "abc123",
            "family": "llama",
            "parameters": 1_200_000_000,
        },
        "recipe": {
            "name": "wanda-2-4",
            "method": "wanda",
            "options": {"sparsity": "2:4"},
            "citation": "Sun et al. 2023",
        },
        "calibration": {
            "source": "stdlib",
            "split": "calibration",
            "sequences": 128,
            "length": 2048,
            "seed": 7,
            "sha256": "cafe" * 16,
        },
        "evaluation": [
            {
                "corpus": "wikitext2",
                "split": "test",
                "sha256": "beef" * 16,
                "length": 2048,
                "tokens": 341_469,
                "before": {"token_perplexity": 9.761, "stderr": 0.052},
                "after": {"token_perplexity": 14.52, "stderr": 0.081},
                "paired_delta": {"log_ratio": 0.3971, "stderr": 0.0021, "low": 0.3931, "high": 0.4012},
                "note": "first windows only",
            }
        ],
        "tasks": {
            "boolq": {
                "acc": {
                    "before": 0.64,
                    "after": 0.61,
                    "stderr_before": 0.0084,
                    "stderr_after": 0.0085,
                    "paired_stderr": 0.0031,
                    "correct_to_wrong": 210,
                    "wrong_to_correct": 111,
                }
            },
            "wikitext": {
                "word_perplexity": {
                    "before": 11.5,
                    "after": 17.25,
                    "stderr_before": None,
                    "stderr_after": None,
                    "paired_stderr": None,
                }
            },
        },
        "parameters": {"total": 1_200_000_000, "targeted": 900_000_000, "kept": 450_000_000},
        "bytes": {"before": 2_400_000_000, "after": 1_612_500_000},
        "layers": layers,
        "seconds": {"calibration": 2.5, "compress": 61.0, "evaluation": 3700.0, "write": 5.0, "total": 3768.5},
        "peak_memory_bytes": {"host": 3_100_000_000, "device": None},
        "fallbacks": [f"model.layers.{i}.mlp.experts.3.down_proj: no token" for i in range(15)],
        "versions": {"torch": "2.11.0"},
        "command": "paredown compress meta-llama/Llama-3.2-1B --recipe=/home/me/wanda-2-4.yaml -o /data/out/small",
        "format": "packed",
        "warnings": ["the [bold]window[/bold] was capped at 512"],
    }
