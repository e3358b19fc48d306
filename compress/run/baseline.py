"""The dense model's side of a comparison: each text behind its last block, walked once and kept in the user's cache."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.model.stream import BATCH_TOKENS, Stream
from paredown.compress.progress import ignore
from paredown.compress.run.score_cache import ScoreCache, content_key
from paredown.compress.run.scoring import walked
from paredown.compress.text.windows import Windows


@dataclass(frozen=True)
class Baseline:
    """The dense model that others are compared with, and where its hidden states are kept; None: nowhere."""

    source: ModelSource
    cache: ScoreCache | None = None
    note: Callable[[str], None] = ignore

    def has(self, windows: Windows) -> bool:
        """Whether a text need not be run through the blocks."""
        return self.cache is not None and self.cache.has_states(self._key(windows))

    def behind(
        self,
        texts: Sequence[Windows],
        done: Mapping[int, Stream] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Stream]:
        """Each text behind the last block. `done`: those that have been walked, by their number.

        What is not in the cache is walked now, and kept. `progress` is called with (blocks done, blocks).
        """
        streams = dict(done or {})
        known = {i: found for i in range(len(texts)) if i not in streams and (found := self._known(texts[i]))}
        missing = [i for i in range(len(texts)) if i not in streams and i not in known]
        streams |= dict(zip(missing, walked(self.source, [texts[i] for i in missing], progress), strict=True))
        for i, stream in streams.items():
            self._keep(texts[i], stream)
        if known:
            names = ", ".join(texts[i].corpus for i in known)
            self.note(
                f"dense scores of {names} taken from {self.cache and self.cache.folder} (--no-cache measures anew)"
            )
        streams |= known
        return [streams[i] for i in range(len(texts))]

    def _known(self, windows: Windows) -> Stream | None:
        hidden = self.cache.states(self._key(windows)) if self.cache else None
        if hidden is None or sum(map(len, hidden)) != len(windows.ids):
            return None
        return Stream(hidden, [], list(windows.ids.split([len(part) for part in hidden])), self.source.device)

    def _keep(self, windows: Windows, stream: Stream) -> None:
        if self.cache:
            self.cache.keep_states(self._key(windows), stream.hidden)

    def _key(self, windows: Windows) -> str:
        tokens = hashlib.sha256(windows.ids.numpy().tobytes()).hexdigest()
        batch = BATCH_TOKENS[self.source.device.type]
        return content_key(self.source.folder, self.source, text=[tokens, list(windows.ids.shape), batch])
