"""What `quality` measures: one recipe on one model, kept in a file by what it is."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from paredown.compress import __version__, compress
from paredown.compress.checkpoint.companions import file_sha256
from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.machine import pick_device
from paredown.compress.model.blocks import blocks
from paredown.compress.model.stream import start
from paredown.compress.progress import BlockDone, ignore
from paredown.compress.recipe import Recipe
from paredown.compress.run.open import max_length
from paredown.compress.text.corpora import Role, load_corpus
from paredown.compress.text.corpus import Bos, Corpus
from paredown.compress.text.windows import Windows, evaluation_windows
from paredown.evaluation.benchmarks.rows import Row

Losses = dict[str, list[float]]  # text -> mean loss of each window, in nats per token
Entry = dict[str, Any]  # what is kept of a run, as plain data for JSON

# a packed layer is unpacked for every batch: larger ones than a run's own waste less of the time
BATCH_TOKENS = 8192


class Store:
    """What has been measured, in a JSON file that is replaced as a whole after each run; without one, in memory.

    `again`: runs of another process count as not measured.
    """

    def __init__(self, path: Path | None = None, again: bool = False) -> None:
        self.path, self.again = path, again
        self.fresh: set[str] = set()  # measured by this process
        self.found = self._read()

    def get(self, kind: str, key: str) -> Any:
        """The entry of a run or of the dense model, or None if it has to be measured."""
        return None if self.again and kind == "runs" and key not in self.fresh else self.found[kind].get(key)

    def put(self, kind: str, key: str, entry: Any) -> None:
        """Keep an entry. What another process has written meanwhile stays."""
        if self.path:
            others = self._read()
            self.found = {name: {**entries, **self.found[name]} for name, entries in others.items()}
        self.found[kind][key] = entry
        self.fresh.add(key)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            written = self.path.with_name(f"{self.path.name}.new")
            written.write_text(json.dumps(self.found), encoding="utf-8")
            os.replace(written, self.path)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8")) if self.path and self.path.exists() else {}
            return {"dense": dict(raw.get("dense", {})), "runs": dict(raw.get("runs", {}))}
        except (ValueError, AttributeError, OSError) as fault:
            raise PareError(f"{self.path} holds no results of this command: {fault}. Name another --json.") from fault


@dataclass
class Setting:
    """What all rows of a table share."""

    folder: Path  # of the model
    calibration: str
    texts: Mapping[str, str]  # what scores: its name in the table -> the text
    sequences: int
    length: int  # of calibration windows, in tokens
    eval_length: int
    windows: int | None  # of each text; None: all
    device: str
    store: Store

    def recipe(self, row: Row, seed: int) -> Recipe:
        """The row's recipe as it is run: it is scored from what it wrote, and not while it runs."""
        raw = row.recipe.to_dict()
        sizes = {"source": self.calibration, "sequences": self.sequences, "length": self.length, "seed": seed}
        raw["calibration"] = {**raw["calibration"], **sizes}
        raw["evaluate"] = {"perplexity": []}
        return Recipe.parse(raw, row.label, row.calibration)

    @cached_property
    def model(self) -> str:
        """The digest of the model's weights, config and tokenizer."""
        parts = sorted(p for p in self.folder.iterdir() if p.suffix in (".safetensors", ".json") and p.is_file())
        return _digest([(part.name, file_sha256(part)) for part in parts])

    def text_key(self, text: str, bos: Bos) -> str:
        """By what losses on a text are known."""
        return f"{corpus(text, 'evaluation').sha256[:16]} {self.windows or 'all'} x {self.eval_length} bos {bos}"

    def run_key(self, recipe: Recipe) -> str:
        """By what a run is known: the contents of model, recipe and calibration text, sizes, seed, and kind of device."""
        left_out = ("name", "description", "citation", "evaluate")
        content = {key: value for key, value in recipe.to_dict().items() if key not in left_out}
        spec = recipe.calibration
        read = [corpus(name, "calibration").sha256 for name in (spec.source, spec.domain) if name]
        content["calibration"] = [read, spec.sequences, spec.length, spec.seed]
        content["plugins"] = [file_sha256(Path(plugin)) for plugin in recipe.plugins]
        return _digest([self.model, content, pick_device(self.device).type])

    def source(self, folder: Path) -> ModelSource:
        return ModelSource(folder, str(folder), device=pick_device(self.device))


def entry_of(row: Row, seed: int, setting: Setting) -> Entry | None:
    """What is kept of a run, if it was scored on all texts; else None."""
    recipe = setting.recipe(row, seed)
    entry: Entry | None = setting.store.get("runs", setting.run_key(recipe))
    wanted = {setting.text_key(text, recipe.bos) for text in setting.texts.values()}
    return entry if entry and wanted <= entry["losses"].keys() else None


def measure(row: Row, seed: int, setting: Setting, progress: Callable[[BlockDone], None] = ignore) -> Entry:
    """Run a row's recipe, read back what it wrote, score it, and keep the result.

    Raises PareError for whatever stops `compress`.
    """
    recipe = setting.recipe(row, seed)
    with tempfile.TemporaryDirectory(prefix="paredown-") as work:
        out = Path(work) / "out"
        report = compress(setting.folder, recipe, out, device=setting.device, note=ignore, progress=progress)
        began = perf_counter()
        losses = score(setting.source(out), _windows(setting, setting.texts.values(), recipe.bos))
        scoring = perf_counter() - began
    entry = {
        "label": row.label,
        "model": str(setting.folder),
        "recipe": recipe.to_dict(),
        "losses": losses,
        "kept": report["parameters"]["kept"] / report["parameters"]["targeted"],
        "bytes": dict(report["bytes"]),
        "seconds": {**report["seconds"], "scoring": round(scoring, 3)},
        "fallbacks": list(report["fallbacks"]),
        "threads": torch.get_num_threads(),
        "version": __version__,
        "code": code(),
    }
    setting.store.put("runs", setting.run_key(recipe), entry)
    return entry


def dense_losses(setting: Setting, bos: Bos) -> Losses:
    """Those of the dense model, by the keys of the texts; it is scored once on each."""
    keys = {setting.text_key(text, bos): text for text in setting.texts.values()}
    kept = {key: f"{setting.model[:16]} {pick_device(setting.device).type} {key}" for key in keys}
    missing = [text for key, text in keys.items() if setting.store.get("dense", kept[key]) is None]
    if missing:
        for key, losses in score(setting.source(setting.folder), _windows(setting, missing, bos)).items():
            setting.store.put("dense", kept[key], losses)
    return {key: setting.store.get("dense", name) for key, name in kept.items()}


@torch.no_grad()
def score(source: ModelSource, texts: Mapping[str, Windows]) -> Losses:
    """The mean loss of each window of each text, with one block in memory at a time."""
    streams = {name: start(source, windows.ids, BATCH_TOKENS) for name, windows in texts.items()}
    for block in blocks(source):
        with source.loaded(block):
            for stream in streams.values():
                stream.advance(block)
    found = {name: texts[name].of_text(stream.nll(source)) for name, stream in streams.items()}  # (windows, targets)
    return {name: losses.double().mean(1).tolist() for name, losses in found.items()}


def _windows(setting: Setting, texts: Sequence[str] | Any, bos: Bos) -> dict[str, Windows]:
    """The windows that score, by the keys of their texts."""
    tokenizer = load_tokenizer(setting.folder)
    length, longest, most = setting.eval_length, max_length(setting.source(setting.folder)), setting.windows
    return {
        setting.text_key(text, bos): evaluation_windows(
            corpus(text, "evaluation"), tokenizer, length, longest, most, bos=bos
        )
        for text in texts
    }


@cache
def corpus(spec: str, role: Role) -> Corpus:
    """As `load_corpus`, read once."""
    return load_corpus(spec, role)


@cache
def code() -> str:
    """The digest of the code that compresses, by which figures of another state of it are told."""
    root = Path(str(files("paredown.compress")))
    return _digest([file_sha256(path) for path in sorted(root.rglob("*.py"))])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
