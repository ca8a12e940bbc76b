"""Which domain each block of a mixture comes from: a pure function of weights, seed and the block's number.

Weights are whole numbers of blocks in a period of up to 100,000. Within a period every domain's j-th block has a
window, [floor(j / w), ceil((j + 1) / w)), in which it has to come for the domain to stay within one block of its
share; taking the block whose window ends first keeps all of them (earliest deadline first, as in Pfair scheduling:
Baruah, Cohen, Plaxton and Varvel, Algorithmica 15, 1996). Then each group of `GROUP` blocks is shuffled, so that no
rank and no place in a batch has a domain of its own.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np


# Weights are multiples of one over this
PERIOD = 100_000
# Blocks that are shuffled among themselves
GROUP = 8
# The article's mixture. What is left to "*" is shared evenly by all other domains: languages, mostly.
PRESETS: dict[str, dict[str, float]] = {"article": {"code": 0.35, "maths": 0.18, "*": 0.47}}

Weights = Mapping[str, float]


class MixtureError(ValueError):
    """A mixture that cannot be made, or does not fit its streams; the message names the domain."""


def weights_of(weights: Weights | str, domains: list[str]) -> dict[str, float]:
    """Checked weights of all domains, in the order of `domains`; those that are not named have 0.

    Args:
        weights: shares of tokens by domain, which sum to 1, or the name of a preset.

    Raises:
        MixtureError: see above.
    """
    if isinstance(weights, str):
        if weights not in PRESETS:
            raise MixtureError(f"no preset {weights!r}: there are {', '.join(PRESETS)}")
        preset = PRESETS[weights]
        others = [name for name in domains if name not in preset]
        if not others:
            raise MixtureError(f"the preset {weights!r} needs domains beside {', '.join(list(preset)[:-1])}")
        weights = {name: share for name, share in preset.items() if name != "*"}
        weights |= dict.fromkeys(others, preset["*"] / len(others))
    if not isinstance(weights, Mapping) or not weights:
        raise MixtureError(f"weights are shares by domain or a preset's name, not {weights!r}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
            raise MixtureError(f"the weight of {name!r} is a share of tokens from 0 to 1, not {weight!r}")
        if name not in domains:
            raise MixtureError(f"there is a weight for {name!r}, and no stream: there are {', '.join(domains)}")
        if 0 < weight < 1 / PERIOD:
            raise MixtureError(f"the weight of {name!r}, {weight:g}, is less than one block in {PERIOD:,}")
    total = math.fsum(weights.values())
    if abs(total - 1) > 1e-6:
        raise MixtureError(f"the weights sum to {total:.6g}, not to 1: {dict(weights)}")
    return {name: float(weights.get(name, 0.0)) for name in domains}


def quotas_of(weights: Weights) -> np.ndarray:
    """Blocks of each domain in the shortest period that holds the weights (largest remainders): int64 `(domains,)`."""
    exact = np.array(list(weights.values()), dtype=np.float64) * PERIOD
    quotas = np.floor(exact + 1e-6).astype(np.int64)
    short = PERIOD - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:short]] += 1
    return quotas // math.gcd(*quotas.tolist())


@lru_cache(maxsize=16)
def period_order(quotas: tuple[int, ...], seed: int) -> np.ndarray:
    """Domains of the blocks of one period, before groups are shuffled: uint16 `(sum(quotas),)`.

    After n blocks, every domain has had less than one block more or less than n times its share.
    """
    period = sum(quotas)
    numbers = np.concatenate([np.arange(quota) for quota in quotas])
    domains: np.ndarray = np.repeat(np.arange(len(quotas)), quotas)
    of = np.array(quotas, dtype=np.int64)[domains]
    first = numbers * period // of
    last = -((numbers + 1) * period // -of)
    # Of two blocks whose windows end together, the seed says which comes first
    ties = np.random.default_rng((seed, period)).random(period)
    waiting = iter(sorted(zip(first.tolist(), last.tolist(), ties.tolist(), domains.tolist(), strict=True)))
    following = next(waiting, None)
    ready: list[tuple[int, float, int]] = []
    order: np.ndarray = np.empty(period, dtype=np.uint16)
    for place in range(period):
        while following is not None and following[0] <= place:
            heapq.heappush(ready, following[1:])
            following = next(waiting, None)
        order[place] = heapq.heappop(ready)[2]
    return order


@dataclass(frozen=True)
class _Phase:
    """Blocks from `start` up to `end` (None: for ever) with the same weights."""

    number: int
    start: int
    end: int | None
    quotas: tuple[int, ...]
    seed: int

    @cached_property
    def order(self) -> np.ndarray:
        return period_order(self.quotas, self.seed)

    def group(self, number: int) -> np.ndarray:
        """Domains of the group of that number, counted from the phase's start, in their order."""
        places = np.arange(number * GROUP, (number + 1) * GROUP)
        if self.end is not None:
            places = places[places < self.end - self.start]
        drawn = np.random.default_rng((self.seed, self.number, number)).permutation(len(places))
        return self.order[places[drawn] % len(self.order)]

    def counts(self, blocks: int) -> np.ndarray:
        """How many of its first `blocks` blocks are of each domain."""
        groups, rest = divmod(blocks, GROUP)
        periods, part = divmod(groups * GROUP, len(self.order))
        counts = periods * np.array(self.quotas, dtype=np.int64)
        counts += np.bincount(self.order[:part], minlength=len(self.quotas))
        return counts + np.bincount(self.group(groups)[:rest], minlength=len(self.quotas))


class MixtureOrder:
    """The domain of every block.

    Args:
        weights: shares of tokens by domain, a preset's name, or a schedule: by the number of the token from which on
            they hold, the first of which is 0. A change comes at the first block that begins there or later.
        domains: names of the streams.
        block_size: tokens of a block, which a schedule of more than one entry needs.
        seed: of the order.

    Attributes:
        domains: names, in the order in which `counts` has them.
        schedule: weights of all domains, by the number of the first block.

    Raises:
        MixtureError: naming the domain or the entry.
    """

    def __init__(
        self,
        weights: Weights | str | Mapping[int, Weights | str],
        domains: list[str],
        seed: int,
        block_size: int | None,
    ):
        if not domains:
            raise MixtureError("a mixture needs streams, by the names of their domains")
        if seed < 0:
            raise MixtureError(f"the seed is a number from 0 on, not {seed}")
        self.domains, self.seed = list(domains), seed
        is_schedule = isinstance(weights, Mapping) and bool(weights) and all(isinstance(key, int) for key in weights)
        by_token: Mapping[int, Weights | str] = weights if is_schedule else {0: weights}  # type: ignore[assignment, dict-item]
        tokens = sorted(by_token)
        if tokens[0] != 0:
            raise MixtureError(f"a schedule begins at token 0, not at {tokens[0]:,}")
        if len(tokens) > 1 and not block_size:
            raise MixtureError("a schedule needs block_size, the tokens of a block")
        self.schedule: dict[int, dict[str, float]] = {}
        for token in tokens:
            start = -(-token // block_size) if block_size else 0
            if start in self.schedule:
                raise MixtureError(f"two entries of the schedule fall into the block that begins at token {token:,}")
            self.schedule[start] = weights_of(by_token[token], self.domains)
        starts = list(self.schedule)
        self._phases = [
            _Phase(number, start, end, tuple(quotas_of(self.schedule[start]).tolist()), seed)
            for number, (start, end) in enumerate(zip(starts, [*starts[1:], None], strict=True))
        ]

    @cached_property
    def fingerprint(self) -> str:
        """Changes with all that decides the order."""
        told = json.dumps([list(self.schedule.items()), self.seed, PERIOD, GROUP])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def domain(self, block: int) -> str:
        """The domain of a block."""
        return next(self.from_block(block))

    def from_block(self, block: int) -> Iterator[str]:
        """The domains of that block and all behind it."""
        for phase in self._phases:
            if phase.end is not None and block >= phase.end:
                continue
            group, skip = divmod(block - phase.start, GROUP)
            while phase.end is None or phase.start + group * GROUP < phase.end:
                for domain in phase.group(group)[skip:]:
                    yield self.domains[domain]
                group, skip = group + 1, 0
            block = phase.end

    def counts(self, blocks: int) -> dict[str, int]:
        """How many of the first `blocks` blocks are of each domain."""
        counts: np.ndarray = np.zeros(len(self.domains), dtype=np.int64)
        for phase in self._phases:
            end = blocks if phase.end is None else min(blocks, phase.end)
            if end > phase.start:
                counts += phase.counts(end - phase.start)
        return dict(zip(self.domains, counts.tolist(), strict=True))
