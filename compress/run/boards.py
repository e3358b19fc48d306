"""Where a person may watch a run besides its log: trackio, Weights & Biases, or TensorBoard, whichever is installed.

Nothing here imports one of them, or torch, before a board is opened.
"""

import json
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from paredown.compress.errors import PareError

Name = Literal["trackio", "wandb", "tensorboard"]
PROJECT = "paredown"  # unless TRACKIO_PROJECT or WANDB_PROJECT says otherwise


class Board(Protocol):
    """One run on a board."""

    place: str  # how a person finds it

    def log(self, of: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, by name."""
        ...

    def close(self) -> None:
        """Say that the run is over."""
        ...


def check_board(name: str | None) -> None:
    """Raise PareError for a board that is not installed; None is none."""
    if name is not None and find_spec(name) is None:
        raise PareError(f"--log-to {name}: {name} is not installed. Type: pip install {name}")


def open_board(name: Name, out: Path, config: Mapping[str, Any]) -> Board:
    """Begin a run named as `out`, with what is known of it before. Raises PareError if the board refuses."""
    check_board(name)
    try:
        return _TensorBoard(out, config) if name == "tensorboard" else _Project(name, out, config)
    except Exception as fault:  # whatever the library raises, such as a missing login
        raise PareError(f"--log-to {name} could not begin ({type(fault).__name__}: {fault}).") from fault


class _Project:
    """trackio and wandb, which are called alike."""

    def __init__(self, name: Name, out: Path, config: Mapping[str, Any]) -> None:
        self.module = import_module(name)
        project = os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
        self.module.init(project=project, name=out.name, config=dict(config))
        self.place = f"{name}, project {project}, run {out.name}"

    def log(self, of: str, step: int, values: Mapping[str, float]) -> None:
        self.module.log({f"{of}/step": step, **{f"{of}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        self.module.finish()


class _TensorBoard:
    """Event files in the folder `runs` beside OUT."""

    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        folder = out.absolute().parent / "runs"
        self.writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / out.name))
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```")
        self.place = f"tensorboard --logdir {folder}"

    def log(self, of: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{of}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()
