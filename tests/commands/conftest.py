"""A command as a person types it, in this process: a new one takes seconds to import torch and transformers."""

import sys

import pytest

from paredown.commands.app import main


@pytest.fixture
def paredown(capsys, monkeypatch):
    """Run one command; returns exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["paredown", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
