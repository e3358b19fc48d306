"""Write a Llama whose blocks have sizes of their own in NVIDIA's DeciLM layout: ordinary weights that engines read.

vLLM takes the sizes of each block from `block_configs` (`DeciLMForCausalLM`, model type nemotron-nas), llama.cpp's converter
from their `ffn_mult`, which says only multiples of 256. A sublayer that is gone has no norm in front of it either.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paredown.compress.checkpoint.companions import file_sha256, write_companions
from paredown.compress.checkpoint.config_file import write_config_file
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.transformers_plugin import dense_config
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.run import configuration_decilm
from paredown.compress.run.write import add_dense, outside

FAMILY = "llama"
ATTENTION, MLP = ("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm")  # with the norm in front of it
STEP = 256  # of the sizes that `ffn_mult` can say
CODE = "configuration_decilm.py"

Settings = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]  # by name within a block


def write_deci(
    source: ModelSource, writer: CheckpointWriter, record: Mapping[str, Any], progress: Callable[[int, int], None]
) -> None:
    """Write the whole checkpoint but for the commit; `record` goes into paredown.json, `progress` is told (done, blocks).

    Raises PareError, before anything is written, for a model that this layout cannot describe.
    """
    all_blocks = blocks(source)
    settings = block_settings(source, all_blocks)
    for block, sizes in zip(all_blocks, settings, strict=True):
        gone = [
            name for kind, names in (("attention", ATTENTION), ("ffn", MLP)) if sizes[kind]["no_op"] for name in names
        ]
        left_out = tuple(f"{block.prefix}{name}." for name in gone)
        own = [block.prefix + name for name in block.names if block.prefix + name in source.parameters]
        add_dense(writer, source.read(name for name in own if not name.startswith(left_out)))
        writer.end_block()
        progress(block.index + 1, len(all_blocks))
    for tensors in outside(source, all_blocks, "packed"):
        add_dense(writer, tensors)
        writer.end_block()
    names = write_companions(source.folder, writer.folder)
    _write_config(source, writer.folder, settings)
    files = {name: file_sha256(writer.folder / name) for name in sorted(["config.json", CODE, *names])}
    writer.finish({**record, "files": files})


def block_settings(source: ModelSource, all_blocks: list[Block]) -> list[Settings]:
    """`block_configs`, by block. Raises PareError, naming what is in the way, for a model that they cannot describe."""
    if source.family != FAMILY:
        raise PareError(
            f"{source.id} is a {source.family} model, and the deci layout is for {FAMILY} models: use --format dense."
        )
    if source.modules:
        raise PareError(
            f"{source.id} has packed weights, and the deci layout holds ordinary ones: make these dense first, with "
            "paredown export --format dense."
        )
    return [_of_block(source, block) for block in all_blocks]


def _of_block(source: ModelSource, block: Block) -> Settings:
    """The settings of one block. Raises PareError for weights whose shapes do not follow from them."""
    names = [name for name in block.names if block.prefix + name in source.parameters]
    shapes = {name: tuple(source.parameters[block.prefix + name].shape) for name in names}
    hidden = source.config.hidden_size
    attention, expected = _attention(source.config, shapes)
    ffn, of_mlp = _mlp(hidden, shapes)
    expected |= {**of_mlp, **{f"{norm}.weight": (hidden,) for _, norm in (ATTENTION, MLP)}}
    if odd := next((name for name, shape in shapes.items() if shape != expected.get(name)), None):
        raise PareError(
            f"{block.prefix}{odd} has shape {list(shapes[odd])}, which the deci layout cannot say: blocks may differ in the "
            "width of their MLP and in the number of key-value heads. Keep the packed checkpoint."
        )
    if attention["no_op"] and block.index == 0:
        raise PareError(
            f"{block.name} has no attention, and readers of the deci layout fail where the first block has none. Keep it."
        )
    return {"attention": attention, "ffn": ffn}


def _attention(config: Any, shapes: Shapes) -> tuple[Settings, Shapes]:
    """The settings of a block's attention, and the shapes of its weights that follow from them."""
    if "self_attn.k_proj.weight" not in shapes:
        return {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False}, {}
    heads, hidden = config.num_attention_heads, config.hidden_size
    width = config.head_dim or hidden // heads
    in_group = heads // max(shapes["self_attn.k_proj.weight"][0] // width, 1)
    rows = {"q_proj": heads * width, **dict.fromkeys(("k_proj", "v_proj"), heads // in_group * width)}
    weights = {**{name: (n, hidden) for name, n in rows.items()}, "o_proj": (hidden, heads * width)}
    return {"n_heads_in_group": in_group, "no_op": False, "replace_with_linear": False}, _linears("self_attn", weights)


def _mlp(hidden: int, shapes: Shapes) -> tuple[Settings, Shapes]:
    """As `_attention`, of the MLP. Readers of `ffn_mult` alone stop where a width has none, and take no other one."""
    if "mlp.down_proj.weight" not in shapes:
        return {"ffn_mult": None, "intermediate_size": None, "no_op": True, "replace_with_linear": False}, {}
    inner = shapes["mlp.down_proj.weight"][1]
    multiple = {} if inner % STEP else {"ffn_mult": 3 * inner / (2 * hidden)}
    weights = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    settings = {**multiple, "intermediate_size": inner, "no_op": False, "replace_with_linear": False}
    return settings, _linears("mlp", weights)


def _linears(module: str, weights: Mapping[str, tuple[int, int]]) -> Shapes:
    """The shapes of these layers' weights, and of biases that they may have."""
    named = {f"{module}.{name}": shape for name, shape in weights.items()}
    biases: Shapes = {f"{name}.bias": shape[:1] for name, shape in named.items()}
    return {**biases, **{f"{name}.weight": shape for name, shape in named.items()}}


def _write_config(source: ModelSource, folder: Path, blocks_of: list[Settings]) -> None:
    """config.json, and the class that reads it."""
    write_config_file(dense_config(source.config), folder, source.folder / "config.json", "LlamaForCausalLM")
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CODE.removesuffix('.py')}.DeciLMConfig"},
        "block_configs": blocks_of,
        "model_type": configuration_decilm.DeciLMConfig.model_type,
    }
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
    code = Path(configuration_decilm.__file__).read_text(encoding="utf-8")
    (folder / CODE).write_text(code, encoding="utf-8", newline="\n")
