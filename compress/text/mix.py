"""Several texts that calibrate together: so many windows of each, in an order that the seed decides."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import torch

from paredown.compress.text.windows import Windows


def counts(total: int, weights: Sequence[float]) -> list[int]:
    """`total` windows divided in proportion to the weights, by largest remainders; of equal ones the first gets more."""
    whole = sum(map(Fraction, weights))
    shares = [total * Fraction(weight) / whole for weight in weights]
    found = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: found[i] - shares[i])
    for i in by_remainder[: total - sum(found)]:
        found[i] += 1
    return found


def mixed(parts: Sequence[Windows], seed: int) -> Windows:
    """All windows of the parts, which have one length, shuffled by the seed. A single part stays as it is."""
    if len(parts) == 1:
        return parts[0]
    ids = torch.cat([part.ids for part in parts])  # (windows, length)
    order = list(range(len(ids)))
    random.Random(seed).shuffle(order)
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()

    def told(words: Sequence[str]) -> str:
        return " + ".join(dict.fromkeys(words))

    return replace(
        parts[0],
        ids=ids[order],
        corpus=told([part.corpus for part in parts]),
        split=told([part.split for part in parts]),
        sha256=digest,
        revision=None,
        whole=None,
        chat=all(part.chat for part in parts),
        sampling=told([part.sampling for part in parts]),
        bos=told([part.bos for part in parts]),
        text_tokens=None,
        parts=tuple(parts),
    )
