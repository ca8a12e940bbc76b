"""Pages of a pool: none is lost, none is shared by who may not, and what was used least recently is evicted first."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from transformers_dsv3.generation.pages import PagePool


def fill(pool, key, tokens):
    """Opens, computes and closes a sequence, as if it had the pool for itself; tokens found in the pool."""
    opened = pool.open(key, tokens, len(tokens) - 1)
    assert pool.extend(opened.table, len(tokens))
    pool.close(opened.table, tokens, len(tokens))
    return opened.cached


def test_prefixes_are_found_by_tokens_within_a_key():
    pool = PagePool(16, 4)
    text = list(range(10))
    assert fill(pool, "a", text) == 0
    assert fill(pool, "a", text) == 9  # the last token is computed, for its logits
    assert fill(pool, "a", [*text, 50, 51]) == 10
    assert fill(pool, "a", [*text[:6], 99, 98]) == 6
    assert fill(pool, "a", [*text[:3], 99]) == 3
    assert fill(pool, "b", text) == 0
    assert pool.used == 0


def test_pages_that_hash_alike_are_told_apart():
    pool = PagePool(8, 2)
    assert hash((-1, -1)) == hash((-2, -2))
    fill(pool, "a", [-1, -1, 5])
    assert fill(pool, "a", [-2, -2, 5]) == 0


def test_a_started_page_is_copied_and_not_written_to():
    pool = PagePool(8, 4)
    first = pool.open("a", [1, 2, 3, 4, 5, 6], 5).table
    pool.extend(first, 6)
    kept = list(first.pages)
    pool.close(first, [1, 2, 3, 4, 5, 6], 6)
    second = pool.open("a", [1, 2, 3, 4, 5, 7], 5)
    assert second.cached == 5 and second.table.pages[0] == kept[0]
    assert second.copy == (kept[1], second.table.pages[1]) and second.copy[0] != second.copy[1]


def test_the_same_text_computed_twice_at_a_time_is_kept_once():
    pool = PagePool(8, 2)
    tables = [pool.open("a", [1, 2, 3, 4], 3).table for _ in range(2)]
    for table in tables:
        pool.extend(table, 4)
    assert pool.used == 4
    for table in tables:
        pool.share(table, [1, 2, 3, 4], 4)
    assert tables[0].pages == tables[1].pages and pool.used == 2


def test_who_fills_the_same_page_is_known_before():
    pool = PagePool(8, 2)
    one, other, salted = (
        pool.open(key, tokens, 2).table for key, tokens in (("a", [1, 2, 3]), ("a", [1, 2, 4]), ("b", [1, 2]))
    )
    assert pool.next_shared(one, [1, 2, 3]) == pool.next_shared(other, [1, 2, 4]) is not None
    assert pool.next_shared(salted, [1, 2]) != pool.next_shared(one, [1, 2])
    assert pool.next_shared(one, [1]) is None


def test_what_was_used_least_recently_goes_first():
    pool = PagePool(4, 2)
    fill(pool, "a", [1, 2, 3, 4])
    fill(pool, "a", [5, 6, 7, 8])
    fill(pool, "a", [1, 2, 3, 4])
    fill(pool, "a", [9, 10])
    assert fill(pool, "a", [1, 2, 3, 4]) == 3
    assert fill(pool, "a", [5, 6, 7, 8]) in (0, 2)


def test_more_than_there_is_is_given_to_none():
    pool = PagePool(3, 2)
    table = pool.open("a", [1], 0).table
    assert not pool.extend(table, 7) and table.pages == [] and pool.used == 0
    assert pool.extend(table, 6) and pool.available == 0
    other = pool.open("a", [1, 2], 1)
    assert not pool.extend(other.table, 1) and other.copy is None


def test_weights_that_changed_leave_nothing_to_find():
    pool = PagePool(8, 2)
    fill(pool, "a", [1, 2, 3])
    pool.forget()
    assert fill(pool, "a", [1, 2, 3]) == 0


def test_keys_of_which_nothing_is_left_take_no_memory():
    pool = PagePool(4, 2)
    for salt in range(100):
        fill(pool, salt, [1, 2, 3])
    assert len(pool._roots) <= 2 * pool.total + 1


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


class Pool(RuleBasedStateMachine):
    """Random use beside a model: what was written to each page, and what each table has to read from its pages."""

    tables = Bundle("tables")

    @initialize(pages=st.integers(1, 12), size=st.integers(1, 4))
    def begin(self, pages, size):
        self.pool = PagePool(pages, size)
        self.written = [[None] * size for _ in range(pages)]  # the text up to each place of each page, and its key
        self.open_tables = {}  # table: its text, and how much of it is computed

    @rule(target=tables, key=st.sampled_from("ab"), tokens=TOKENS)
    def open(self, key, tokens):
        opened = self.pool.open(key, tokens, len(tokens) - 1)
        assert opened.cached < len(tokens)
        if opened.copy is not None:
            source, target = opened.copy
            self.written[target] = list(self.written[source])
        self.open_tables[opened.table] = [tokens, opened.cached]
        self.read(opened.table)
        return opened.table

    @rule(table=tables, count=st.integers(1, 6), more=TOKENS)
    def compute(self, table, count, more):
        if table not in self.open_tables:
            return
        tokens, computed = self.open_tables[table]
        tokens.extend(more[: max(0, computed + count - len(tokens))])
        end = min(computed + count, len(tokens))
        if not self.pool.extend(table, end):
            return
        size = self.pool.page_size
        for place in range(computed, end):
            assert place // size >= table.shared, "a page that others may read is written to"
            self.written[table.pages[place // size]][place % size] = (table.key, *tokens[: place + 1])
        self.open_tables[table][1] = end
        self.pool.share(table, tokens, end)
        self.read(table)

    @rule(table=consumes(tables), keep=st.booleans())
    def close(self, table, keep):
        if table in self.open_tables:
            tokens, computed = self.open_tables.pop(table)
            self.pool.close(table, *((tokens, computed) if keep else ()))

    @rule()
    def forget(self):
        self.pool.forget()

    def read(self, table):
        tokens, computed = self.open_tables[table]
        size = self.pool.page_size
        for place in range(computed):
            found = self.written[table.pages[place // size]][place % size]
            assert found == (table.key, *tokens[: place + 1])

    @invariant()
    def pages_are_somewhere_and_once(self):
        if not hasattr(self, "open_tables"):
            return
        pool = self.pool
        held = {page for table in self.open_tables for page in table.pages}
        assert sorted([*pool._free, *pool._idle, *held]) == list(range(pool.total))
        assert pool.used == len(held)
        for page in range(pool.total):
            assert pool._holders[page] == sum(table.pages.count(page) for table in self.open_tables)
        for table in self.open_tables:
            self.read(table)

    def teardown(self):
        if hasattr(self, "open_tables"):
            for table in self.open_tables:
                self.pool.close(table)
            assert self.pool.used == 0


Pool.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestPool = Pool.TestCase
