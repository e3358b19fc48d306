"""The files beside a model's weights and config: those that go along with it, and why others stay behind.

What goes along is plain data: tokenizer, chat templates, settings of generation and of processors, licences. Code does not,
and neither does what a link would fetch from elsewhere on this machine.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paredown.compress.errors import PareError

TEMPLATES = "additional_chat_templates"  # the folder of a tokenizer's named chat templates
LICENCES = ("license", "licence", "notice", "use_policy", "copying")
SUFFIXES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
COMPANIONS = (
    *SUFFIXES,
    f"{TEMPLATES}/*.jinja",
    "tokenizer*",
    *(f"{spelt}*" for word in LICENCES for spelt in (word, word.title(), word.upper())),
)
# what we write ourselves, what describes the old weights, and an adapter's settings, which are for other weights
NOT_COMPANIONS = ("config.json", "*.index.json", "paredown.json", "report.json", "adapter_config.json")
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
SETTINGS_BYTES = 64 << 20  # a larger JSON file holds no settings

_DATA = re.compile(r".*\.(json|jinja|txt|model|model\.v\d+|tiktoken|spm|bpe|vocab|md|rst|html|pdf)", re.IGNORECASE)
_LICENCE = re.compile(rf"({'|'.join(LICENCES)})[^.]*(\.\d+)?", re.IGNORECASE)  # LICENSE, NOTICE, LICENSE-2.0
# programs (ELF, Windows, macOS, a script), zip archives, which torch files are, and pickles
_PROGRAMS = (
    b"\x7fELF", b"MZ", b"\xca\xfe\xba\xbe", b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe", b"#!/", b"PK\x03\x04",
    b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05",
)  # fmt: skip


def companions(folder: Path) -> dict[str, Path]:
    """The files of a model's folder that go along with it: name, with / below a folder -> path, sorted by name.

    Raises PareError if one cannot be read.
    """
    return {name: path for name, path in _named(folder) if _fault(folder, path) is None}


def left_behind(folder: Path) -> list[str]:
    """A sentence for each file that is named like a companion and stays behind, and for an adapter beside the weights."""
    told = [f"{name} does not go along: {fault}" for name, path in _named(folder) if (fault := _fault(folder, path))]
    if adapter := next((name for name in ADAPTERS if (folder / name).exists()), None):
        told.append(
            f"{adapter}: the adapter (LoRA) beside the weights is not applied and does not go along. To compress the "
            "adapted model, merge it first: PEFT's merge_and_unload(), then save_pretrained."
        )
    return told


def write_companions(folder: Path, out: Path) -> list[str]:
    """Write the companions of the model in `folder` into `out`; returns their names."""
    for name, path in companions(folder).items():
        (out / name).parent.mkdir(exist_ok=True)
        if (settings := _without_code(path)) is None:
            shutil.copyfile(path, out / name)
        else:
            (out / name).write_text(settings, encoding="utf-8", newline="\n")
    return list(companions(folder))


def tokenizer_sha256(folder: Path) -> str:
    """One digest of the names and contents of the tokenizer's files, as they are written."""
    digest = hashlib.sha256()
    for path in companions(folder).values():
        if "tokenizer" in path.name or path.name.startswith(("vocab", "merges", "special_tokens")):
            settings = _without_code(path)
            digest.update(path.name.encode() + (path.read_bytes() if settings is None else settings.encode()))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_code(settings: Any) -> Any:
    """Settings as in a JSON file, without any `auto_map`: it names Python files, which do not go along."""
    if isinstance(settings, dict):
        return {key: without_code(value) for key, value in settings.items() if key != "auto_map"}
    return [without_code(value) for value in settings] if isinstance(settings, list) else settings


def _without_code(path: Path) -> str | None:
    """The text of a JSON file without any `auto_map`; None for a file that has none."""
    if (
        path.suffix != ".json"
        or path.stat().st_size > SETTINGS_BYTES
        or b'"auto_map"' not in (data := path.read_bytes())
    ):
        return None
    try:
        return json.dumps(without_code(json.loads(data)), indent=2, ensure_ascii=False) + "\n"
    except (ValueError, RecursionError):  # damaged: left for its reader to tell
        return None


def _named(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files, and links that lead nowhere, that are named like companions."""
    paths = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file() or path.is_symlink()}
    for path in sorted(path for path in paths if not path.name.startswith(".")):
        if not any(path.match(pattern) for pattern in NOT_COMPANIONS) and not path.is_dir():
            yield path.relative_to(folder).as_posix(), path


def _fault(folder: Path, path: Path) -> str | None:
    """Why this file stays behind; None for one that goes along."""
    if not path.exists():
        return "it is a link that leads nowhere."
    if not any(path.resolve().is_relative_to(root) for root in _roots(folder.resolve())):
        return "it is a link to a file outside the model's folder. Put a copy in its place to take it along."
    if not _DATA.fullmatch(path.name) and not _LICENCE.fullmatch(path.name):
        return "only plain data does, and it is named like something else."
    try:
        with path.open("rb") as file:
            begin = file.read(4)
    except OSError as fault:
        raise PareError(f"{path} cannot be read ({fault.strerror}). Make it readable, or remove it.") from fault
    return "only plain data does, and it holds a program or a pickle." if begin.startswith(_PROGRAMS) else None


def _roots(folder: Path) -> list[Path]:
    """Where a link of the folder may lead: inside it, and in the hub's cache to the blobs of the same repository."""
    snapshots, repository = folder.parent, folder.parent.parent
    cached = snapshots.name == "snapshots" and repository.name.startswith("models--")
    return [folder, (repository / "blobs").resolve()] if cached else [folder]
