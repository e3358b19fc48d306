"""Times are the median over repeats, of calls that take turns, and of CUDA graphs if all calls can be captured."""

import time

import pytest
import torch

from paredown.kernels.timing import WARM_UP, Timing, captured, in_turn, interleaved

CPU = torch.device("cpu")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def time_of(call, repeats, **options):
    """The time of one call on the CPU."""
    return interleaved({"": call}, CPU, repeats, **options)[""]


def test_a_call_that_sleeps_takes_as_long_as_it_sleeps():
    result = time_of(lambda: time.sleep(0.02), repeats=5)
    assert 0.02 <= result.low <= result.median <= result.high and result.median < 0.03
    assert not result.graph


def test_the_median_is_that_of_sorted_times_and_the_range_their_ends():
    for seconds in ([3.0, 1.0, 2.0], [4.0, 1.0, 3.0, 2.0], [5.0]):
        ranked = sorted(seconds)
        middle = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
        assert Timing.of(seconds) == Timing(middle, ranked[0], ranked[-1])


def test_calls_are_measured_in_turn_and_none_always_after_the_same_one():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(calls, CPU, repeats=4)
    assert list(times) == ["a", "b", "c"]
    measured = order[3 * WARM_UP :]
    assert "".join(measured) == "abccbaabccba"
    assert in_turn(calls, 0) == ["a", "b", "c"] and in_turn(calls, 1) == ["c", "b", "a"]


def test_warm_up_calls_are_not_counted():
    seconds, calls = iter(range(1000)), []
    result = time_of(lambda: calls.append(len(calls)), repeats=2, clock=lambda: float(next(seconds)))
    assert len(calls) == WARM_UP + 2
    assert result == Timing(1.0, 1.0, 1.0) and next(seconds) == 4  # the clock was read before and after two calls only


def test_gradients_are_not_recorded_while_timing():
    seen = []
    time_of(lambda: seen.append(torch.is_grad_enabled()), repeats=1)
    assert seen and not any(seen)


def test_less_than_one_repeat_is_refused():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        time_of(lambda: None, repeats=0)


@on_cuda
def test_on_cuda_a_graph_is_timed_that_computes_what_the_call_computes():
    x, y = torch.randn(256, 256, device="cuda"), torch.zeros(256, 256, device="cuda")
    times = interleaved({"sum": lambda: y.add_(1), "product": lambda: x @ x}, torch.device("cuda"), repeats=5)
    assert all(timed.graph and 0 < timed.low <= timed.median <= timed.high < 1 for timed in times.values())
    assert float(y[0, 0]) == float(y[-1, -1]) == WARM_UP + 1 + 5  # capturing itself adds nothing


@on_cuda
def test_a_call_that_no_graph_can_hold_is_timed_eagerly_and_so_is_its_rival():
    x = torch.randn(64, device="cuda")
    before = torch.cuda.current_stream()
    times = interleaved({"reads": lambda: x.sum().item(), "plain": lambda: x + 1}, torch.device("cuda"), repeats=3)
    assert not any(timed.graph for timed in times.values())
    assert torch.cuda.current_stream() == before
    assert captured({"plain": lambda: x + 1}) is not None  # and the next capture works
