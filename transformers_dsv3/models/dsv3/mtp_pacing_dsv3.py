"""Whether drafting pays, decided from what passes cost and how many drafts hold. Plain Python, no tensors."""

from collections import deque
from collections.abc import Sequence
from statistics import median


# Passes that a decision to draft, or to stop, is founded on; and without drafts, for what they cost
_TRIAL, _PROBE = 8, 3
# Passes without drafts until drafting is tried again: doubled each time that it does not pay, up to the second
_FIRST_PAUSE, _LONGEST_PAUSE = 32, 512
# Passes with drafts until those without are timed again: costs change as the text grows and rows end
_PROBE_EVERY = 128
# What an accepted draft counts after one more pass; and the costs that the median is taken of
_DECAY, _COSTS = 0.95, 9
# Drafting again has to be this much faster than not, so that noise does not switch back and forth
_GAIN = 1.05


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Tokens that a pass gives a row, at least 1: one, and every draft that is accepted with all before it.

    Args:
        acceptance: for each draft, how probable its acceptance is where those before it were accepted.
    """
    tokens = reach = 1.0
    for probability in acceptance:
        reach *= probability
        tokens += reach
    return tokens


class DraftPacing:
    """Decides before every pass between all drafts and none, whichever gave more tokens a second.

    Drafting starts, and is judged after a few passes. Where it does not pay it pauses, and is tried again after longer
    and longer pauses, since acceptance changes along a text.

    Args:
        drafts: drafts of a pass that drafts, at least 1.
    """

    def __init__(self, drafts: int):
        self.drafts = drafts
        self.costs: dict[int, deque[float]] = {0: deque(maxlen=_COSTS), drafts: deque(maxlen=_COSTS)}
        self.pause = _FIRST_PAUSE
        self.drafting = True
        self._start(_TRIAL)

    def _start(self, passes: int) -> None:
        """A trial of drafting: what was accepted before is not known to hold now."""
        self.left = passes  # of the trial, or of a pause
        self.since_probe = 0
        self.offered = [0.0] * self.drafts
        self.accepted = [0.0] * self.drafts
        self.probing = 0

    def next_drafts(self) -> int:
        """Drafts for the next pass: all or 0."""
        return self.drafts if self.drafting and not self.probing else 0

    def rate(self, drafts: int) -> float:
        """Tokens a second that passes with so many drafts give a row; 0 where none was timed yet."""
        costs = self.costs[drafts]
        if not costs:
            return 0.0
        acceptance = [hits / seen if seen else 0.0 for hits, seen in zip(self.accepted, self.offered, strict=True)]
        return expected_tokens(acceptance[:drafts]) / max(median(costs), 1e-9)

    def record(self, drafts: int, seconds: float | None, accepted: Sequence[int]) -> None:
        """Takes a pass into account, and decides what comes.

        Args:
            drafts: drafts of the pass; fewer than all where the text is about to end.
            seconds: what it took, or None where that is not what such a pass costs.
            accepted: how many drafts each row that had not ended accepted.
        """
        if drafts not in self.costs:
            return
        if seconds is not None:
            self.costs[drafts].append(seconds)
        if drafts:
            for depth in range(drafts):
                reached = sum(n >= depth for n in accepted)
                self.offered[depth] = self.offered[depth] * _DECAY + reached
                self.accepted[depth] = self.accepted[depth] * _DECAY + sum(n > depth for n in accepted)
        self._decide(drafts)

    def _decide(self, drafts: int) -> None:
        if not self.drafting:
            self.left -= 1
            if self.left <= 0:
                self.drafting = True
                self._start(_TRIAL)
            return
        if drafts:
            self.left -= 1
            self.since_probe += 1
            due = not self.costs[0] or self.since_probe >= _PROBE_EVERY
            if self.left <= 0 and due:
                self.probing, self.since_probe = _PROBE, 0
        elif self.probing:
            self.probing -= 1
        if self.left > 0 or self.probing or not self.costs[0] or not self.costs[self.drafts]:
            return
        # A trial that ends a pause has to gain something; what pays goes on until it does not
        gain = _GAIN if self.left == 0 and self.pause > _FIRST_PAUSE else 1.0
        if self.rate(self.drafts) >= gain * self.rate(0):
            self.pause = _FIRST_PAUSE
        else:
            self.drafting, self.left = False, self.pause
            self.pause = min(2 * self.pause, _LONGEST_PAUSE)
