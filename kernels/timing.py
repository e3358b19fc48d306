"""How long calls take: the median over repeats, with the smallest and the largest. Several calls take turns.

On CUDA each call is captured into a graph, so that the work of the GPU is timed and not that of Python, unless that is asked
for. Before each repeat
a buffer larger than the L2 cache is written, because a model that decodes reads its weights from memory. The time is that
between two CUDA events; it includes the launch of the graph, a few microseconds that are the same for every call.
On a CPU the time is that of `time.perf_counter`, and the caches hold whatever the calls left in them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

WARM_UP = 3  # untimed calls at the start: lazy initialisation, compilation, choice of algorithms

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median, smallest and largest time in seconds. `graph`: a CUDA graph was timed, and not the call from Python."""

    median: float
    low: float
    high: float
    graph: bool = False

    @classmethod
    def of(cls, seconds: Sequence[float], graph: bool = False) -> "Timing":
        return cls(median(seconds), min(seconds), max(seconds), graph)


def interleaved(
    calls: Mapping[str, Call], device: torch.device, repeats: int = 20, clock: Callable[[], float] = perf_counter,
    graphs: bool = True,
) -> dict[str, Timing]:  # fmt: skip
    """The time of each call. The calls take turns, so that other load on the machine slows all of them alike.

    A call runs more than `repeats` times, and every run must do the same work. If one of the calls cannot be captured into
    a CUDA graph, none is timed as a graph; without `graphs` none is, and where Python launches more slowly than the GPU
    works, that is the time. `clock` returns seconds and is read on a CPU only; on CUDA, events are.
    Raises ValueError for fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    if device.type == "cuda":
        with torch.cuda.device(device), torch.no_grad():
            return _on_cuda(calls, device, repeats, graphs)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for call in calls.values():
            for _ in range(WARM_UP):
                call()
        for repeat in range(repeats):
            for name in in_turn(calls, repeat):
                start = clock()
                calls[name]()
                seconds[name].append(clock() - start)
    return {name: Timing.of(times) for name, times in seconds.items()}


def in_turn(names: Iterable[str], repeat: int) -> list[str]:
    """The order of calls in one repeat: forwards if `repeat` is even, else backwards. So none always follows the same."""
    return list(names)[:: 1 if repeat % 2 == 0 else -1]


def _on_cuda(calls: Mapping[str, Call], device: torch.device, repeats: int, capture: bool) -> dict[str, Timing]:
    graphs = captured(calls) if capture else None
    launches = calls if graphs is None else {name: graph.replay for name, graph in graphs.items()}
    flush = torch.empty(max(2 * l2_bytes(device), 1 << 26), dtype=torch.uint8, device=device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for launch in launches.values():
        launch()
    torch.cuda.synchronize(device)
    for repeat in range(repeats):
        for name in in_turn(calls, repeat):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()  # keeps the GPU busy until the CPU has queued the launch below
            start.record()
            launches[name]()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize(device)
    return {
        name: Timing.of([start.elapsed_time(end) / 1000 for start, end in pairs], graphs is not None)
        for name, pairs in events.items()
    }


def captured(calls: Mapping[str, Call]) -> dict[str, torch.cuda.CUDAGraph] | None:
    """A CUDA graph of each call, on the current device; None if one of them cannot be captured.

    Each call first runs WARM_UP times, on a separate stream.
    """
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for call in calls.values():
            for _ in range(WARM_UP):
                call()
    current.wait_stream(stream)
    torch.cuda.synchronize()
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, call in calls.items():
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                call()
        except Exception:  # the call cannot be captured; if it is simply wrong, it fails again when it is run directly
            torch.cuda.set_stream(current)  # a failed capture does not restore the stream
            torch.cuda.synchronize()
            return None
        graphs[name] = graph
    return graphs


def l2_bytes(device: torch.device) -> int:
    """The size of a GPU's L2 cache; 0 for a CPU."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0
