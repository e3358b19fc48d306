"""Optimizers: their state goes to tensors and back, and what is not installed is told."""

import sys
from importlib.util import find_spec

import pytest
import torch

from paredown.compress.errors import PareError
from paredown.compress.recovery import optimizer

CPU = torch.device("cpu")


def steps(kind, before, after):
    """Masters after so many steps, of which the last `after` are taken by another optimizer that was given the state."""
    masters = {"large": torch.ones(64, 128), "small": torch.ones(3)}

    def own():
        return optimizer.make(kind, [{"params": [t], "lr": 0.01} for t in masters.values()])

    def go(work, count, seed):
        for n in range(count):
            for place, tensor in enumerate(masters.values()):
                draw = torch.Generator().manual_seed(1000 * (seed + n) + place)
                tensor.grad = torch.randn(tensor.shape, generator=draw)
            work.step()

    first = own()
    go(first, before, 0)
    if after:
        state = {name: t.clone() for name, t in optimizer.saved(first, masters).items()}
        assert all(name.startswith("optimizer/") for name in state)
        second = own()
        optimizer.restore(second, masters, {name.removeprefix("optimizer/"): t for name, t in state.items()})
        go(second, after, before)
    return masters


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_its_state_goes_to_tensors_and_back(kind):
    if kind == "adamw8bit" and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    optimizer.check_optimizer(kind, CPU)
    whole, parts = steps(kind, 5, 0), steps(kind, 2, 3)
    assert all(torch.equal(whole[name], parts[name]) for name in whole) and (whole["large"] != 1).all()


def test_what_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    with pytest.raises(PareError, match=r"needs the package bitsandbytes, which is not installed\. Type: pip install"):
        optimizer.check_optimizer("adamw8bit", CPU)


def test_what_takes_no_step_on_the_device_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setattr(optimizer, "find_spec", lambda name: name)
    monkeypatch.setattr(optimizer, "version", lambda name: "0.1")
    with pytest.raises(PareError, match=r"bitsandbytes 0\.1 takes no step on the device cpu"):
        optimizer.check_optimizer("adamw8bit", CPU)
