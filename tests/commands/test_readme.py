"""What the README promises, run as it stands there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(), re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.startswith("paredown ")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, save_model, text_file):
    """A folder with what the README's commands name: `my-model` and `my-text.txt`."""
    import transformers

    folder = tmp_path_factory.mktemp("readme")
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    save_model(folder / "my-model", config)
    (folder / "my-text.txt").write_text(text_file.read_text())
    return folder


def run(arguments, folder):
    # a wide terminal, so that no table is folded
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=folder, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, f"{arguments}\n{done.stderr[-3000:]}"
    return done.stdout


def test_every_command_and_every_python_block_runs_in_order(workplace):
    assert len(COMMANDS) >= 7
    for command in COMMANDS:
        if not command.startswith(("paredown demo", "paredown tune")):
            run([sys.executable, "-m", "paredown.commands.app", *shlex.split(command, comments=True)[1:]], workplace)
    needs_a_gpu = next(command for command in COMMANDS if command.startswith("paredown tune"))
    if not torch.cuda.is_available():
        tuned = [sys.executable, "-m", "paredown.commands.app", *shlex.split(needs_a_gpu, comments=True)[1:]]
        done = subprocess.run(tuned, capture_output=True, text=True, cwd=workplace)
        assert done.returncode == 1 and "this machine has none" in done.stderr
    for kind, text in BLOCKS:
        if kind == "python":
            run([sys.executable, "-c", text], workplace)


def test_the_demo_prints_its_table(tmp_path):
    assert any(command.startswith("paredown demo") for command in COMMANDS)
    told = run([sys.executable, "-m", "paredown.commands.app", "demo", "-o", "out/demo"], tmp_path)
    assert "stdlib (evaluation)" in told and "stdlib_lines" in told
    assert (tmp_path / "out" / "demo" / "report.json").exists()


def test_the_two_make_commands_stand_in_the_makefile():
    makefile = README.with_name("Makefile").read_text()
    assert all(f"\n{target}:" in makefile and f"make {target}" in README.read_text() for target in ("demo", "test"))
