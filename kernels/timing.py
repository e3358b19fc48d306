"""How long a call takes: the median of repeats with the smallest and the largest, several calls measured in turn.

On CUDA a call is captured into a graph, so that the GPU's work is timed and not Python's; before each repeat a buffer
larger than the L2 cache is written, because the weights of a model that decodes come from memory; and time is what
passes between two CUDA events, which the launch of a graph is a part of (a few microseconds, for every call alike).
On a CPU it is `time.perf_counter`, and caches are as the calls leave them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

WARM_UP = 3  # calls before the first that counts: lazy initialisation, compilation, choice of algorithms

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds. `graph` says whether a CUDA graph was timed, or the call as Python launches it."""

    median: float
    low: float
    high: float
    graph: bool = False

    @classmethod
    def of(cls, seconds: Sequence[float], graph: bool = False) -> "Timing":
        return cls(median(seconds), min(seconds), max(seconds), graph)


def median_seconds(call: Call, device: torch.device, repeats: int = 20) -> Timing:
    """The time of one call. It must not depend on being called only once."""
    return interleaved({"": call}, device, repeats)[""]


def interleaved(calls: Mapping[str, Call], device: torch.device, repeats: int = 20) -> dict[str, Timing]:
    """The time of each call, one of each in turn: what the machine does meanwhile then falls on all of them alike.

    If one of them cannot be captured into a CUDA graph, none of them is timed as a graph. Raises ValueError for fewer
    than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    if device.type == "cuda":
        with torch.cuda.device(device), torch.no_grad():
            return _on_cuda(calls, device, repeats)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for call in calls.values():
            for _ in range(WARM_UP):
                call()
        for repeat in range(repeats):
            for name in in_turn(calls, repeat):
                began = perf_counter()
                calls[name]()
                seconds[name].append(perf_counter() - began)
    return {name: Timing.of(measured) for name, measured in seconds.items()}


def in_turn(names: Iterable[str], repeat: int) -> list[str]:
    """The order of one repeat: forwards and backwards in turn, so that none always follows the same one."""
    return list(names)[:: 1 if repeat % 2 == 0 else -1]


def _on_cuda(calls: Mapping[str, Call], device: torch.device, repeats: int) -> dict[str, Timing]:
    graphs = captured(calls)
    launches = calls if graphs is None else {name: graph.replay for name, graph in graphs.items()}
    flush = torch.empty(_flush_bytes(device), dtype=torch.uint8, device=device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for launch in launches.values():
        launch()
    torch.cuda.synchronize(device)
    for repeat in range(repeats):
        for name in in_turn(calls, repeat):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()  # takes the GPU longer than the CPU needs to queue what follows
            began.record()
            launches[name]()
            ended.record()
            events[name].append((began, ended))
        torch.cuda.synchronize(device)
    return {
        name: Timing.of([began.elapsed_time(ended) / 1000 for began, ended in pairs], graphs is not None)
        for name, pairs in events.items()
    }


def captured(calls: Mapping[str, Call]) -> dict[str, torch.cuda.CUDAGraph] | None:
    """A CUDA graph of each call on the current device, after a warm-up on a stream of its own; None if one fails."""
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
        except Exception:  # whatever a call does that a graph cannot hold; run eagerly, a real fault shows again
            torch.cuda.set_stream(current)  # a capture that fails leaves its own stream behind
            torch.cuda.synchronize()
            return None
        graphs[name] = graph
    return graphs


def _flush_bytes(device: torch.device) -> int:
    return max(2 * int(torch.cuda.get_device_properties(device).L2_cache_size), 1 << 26)
