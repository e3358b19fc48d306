"""What is kept of a block's finished parts changes nothing but how often they run."""

from collections import Counter

import families
import pytest
import torch
from torch import nn

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.model.blocks import blocks
from paredown.compress.model.stream import start
from paredown.compress.numerics.moments import PAIRED_NEEDS
from paredown.compress.survey import sides
from paredown.compress.survey.collect import observe_both, shared_copy
from paredown.compress.survey.finished import Finished

# experts, layers side by side, state spaces, attention that takes the keys of earlier blocks, a transposed weight; layers of
# which no product is seen; experts before attention
KINDS = ["llama", "mixtral", "gpt_neox", "gpt2", "falcon_h1", "gemma3n_text", "jamba", "deepseek_v4", "longcat_flash"]


def opened(family, folder, batch_tokens=48):
    families.save(family, folder)
    source = ModelSource(folder / "bfloat16", "m")
    walk = start(source, families.IDS, batch_tokens)
    return source, blocks(source), walk


def walked(source, all_blocks, walk, part=slice(None)):
    """Every matrix that is collected, and the streams behind each block, where some layers lose half of their weights."""
    found, dense = [], walk.copy()
    for block in all_blocks:
        with source.loaded(block), torch.no_grad():
            twin = shared_copy(block)
            forwards = {name: vars(module).get("forward") for name, module in block.module.named_modules()}
            views = block.views()[part]
            for group, stats in observe_both(walk, dense, block, twin, views, PAIRED_NEEDS, True, onward=True):
                for view in group:
                    if view.name in stats:
                        one = stats[view.name]
                        found += [one.inputs.gram, one.residual.missing if one.residual else one.inputs.mean]
                    view.assign(view.weight * (torch.arange(view.shape[1]) % 2))
            assert forwards == {name: vars(module).get("forward") for name, module in block.module.named_modules()}
            found += [*walk.hidden, *dense.hidden]
    return found


@pytest.mark.parametrize("dense", ["kept", "pass by pass"])
@pytest.mark.parametrize("part", [slice(None), slice(0, None, 2), slice(3, 4)], ids=["all", "every other", "one"])
@pytest.mark.parametrize("family", KINDS)
def test_what_is_collected_is_the_same(family, part, dense, tmp_path, monkeypatch):
    if dense != "kept":
        monkeypatch.setattr(sides, "kept_bytes", lambda *_: 2**60)
    replayed = walked(*opened(family, tmp_path / "m"), part)
    monkeypatch.setattr(sides, "Finished", lambda stream, block, views, room: Finished(stream, block, views, 0))
    again = walked(*opened(family, tmp_path / "m"), part)
    assert len(replayed) == len(again) and all(map(torch.equal, replayed, again))


def test_no_more_is_kept_than_there_is_room_for(tmp_path, monkeypatch):
    room, held = 20_000, []

    class Watched(Finished):
        def batch(self, i):
            held.append(sum(part.held(b) for part in self._parts.values() for b in range(2)))
            return super().batch(i)

    monkeypatch.setattr(sides, "Finished", lambda *known: Watched(*known[:3], room))
    source, all_blocks, walk = opened("llama", tmp_path / "m")
    assert len(walk.hidden) == 2
    walked(source, all_blocks, walk)
    assert 0 < max(held) <= room
    room, held[:] = 2**20, []
    walked(source, all_blocks, start(source, families.IDS, 48))
    assert max(held) > 20_000


def test_a_finished_part_runs_once_for_each_batch_as_far_as_there_is_room(tmp_path, monkeypatch):
    source, all_blocks, walk = opened("llama", tmp_path / "m")
    batches, attention, mlp = len(walk.hidden), all_blocks[0].module.self_attn, all_blocks[0].module.mlp
    ran, forward = Counter(), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: ran.update([self]) or forward(self, x))
    made, runs = sides.Finished, {}
    for room in (0, 1, 2**20):
        ran.clear()
        monkeypatch.setattr(sides, "Finished", lambda *known, room=room: made(*known[:3], room))
        walked(source, all_blocks, walk.copy())
        runs[room] = [ran[layer] for layer in (attention.q_proj, attention.o_proj, mlp.gate_proj)]
    assert runs[0] == runs[1]
    # the passes that read o_proj's input and then those behind it, and the one that moves the stream
    assert [a - b for a, b in zip(runs[0], runs[2**20], strict=True)] == [3 * batches, 2 * batches, batches]
