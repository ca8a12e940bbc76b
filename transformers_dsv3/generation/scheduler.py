"""Which tokens of which requests the next step computes, and on which pages. No tensors: plain data.

A step takes the next token of every sequence that is being continued, and, as long as there is room in its budget,
parts of prompts. What holds, whatever is asked:

- requests go by priority and arrival, and none is overtaken without end;
- a sequence gets the pages of its whole prompt when it begins, and one more when it needs it; when there is none left,
  the last in order gives its own back, to be computed again later, mostly from pages that are still there;
- the first in order is never put off, and alone it fits, so every request ends.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from .pages import Opened, PagePool, Table
from .requests import Request, RequestError
from .step_costs import StepCosts


# A priority's step is worth as many arrivals: a request is overtaken by so many at most for each step between them
LEAD = 1000
_PRIORITIES = (-100, 100)
# Requests at the head of the queue that are looked at in a step
_LOOKED_AT = 64


@dataclass(eq=False)
class Sequence:
    """A request and what has become of it.

    Attributes:
        order: what goes first is the lower.
        tokens: the prompt, with keys in place of pictures, and what was drawn. `ids` has the prompt's own.
        computed: how many of them have their latents in pages.
        sound: how many of those are known to have led to finite logits, so that others may use them.
        cached: tokens of the prompt that were found in pages when it began.
        table: its pages; None while it waits.
    """

    request: Request
    order: tuple[int, int]
    tokens: list[int]
    computed: int = 0
    sound: int = 0
    cached: int | None = None
    table: Table | None = None

    @property
    def left(self) -> int:
        """Tokens to be computed before the next one can be drawn."""
        return len(self.tokens) - self.computed

    @property
    def drawn(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def ids(self, start: int, end: int) -> list[int]:
        """Tokens from `start` on, as the model knows them."""
        prompt = self.request.prompt
        return [*prompt[start:end], *self.tokens[max(start, len(prompt)) : end]]

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order


@dataclass(frozen=True)
class Chunk:
    """Tokens of a sequence that a step computes: `count` from `start` on."""

    sequence: Sequence
    start: int
    count: int

    @property
    def draws(self) -> bool:
        """Whether the sequence's next token can be drawn afterwards."""
        return self.start + self.count == len(self.sequence.tokens)

    @property
    def pairs(self) -> int:
        """Pairs of a token and one it looks back at."""
        return self.count * self.start + self.count * (self.count + 1) // 2


@dataclass
class Step:
    """What to do next: copy pages, in this order, then compute the chunks."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def pairs(self) -> int:
        return sum(chunk.pairs for chunk in self.chunks)


@dataclass(frozen=True)
class Limits:
    """What a step may hold.

    A step that continues `running` sequences has room for `fewest_prefilled` tokens of prompts.

    Attributes:
        batch_tokens: tokens of a step, at most.
        running: sequences that have pages, at most; fewer than `batch_tokens`.
        fewest_prefilled: tokens of prompts that a step may hold whatever they cost.
        step_seconds: how long a step may take in which texts are continued: None for `stretch` times what it would
            take without prompts, once all that wait and have places are continued too.
        sequence_tokens: of a prompt and its text together, at most.
    """

    batch_tokens: int = 512
    running: int = 256
    fewest_prefilled: int = 64
    step_seconds: float | None = None
    stretch: float = 4.0
    sequence_tokens: int = 2**31

    def __post_init__(self) -> None:
        if self.running + self.fewest_prefilled > self.batch_tokens:
            raise ValueError(
                f"`batch_tokens` is {self.batch_tokens}: a step has to hold {self.running} running sequences and "
                f"{self.fewest_prefilled} tokens of prompts."
            )


@dataclass(frozen=True)
class _Budget:
    """What a step may grow to by prompts: `most` tokens, `fewest` whatever they cost, no longer than `seconds`."""

    costs: StepCosts
    most: int
    fewest: int
    seconds: float | None

    def tokens(self, step: Step, start: int, count: int) -> int:
        """How many of `count` tokens of a sequence from `start` on may be added to a step."""
        count = min(count, self.most - step.tokens)
        if self.seconds is None or count <= 0:
            return max(count, 0)
        within = self.costs.tokens_within(self.seconds, len(step.chunks), step.tokens, step.pairs, start, count)
        return max(within, min(count, self.fewest - step.tokens), 0)


class Scheduler:
    """Requests that wait, sequences that run, and the next step. Used by one thread."""

    def __init__(self, pool: PagePool, limits: Limits, costs: StepCosts | None = None):
        self.pool, self.limits = pool, limits
        self.costs = costs or StepCosts()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = self.prompt_tokens = self.cached_tokens = 0
        self._arrivals = 0

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its text together that can be served."""
        # The last token is drawn, and never computed
        return min(self.limits.sequence_tokens, self.pool.total * self.pool.page_size + 1)

    def check(self, request: Request) -> None:
        """Refuses what can never fit.

        Raises:
            RequestError: which names the field.
        """
        prompt, new = len(request.prompt), request.settings.max_new_tokens
        if prompt >= self.longest:
            raise RequestError("prompt", f"has {prompt:,} tokens; {self.longest - 1:,} fit, and one to be drawn")
        if prompt + new > self.longest:
            raise RequestError(
                "max_new_tokens",
                f"is {new:,}, behind a prompt of {prompt:,} tokens; both together may be {self.longest:,}",
            )

    def add(self, request: Request) -> Sequence:
        """Lets a request wait for its turn. Errors are those of `check`."""
        self.check(request)
        priority = min(max(request.priority, _PRIORITIES[0]), _PRIORITIES[1])
        sequence = Sequence(request, (self._arrivals + LEAD * priority, self._arrivals), request.keys)
        self._arrivals += 1
        insort(self.waiting, sequence)
        return sequence

    def remove(self, sequence: Sequence, keep: bool = True) -> None:
        """Takes a sequence out, wherever it is.

        Args:
            keep: whether others may find what it has computed.
        """
        if sequence.table is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._give_back(sequence, keep)

    def plan(self) -> Step:
        """The next step: empty only where nothing runs or waits. Pages for it are given out."""
        step = Step()
        for sequence in [each for each in self.running if each.left == 1]:
            if sequence.table is not None:  # not put off for one of those before it
                self._make_room(sequence)
        step.chunks = [Chunk(each, each.computed, 1) for each in self.running if each.left == 1]
        budget = self._budget(step)
        filling = set()
        for sequence in self.running:
            if sequence.left > 1 and sequence.table is not None:
                self._add_part(step, sequence, budget)
                filling.add(self.pool.next_shared(sequence.table, sequence.tokens))
        for sequence in self.waiting[:_LOOKED_AT]:
            if not budget.tokens(step, 0, 1) or not self._may_begin():
                break
            looks_up = sequence.request.settings.prompt_logprobs is None  # else logits of all of it are needed
            most = len(sequence.tokens) - 1 if looks_up else 0
            opened = self.pool.open((sequence.request.cache_salt, sequence.request.adapter), sequence.tokens, most)
            page = self.pool.next_shared(opened.table, sequence.tokens)
            if looks_up and page is not None and page in filling:
                self.pool.close(opened.table)  # it finds that page when it is full
                continue
            # Those that run are going to need pages too
            spare = self.pool.available - self.pool.pages_for(len(sequence.tokens)) + len(opened.table.pages)
            if self.running and spare < len(self.running) or not self.pool.extend(opened.table, len(sequence.tokens)):
                self.pool.close(opened.table)
                break
            self._begin(sequence, opened, step)
            self._add_part(step, sequence, budget)
            filling.add(page)
        return step

    def done(self, step: Step, seconds: float) -> None:
        """Notes that a step was made, and how long it took."""
        self.costs.saw(len(step.chunks), step.tokens, step.pairs, seconds)
        for chunk in step.chunks:
            chunk.sequence.computed = chunk.start + chunk.count

    def drew(self, sequence: Sequence, token: int) -> None:
        """Appends the token that was drawn from the logits of the last one, which were sound: so are its pages."""
        assert sequence.table is not None
        sequence.sound = sequence.computed
        self.pool.share(sequence.table, sequence.tokens, sequence.sound)
        sequence.tokens.append(token)

    def _budget(self, step: Step) -> _Budget:
        limits = self.limits
        if not step.chunks:
            seconds = None
        elif not self.costs.is_known:
            seconds = 0.0
        else:
            # Those that wait make steps longer when they run: put off, they make texts no faster
            soon = min(len(self.running) + len(self.waiting), limits.running)
            pairs = step.pairs * soon // len(step.chunks)
            seconds = limits.step_seconds or limits.stretch * self.costs.seconds(soon, soon, pairs)
        return _Budget(self.costs, limits.batch_tokens, step.tokens + limits.fewest_prefilled, seconds)

    def _may_begin(self) -> bool:
        """Whether one more may run: there are places, and steps would not take too long."""
        if len(self.running) >= self.limits.running:
            return False
        if self.limits.step_seconds is None or not self.running:
            return True
        if not self.costs.is_known:
            return False
        rows, pairs = len(self.running) + 1, sum(len(each.tokens) for each in self.running)
        return self.costs.seconds(rows, rows, pairs) <= self.limits.step_seconds

    def _add_part(self, step: Step, sequence: Sequence, budget: _Budget) -> None:
        """Adds what the budget allows of what is left of a sequence."""
        count = budget.tokens(step, sequence.computed, sequence.left)
        if count:
            step.chunks.append(Chunk(sequence, sequence.computed, count))

    def _begin(self, sequence: Sequence, opened: Opened, step: Step) -> None:
        sequence.table, sequence.computed, sequence.sound = opened.table, opened.cached, opened.cached
        if opened.copy is not None:
            step.copies.append(opened.copy)
        if sequence.cached is None:
            sequence.cached = opened.cached
            self.prompt_tokens += len(sequence.request.prompt)
            self.cached_tokens += opened.cached
        self.waiting.remove(sequence)
        insort(self.running, sequence)

    def _make_room(self, sequence: Sequence) -> None:
        """Sees to it that a sequence's next token has a place, or is put off."""
        while sequence.table is not None and not self.pool.extend(sequence.table, len(sequence.tokens)):
            last = self.running.pop()
            self._give_back(last, keep=True)
            insort(self.waiting, last)
            self.preemptions += 1

    def _give_back(self, sequence: Sequence, keep: bool) -> None:
        assert sequence.table is not None
        self.pool.close(sequence.table, sequence.tokens, sequence.sound if keep else 0)
        sequence.table, sequence.computed, sequence.sound = None, 0, 0
