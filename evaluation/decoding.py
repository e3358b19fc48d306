"""A model that decodes from a static cache, and whether what it decodes is what it computes."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.evaluation.gauges import device_of, relative_error
from paredown.kernels.timing import captured

TOLERANCE = 0.05  # relative error of decoded logits that rounding explains; 16-bit models are near 0.01


class Decoding:
    """One model over one text: a prefill, then one token at a time out of the rest of the text.

    ids (batch, context + steps). `step` keeps its logits (batch, 1, vocabulary) in `logits`.
    """

    def __init__(self, model: Any, ids: Tensor, context: int) -> None:
        self.model, self.ids, self.context = model, ids, context
        self.steps = ids.shape[1] - context
        self.cache = static_cache(model, ids.shape[1])
        self.position = torch.zeros(1, dtype=torch.long, device=ids.device)  # of the token that is fed next
        self.logits = torch.empty(0)
        self._takes = inspect.signature(model.forward).parameters
        self._launch: Callable[[], object] = self.step

    def start(self) -> None:
        self.cache.reset()
        self.position.fill_(self.context)

    def prefill(self) -> None:
        self.logits = self._forward(self.ids[:, : self.context], **self._given(logits_to_keep=1))

    def step(self) -> None:
        token = self.ids.index_select(1, self.position)  # (batch, 1)
        # named, because a sliding window counts in Python, where a graph would freeze it
        self.logits = self._forward(token, **self._given(position_ids=self.position[None]))  # (batch, 1, vocabulary)
        self.position.add_(1)

    def decode(self) -> None:
        for _ in range(self.steps):
            self._launch()

    def use_graph(self, graph: torch.cuda.CUDAGraph) -> None:
        self._launch = graph.replay

    def run_once(self) -> Tensor:
        """Everything as it is timed; the logits of the first and of the last step (batch, 2, vocabulary)."""
        self.start()
        self.prefill()
        self._launch()
        first = self.logits[:, -1].clone()
        for _ in range(self.steps - 1):
            self._launch()
        return torch.stack((first, self.logits[:, -1]), dim=1)

    def plain(self) -> Tensor:
        """What `run_once` should return, by one forward over the whole text without a cache."""
        places = torch.tensor([self.context, self.ids.shape[1] - 1], device=self.ids.device)
        given = self._given(logits_to_keep=places)
        logits: Tensor = self.model(self.ids, use_cache=False, **given).logits
        return logits if given else logits[:, places]

    @property
    def rewindable(self) -> bool:
        """Whether the cache can go back to the end of the prefill by forgetting: no window, no recurrent state."""
        from transformers.cache_utils import StaticLayer

        return all(type(layer) is StaticLayer for layer in self.cache.layers)

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
        self.position.fill_(self.context)

    def _forward(self, ids: Tensor, **given: Any) -> Tensor:
        cache = "past_key_values" if "past_key_values" in self._takes else "cache_params"  # Mamba's name for it
        logits: Tensor = self.model(ids, use_cache=True, **{cache: self.cache}, **given).logits
        return logits

    def _given(self, **options: Any) -> dict[str, Any]:
        """Of these options the ones that the model's forward knows."""
        return {name: value for name, value in options.items() if name in self._takes}


def static_cache(model: Any, length: int) -> Any:
    """transformers' StaticCache for `length` tokens. A window as long as that is plain attention, and made so."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=model.config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer and layer.max_cache_len == length:
            cache.layers[index] = StaticLayer(length)  # which counts on the device: a graph can hold it
    return cache


def cache_bytes(model: Any, length: int) -> int:
    """Bytes of the cache of one sequence of `length` tokens, counted on a real one."""
    run = Decoding(model, torch.zeros(1, length, dtype=torch.long, device=device_of(model)), 2)
    run.start()
    try:
        run.prefill()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as fault:
        model(run.ids[:, :2], use_cache=False)  # if this fails as well, it is not the cache's fault
        raise PareError(
            f"{type(model).__name__} cannot run with a static cache in this version of transformers "
            f"({type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}). Upgrade transformers."
        ) from fault
    return sum(t.numel() * t.element_size() for layer in run.cache.layers for t in _tensors(vars(layer)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def compare(decoded: Tensor, wanted: Tensor, name: str) -> dict[str, float]:
    """Relative Frobenius error of the first and the last step's logits (batch, 2, vocabulary)."""
    if not bool(decoded.isfinite().all()) or not bool(wanted.isfinite().all()):
        raise PareError(
            f"{name} computes logits that are NaN or infinite: its speed means nothing. "
            "Check the checkpoint with `paredown verify`, or try --dtype bfloat16 or float32."
        )
    first, last = (relative_error(decoded[:, i], wanted[:, i]) for i in (0, 1))
    return {"first": first, "last": last}


def graphs_or_eager(runs: dict[str, Decoding], errors: dict[str, dict[str, float]]) -> str | None:
    """Make every run decode by a CUDA graph that is found right, or say why not and make them all anew without one.

    `errors` become those of the graphs.
    """
    first = next(iter(runs.values()))
    ids, context = first.ids, first.context
    with torch.cuda.device(ids.device):
        why = use_graphs(runs, errors)
    if why is not None:
        models = {name: run.model for name, run in runs.items()}
        del first
        runs.clear()  # and their caches, before others are made
        for name, model in models.items():
            runs[name] = Decoding(model, ids, context)
            runs[name].run_once()
    return why


def use_graphs(runs: Mapping[str, Decoding], errors: dict[str, dict[str, float]]) -> str | None:
    """The first half of `graphs_or_eager`."""
    for run in runs.values():
        run.start()
        run.prefill()
    graphs = captured({name: run.step for name, run in runs.items()})
    if graphs is None:
        return "a step cannot be captured into one"
    for name, run in runs.items():
        run.use_graph(graphs[name])
        error = compare(run.run_once(), run.plain(), name)
        if max(error.values()) > max(TOLERANCE, 2 * max(errors[name].values())):
            return f"the captured step of {name} does not compute what the model computes"
        errors[name] = error
    return None
