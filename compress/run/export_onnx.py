"""Write a model as an ONNX graph from token ids to logits, without a cache: for scoring, and for engines that read ONNX."""

from pathlib import Path

import torch
from torch import Tensor, nn

from paredown.compress.checkpoint.transformers_plugin import load
from paredown.compress.errors import PareError
from paredown.kernels import lowrank as lowranks
from paredown.kernels import ops  # noqa: F401 - registers our operators

FILE = "model.onnx"
PROBE = (2, 8)  # batch and tokens with which the model is traced; both are free in the graph

# our operators -> what they compute, in operators that ONNX knows
PLAIN = {
    torch.ops.paredown.lowrank_matmul.default: lowranks.grouped_lowrank_matmul,
    torch.ops.paredown.pifa_matmul.default: lowranks.grouped_pifa_matmul,
    torch.ops.paredown.cur_matmul.default: lowranks.cur_matmul,
}


class _Logits(nn.Module):
    """A model as a function of token ids alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def write_onnx(folder: Path, file: Path) -> None:
    """Export the checkpoint in `folder`: ordinary, or packed with factors, which stay factors.

    In float32: onnxruntime lacks operators for bfloat16. Input `input_ids` (batch, tokens) int64, output `logits` (batch,
    tokens, vocabulary). Raises PareError if the exporter is not installed, or cannot export the model.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as fault:
        raise PareError(
            "ONNX is written by torch's exporter, which needs: pip install onnx onnxscript onnxruntime"
        ) from fault
    model = _Logits(load(folder, dtype=torch.float32, attn_implementation="eager")).eval()
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    try:
        program = torch.export.export(
            model, (torch.zeros(PROBE, dtype=torch.long),), dynamic_shapes={"input_ids": free}
        )
        torch.onnx.export(
            program.run_decompositions(PLAIN), (), file, dynamo=True, input_names=["input_ids"],
            output_names=["logits"], external_data=True, verbose=False,
        )  # fmt: skip
    except Exception as fault:  # whatever the tracer does with a class that it cannot follow
        told = next(iter(str(fault).splitlines()), "")
        raise PareError(f"torch cannot export this model to ONNX ({type(fault).__name__}: {told})") from fault
