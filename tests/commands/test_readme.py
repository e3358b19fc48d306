"""What the README promises, run as it stands there."""

import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from paredown.compress.run import whole

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


def new_process(code, *arguments, cwd):
    """What Python code prints in a process that has seen nothing; a wide terminal, so that no table is folded."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, f"{arguments}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_every_command_and_every_python_block_runs_in_order(workplace, paredown, monkeypatch, verified_here):
    monkeypatch.chdir(workplace)
    assert len(COMMANDS) >= 7
    for command in COMMANDS:
        code, _, said = paredown(*shlex.split(command, comments=True)[1:]) if "demo" not in command else (0, "", "")
        if command.startswith("paredown tune") and not torch.cuda.is_available():
            assert code == 1 and "this machine has none" in said
        else:
            assert code == 0, f"{command}\n{said[-3000:]}"
    # in a new process, which knows nothing of packed checkpoints before it imports us
    each = "import sys\nfor block in sys.argv[1:]: exec(block, {'__name__': 'readme'})"
    new_process(each, *(text for kind, text in BLOCKS if kind == "python"), cwd=workplace)


@pytest.mark.slow
def test_the_demo_prints_its_table(tmp_path, paredown, monkeypatch, verified_here):
    """Of a part of its text and of its questions."""
    assert any(command.startswith("paredown demo") for command in COMMANDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(whole, "run_tasks", partial(whole.run_tasks, limit=20))
    code, told, said = paredown("demo", "-o", "out/demo", "--eval-windows", "16")
    assert code == 0, said
    assert "stdlib (evaluation)" in told and "stdlib_lines" in told
    assert (tmp_path / "out" / "demo" / "report.json").exists()


def test_the_two_make_commands_stand_in_the_makefile():
    makefile = README.with_name("Makefile").read_text()
    assert all(f"\n{target}:" in makefile and f"make {target}" in README.read_text() for target in ("demo", "test"))
