"""The rounds of a greedy choice, one after another: those that are known from an earlier run are not measured again."""

from collections.abc import Callable
from dataclasses import dataclass, field

from paredown.compress.progress import ignore

Values = dict[str, float]  # of each candidate by name, in nats


@dataclass
class Rounds:
    """What each round found, in order; `keep` is called with all of them after one was measured."""

    known: list[Values] = field(default_factory=list)
    keep: Callable[[list[Values]], object] = ignore

    def values(self, number: int, measure: Callable[[], Values]) -> Values:
        """Those of a round, from 0: measured if it comes after the known ones."""
        if number == len(self.known):
            self.known.append(measure())
            self.keep(self.known)
        return self.known[number]
