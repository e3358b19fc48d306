"""What a person sees while a command works: on a terminal, in a log, and with --quiet and --verbose."""

import io
import sys

import pytest
from rich.console import Console

from paredown.commands import screen as module
from paredown.commands.screen import screen
from paredown.compress.progress import BlockDone, Counted, Pace
from paredown.evaluation import terminal


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(Pace, "clock", staticmethod(clock))
    monkeypatch.setattr(module, "Pace", lambda *given: Pace(*given, clock=clock))
    return clock


@pytest.fixture
def console(monkeypatch):
    """`console(terminal)`: standard error becomes a text that can be read."""

    def make(is_terminal):
        text = io.StringIO()
        found = Console(file=text, force_terminal=is_terminal, width=160, highlight=False)
        monkeypatch.setattr(module, "err_console", found)
        monkeypatch.setattr(terminal, "err_console", found)
        return text

    return make


def done(index):
    return BlockDone(index, 4, f"layers.{index}", 0.5, 0.01, 2.0, 10**9)


def test_what_is_left_follows_from_the_steps_done_here_and_runs_down_between_them():
    clock = Clock()
    pace = Pace("compressing", total=10, done=4, clock=clock)  # an interrupted run had done 4
    clock.now = 3.0
    assert pace.left is None
    pace.reach(5)
    assert pace.left == 15.0
    clock.now = 5.0
    assert pace.left == 13.0
    pace.reach(6)
    assert pace.left == 4 * 2.5
    clock.now = 100.0
    assert pace.left == 0.0


def test_a_log_keeps_a_line_for_each_block_with_the_time_left(console, clock):
    text = console(False)
    with screen() as shown:
        shown.note(Counted.block("survey", 0, 2))
        clock.now = 2.0
        shown.note(Counted.block("survey", 1, 2))
        for index in range(3):
            shown.doing(Counted("", "compressing", index, 4))
            clock.now += 10.0
            shown.block(done(index))
    lines = text.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == ["survey: block 1 of 2", "survey: block 2 of 2"]
    assert lines[2].startswith("[  1/4] layers.0") and lines[2].endswith("0:00:30 left")
    assert lines[4].endswith("0:00:10 left")


def test_a_terminal_counts_steps_in_its_live_line_and_keeps_notes_and_blocks(console):
    text = console(True)
    with screen() as shown:
        shown.note("a choice")
        shown.note(Counted.block("survey, forward", 2, 4))
        shown.live.refresh()
        shown.doing(Counted("", "compressing", 1, 4))
        shown.doing("reading layers.1")
        shown.live.refresh()
        shown.block(done(1))
    told = text.getvalue()
    assert "a choice" in told and "layers.1  kept 0.500" in told
    assert "survey, forward" in told and "3/4" in told and "reading layers.1" in told
    assert "survey, forward: block" not in told


def test_quiet_shows_nothing_and_verbose_every_step(console):
    text = console(False)
    with screen(quiet=True) as shown:
        shown.note("a choice")
        shown.note(Counted.block("survey", 0, 2))
        shown.doing("reading layers.1")
        shown.block(done(1))
        shown.bar(1, 3)
    assert text.getvalue() == ""
    with screen(verbose=True) as shown:
        shown.doing("reading layers.1")
    assert "reading layers.1" in text.getvalue()
    with screen() as shown:
        shown.doing("reading layers.2")
    assert "layers.2" not in text.getvalue()


def test_quiet_hides_what_libraries_draw_and_no_result(capsys):
    with screen(quiet=True):
        print("a bar", file=sys.stderr)
        print("a result")
    assert capsys.readouterr() == ("a result\n", "")


def test_quiet_and_verbose_contradict_each_other(paredown, tmp_path):
    code, _, said = paredown("verify", tmp_path, "-q", "-v")
    assert code == 2 and "shows less" in said
