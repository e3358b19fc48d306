"""Which engines take what we write."""

import pytest

from paredown.compress.serving.engines import engines
from paredown.compress.storage.spec import Spec

MASKED, FACTORS = Spec("sparse24", (8, 8), values=32), Spec("lowrank", (8, 8), rank=2)


@pytest.mark.parametrize(
    ("format", "names"),
    [("dense", ["transformers", "vLLM", "llama.cpp", "onnxruntime"]), ("packed", ["transformers", "vLLM", "llama.cpp", "onnxruntime"]),
     ("deci", ["vLLM"]), ("gguf", ["llama.cpp"]), ("onnx", ["onnxruntime"])],
)  # fmt: skip
def test_each_format_names_its_engines(format, names):
    assert [engine.name for engine in engines(format)] == names


def test_what_an_engine_does_with_packed_weights_is_told():
    told = dict(engines("packed", [MASKED, FACTORS]))
    assert "on a CPU pruned weights are unpacked" in told["vLLM"] and "unpacked" in told["onnxruntime"]
    factored = dict(engines("packed", [FACTORS]))
    assert "unpacked" not in factored["vLLM"] + factored["onnxruntime"]
    assert "PIFA" in dict(engines("packed", [Spec("pifa", (8, 8), rank=2)]))["vLLM"]


def test_blocks_of_their_own_sizes_run_where_they_can():
    assert [engine.name for engine in engines("packed", uneven=True)] == ["transformers", "vLLM", "llama.cpp"]
