"""Which page of a pool holds what: references, prefixes found by their tokens, eviction by last use. No tensors.

A page holds `page_size` tokens of one sequence. What it holds depends on all tokens before it, so pages that others
may use form trees, one for each key (a salt and an adapter): a page is found below the page before it by the tokens
that it holds. Python's dictionaries compare these, not their hashes alone, so nobody is given another's text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice


# The latest pages below one page are compared token by token, where none has the prompt's next tokens all
_COMPARED = 32


class _Node:
    """A page that may be found: of all of its tokens where it is full, else without children."""

    __slots__ = ("children", "page", "place", "tokens")

    def __init__(self, place: dict[tuple[int, ...], _Node], tokens: tuple[int, ...], page: int):
        self.place, self.tokens, self.page = place, tokens, page
        self.children: dict[tuple[int, ...], _Node] = {}
        place[tokens] = self


@dataclass(eq=False)
class Table:
    """The pages of one sequence, in its order.

    Attributes:
        key: sequences of other keys never share its pages.
        pages: their numbers. The first `shared` may be found by others and are never written to again.
    """

    key: Hashable
    pages: list[int] = field(default_factory=list)
    shared: int = 0
    last: _Node | None = None  # of the last shared page


@dataclass(frozen=True)
class Opened:
    """A new sequence's table.

    Attributes:
        cached: tokens that its pages hold already.
        copy: the page to be copied before anything is written, and where to: it begins with tokens of this sequence.
    """

    table: Table
    cached: int = 0
    copy: tuple[int, int] | None = None


class PagePool:
    """Numbers of pages, each free, held by tables, or idle: held by none, and kept for who begins with its tokens."""

    def __init__(self, pages: int, page_size: int):
        self.total, self.page_size = pages, page_size
        self._free = list(range(pages - 1, -1, -1))
        # Least recently used first; a page stands behind those that follow it in a text
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * pages
        self._nodes: list[_Node | None] = [None] * pages
        self._roots: dict[Hashable, dict[tuple[int, ...], _Node]] = {}

    @property
    def available(self) -> int:
        """Pages that can be given out: free ones and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that tables hold."""
        return self.total - self.available

    @property
    def cached(self) -> int:
        """Idle pages."""
        return len(self._idle)

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.page_size)

    def open(self, key: Hashable, tokens: Sequence[int], most: int) -> Opened:
        """A table that begins with pages which hold the first of `tokens` already, `most` of them at most."""
        table = Table(key)
        size, children = self.page_size, self._roots.get(key, {})
        while (start := len(table.pages) * size) + size <= most:
            node = children.get(tuple(tokens[start : start + size]))
            if node is None:
                break
            self._hold(node.page)
            table.pages.append(node.page)
            table.last, children = node, node.children
        table.shared = len(table.pages)
        source, common = _closest(children, tokens[start:most])
        if source is None or self.available <= (not self._holders[source.page]):
            return Opened(table, start)
        self._hold(source.page)  # not to be taken for the copy, and used just now
        target = self._take()
        self._release(source.page)
        table.pages.append(target)
        return Opened(table, start + common, (source.page, target))

    def extend(self, table: Table, tokens: int) -> bool:
        """Gives a table pages for so many tokens altogether; False, and nothing given, where there are not enough."""
        missing = self.pages_for(tokens) - len(table.pages)
        if missing > self.available:
            return False
        table.pages.extend(self._take() for _ in range(missing))
        return True

    def share(self, table: Table, tokens: Sequence[int], computed: int) -> None:
        """Lets others find the full pages among the first `computed` tokens.

        Where others have computed the same meanwhile, the table takes their page in place of its own.
        """
        size = self.page_size
        while (start := table.shared * size) + size <= computed:
            page, part = table.pages[table.shared], tuple(tokens[start : start + size])
            place = self._place_behind(table)
            node = place.get(part)
            if node is None:
                node = self._nodes[page] = _Node(place, part, page)
            else:
                self._hold(node.page)
                self._release(page)
                table.pages[table.shared] = node.page
            table.last = node
            table.shared += 1

    def next_shared(self, table: Table, tokens: Sequence[int]) -> Hashable | None:
        """What tells whether two sequences are going to fill a page with the same; None where no page gets full."""
        start = table.shared * self.page_size
        part = tuple(tokens[start : start + self.page_size])
        return (table.key, table.last and table.last.page, part) if len(part) == self.page_size else None

    def close(self, table: Table, tokens: Sequence[int] = (), computed: int = 0) -> None:
        """Gives a table's pages back. Others may then find those of its first `computed` tokens."""
        self.share(table, tokens, computed)
        start = table.shared * self.page_size
        if start < computed:
            page, part = table.pages[table.shared], tuple(tokens[start:computed])
            place = self._place_behind(table)
            if part not in place:
                self._nodes[page] = _Node(place, part, page)
        for page in reversed(table.pages):  # so that later pages of a text are evicted before those they rest on
            self._release(page)
        table.pages, table.shared, table.last = [], 0, None

    def forget(self) -> None:
        """Empties idle pages, for weights that have changed."""
        while self._idle:
            self._free.append(self._evict())

    def _place_behind(self, table: Table) -> dict[tuple[int, ...], _Node]:
        if table.last is not None:
            return table.last.children
        if len(self._roots) > 2 * self.total:  # keys of which no page is left
            self._roots = {key: place for key, place in self._roots.items() if place}
        return self._roots.setdefault(table.key, {})

    def _hold(self, page: int) -> None:
        if not self._holders[page]:
            del self._idle[page]
        self._holders[page] += 1

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if self._nodes[page] is None:
            self._free.append(page)
        else:
            self._idle[page] = None

    def _take(self) -> int:
        page = self._free.pop() if self._free else self._evict()
        self._holders[page] = 1
        return page

    def _evict(self) -> int:
        """The page that was used least recently, which holds nothing from now on."""
        page, _ = self._idle.popitem(last=False)
        node = self._nodes[page]
        assert node is not None and not node.children
        self._nodes[page] = None
        del node.place[node.tokens]
        return page


def _closest(children: dict[tuple[int, ...], _Node], tokens: Sequence[int]) -> tuple[_Node | None, int]:
    """Which page begins with the most of these tokens, and with how many."""
    best, most = None, 0
    if not tokens:
        return best, most
    for node in islice(reversed(children.values()), _COMPARED):
        if node.tokens[0] != tokens[0]:
            continue
        common = next((i for i, (a, b) in enumerate(zip(node.tokens, tokens)) if a != b), None)
        if common is None:
            common = min(len(node.tokens), len(tokens))
        if common > most:
            best, most = node, common
    return best, most
