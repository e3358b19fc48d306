"""Decoding from a static cache, and a check of the decoded logits against a forward without a cache."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.evaluation.gauges import device_of, relative_error
from paredown.evaluation.schema import LogitError
from paredown.kernels.timing import captured

TOLERANCE = 0.05  # relative error of decoded logits up to which rounding explains it; 16-bit models are near 0.01

Capture = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, torch.cuda.CUDAGraph] | None]


class Decoding:
    """One model on one text: a prefill of the first `context` tokens, then the other tokens one at a time.

    ids (batch, context + steps). After each forward `logits` are those of its last token, (batch, 1, vocabulary).
    """

    def __init__(self, model: Any, ids: Tensor, context: int) -> None:
        self.model, self.ids, self.context = model, ids, context
        self.steps = ids.shape[1] - context
        self.cache = static_cache(model, ids.shape[1])
        self.position = torch.zeros(1, dtype=torch.long, device=ids.device)  # of the next input token
        self.logits = torch.empty(0)
        self._accepted = inspect.signature(model.forward).parameters
        self._launch: Callable[[], object] = self.step

    def start(self) -> None:
        """Empty the cache."""
        self.cache.reset()
        self.position.fill_(self.context)

    def prefill(self) -> None:
        self.logits = self._forward(self.ids[:, : self.context], **self._supported(logits_to_keep=1))

    def step(self) -> None:
        token = self.ids.index_select(1, self.position)  # (batch, 1)
        # the position as a tensor: a sliding window counts tokens in Python, where a CUDA graph would freeze the count
        self.logits = self._forward(
            token, **self._supported(position_ids=self.position[None])
        )  # (batch, 1, vocabulary)
        self.position.add_(1)

    def decode(self) -> None:
        """All steps after the prefill."""
        for _ in range(self.steps):
            self._launch()

    def use_graph(self, graph: torch.cuda.CUDAGraph, logits: Tensor) -> None:
        """Replay this graph of `step`, which writes to `logits`, instead of calling it."""

        def launch() -> None:
            graph.replay()
            self.logits = logits

        self._launch = launch

    def run_once(self) -> Tensor:
        """Prefill and decode as they are timed. Returns the logits of the first and the last step, (batch, 2, vocabulary)."""
        self.start()
        self.prefill()
        self._launch()
        first = self.logits[:, -1].clone()
        for _ in range(self.steps - 1):
            self._launch()
        return torch.stack((first, self.logits[:, -1]), dim=1)

    def plain(self) -> Tensor:
        """The same logits by one forward over the whole text without a cache, (batch, 2, vocabulary)."""
        places = torch.tensor([self.context, self.ids.shape[1] - 1], device=self.ids.device)
        option = self._supported(logits_to_keep=places)
        logits: Tensor = self.model(self.ids, use_cache=False, **option).logits
        return logits if option else logits[:, places]

    @property
    def rewindable(self) -> bool:
        """Whether `rewind` works: not for a sliding window or a recurrent state, which overwrite earlier tokens."""
        from transformers.cache_utils import StaticLayer

        return all(type(layer) is StaticLayer for layer in self.cache.layers)

    def rewind(self) -> None:
        """Go back to the end of the prefill."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
        self.position.fill_(self.context)

    def _forward(self, ids: Tensor, **options: Any) -> Tensor:
        cache = "past_key_values" if "past_key_values" in self._accepted else "cache_params"  # as Mamba names it
        logits: Tensor = self.model(ids, use_cache=True, **{cache: self.cache}, **options).logits
        return logits

    def _supported(self, **options: Any) -> dict[str, Any]:
        """Those of the options that the model's forward accepts."""
        return {name: value for name, value in options.items() if name in self._accepted}


def static_cache(model: Any, length: int) -> Any:
    """transformers' StaticCache for `length` tokens. Sliding windows that are never full become plain layers."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=model.config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer and layer.max_cache_len == length:
            cache.layers[index] = StaticLayer(length)  # counts tokens on the device, as a CUDA graph needs it
    return cache


def cache_bytes(model: Any, length: int) -> int:
    """Bytes of the static cache of one sequence of `length` tokens, counted after two tokens were run.

    Raises PareError if the model cannot run with a static cache.
    """
    run = Decoding(model, torch.zeros(1, length, dtype=torch.long, device=device_of(model)), 2)
    run.start()
    try:
        run.prefill()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        model(run.ids[:, :2], use_cache=False)  # raises its own error if the cache is not the cause
        raise PareError(
            f"{type(model).__name__} cannot run with a static cache in this version of transformers "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Upgrade transformers."
        ) from error
    return sum(t.numel() * t.element_size() for layer in run.cache.layers for t in _tensors(vars(layer)))


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def compare(decoded: Tensor, plain: Tensor, name: str) -> LogitError:
    """Relative error (Frobenius norm) of the logits of the first and of the last step, each (batch, 2, vocabulary).

    Raises PareError if logits are not finite; `name` is the model's, for the message.
    """
    if not bool(decoded.isfinite().all()) or not bool(plain.isfinite().all()):
        raise PareError(
            f"{name} computes logits that are NaN or infinite: its speed means nothing. "
            "Check the checkpoint with `paredown verify`, or try --dtype bfloat16 or float32."
        )
    first, last = (relative_error(decoded[:, i], plain[:, i]) for i in (0, 1))
    return {"first": first, "last": last}


def graphs_or_eager(
    runs: dict[str, Decoding], errors: dict[str, LogitError], capture: Capture = captured
) -> str | None:
    """Make all runs decode by CUDA graphs, or none: returns None, or the reason why graphs cannot be used.

    A graph is used only if its logits are as close to those of a plain forward as the model's own in `errors`, which are
    replaced by those of the graph. If one run fails, all runs are replaced by new ones without a graph.
    """
    first = next(iter(runs.values()))
    ids, context = first.ids, first.context
    with torch.cuda.device(ids.device) if ids.is_cuda else nullcontext():
        reason = use_graphs(runs, errors, capture)
    if reason is not None:
        models = {name: run.model for name, run in runs.items()}
        del first
        runs.clear()  # frees their caches before new ones are allocated
        for name, model in models.items():
            runs[name] = Decoding(model, ids, context)
            runs[name].run_once()
    return reason


def use_graphs(runs: Mapping[str, Decoding], errors: dict[str, LogitError], capture: Capture = captured) -> str | None:
    """As `graphs_or_eager`, but after a failure the runs can no longer be used."""
    for run in runs.values():
        run.start()
        run.prefill()
    graphs = capture({name: run.step for name, run in runs.items()})
    if graphs is None:
        return "a step cannot be captured into one"
    for name, run in runs.items():
        run.use_graph(graphs[name], run.logits)  # still those of the step that was captured
        error = compare(run.run_once(), run.plain(), name)
        if largest(error) > max(TOLERANCE, 2 * largest(errors[name])):
            return f"the captured step of {name} does not compute what the model computes"
        errors[name] = error
    return None


def largest(error: LogitError) -> float:
    """The larger of both errors."""
    return max(error["first"], error["last"])
