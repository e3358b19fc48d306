"""What is answered before torch is imported, each in a new process."""

import subprocess
import sys

import pytest

MAIN = """import sys
from paredown.commands.app import main
try:
    main()
finally:
    heavy = {'torch', 'transformers', 'datasets', 'lm_eval'} & set(sys.modules)
    assert not heavy, heavy
"""


def run(*arguments):
    done = subprocess.run([sys.executable, "-c", MAIN, *map(str, arguments)], capture_output=True, text=True)
    assert "AssertionError" not in done.stderr, done.stderr[-2000:]
    return done.returncode, done.stdout, done.stderr.replace("\n", " ")


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("compress", "-h"), ("--version",), ("recipes",)])
def test_help_version_and_recipes_import_nothing_heavy(arguments):
    assert run(*arguments)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-r", "wanda-51"), "no recipe is called 'wanda-51', and no such file exists. Did you mean 'wanda-50'?"),
        (("-r", "wanda-50", "--set", "calibraton.seed=1"), "calibraton: there is no such key. Did you mean 'calibration'?"),
        (("-r", "wanda-50", "--set", "calibration.length"), "must look like key=value"),
        (("-r", "nowhere.yaml"), "the recipe file nowhere.yaml does not exist"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_before_torch_is_imported(arguments, said, tmp_path):
    for command in ("compress", "plan"):
        code, told, error = run(command, tmp_path, "-o", tmp_path / "out", *arguments)
        assert (code, told) == (1, "") and said in error


def test_a_folder_that_is_not_there_and_an_out_that_is_full_are_refused_before_torch_is_imported(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    given = ("-r", "wanda-50", "-o")
    for command in (
        ("compress", tmp_path, *given, full),
        ("plan", tmp_path, *given, full),
        ("export", tmp_path, "-o", full),
    ):
        code, _, error = run(*command)
        assert code == 1 and "full exists and is not empty. Name another output with -o" in error
    missing = tmp_path / "missing"
    for command in (
        ("compress", missing, *given, tmp_path / "new"),
        ("eval", tmp_path, "--against", missing),
        ("bench", missing),
    ):
        code, _, error = run(*command)
        assert code == 1 and "missing: no such folder" in error


def test_a_folder_that_holds_no_adapter_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "adapter").mkdir()
    code, _, error = run("merge", tmp_path, "--adapter", tmp_path / "adapter", "-o", tmp_path / "new")
    assert (
        code == 1 and "adapter holds no adapter_config.json: name the folder that peft's save_pretrained wrote" in error
    )


def test_transformers_learns_our_format_when_it_is_imported_after_us():
    code = "import paredown.compress, sys; assert 'torch' not in sys.modules; import importlib.util as u; "
    code += "u.find_spec('transformers'); import transformers; "  # a look for it is no import
    code += "transformers.AutoConfig.for_model('paredown_llama')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
