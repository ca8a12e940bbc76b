"""The forward pass over pages of latents, beside each sequence by itself over a cache of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from transformers_dsv3 import quantize
from transformers_dsv3.kernels.cpu import library
from transformers_dsv3.kernels.cpu.step import Program
from transformers_dsv3.models.dsv3 import decoding_dsv3
from transformers_dsv3.models.dsv3.paged_dsv3 import PagedLatents, RaggedBatch, forward_pages


def alone(model, tokens, cuts):
    """Logits and last hidden states of a sequence given in chunks, over a cache of its own."""
    cache, logits, hidden = DynamicCache(config=model.config), [], []
    with torch.no_grad():
        for start, end in zip([0, *cuts], [*cuts, len(tokens)]):
            states = model.model(tokens[None, start:end], past_key_values=cache).last_hidden_state[0]
            hidden.append(states)
            logits.append(model.lm_head(states))
    return torch.cat(logits), torch.cat(hidden)


class Pool:
    """Pages for some sequences in an order of chance, poisoned where nothing was written."""

    def __init__(self, model, sequences, page_size=4, seed=0, spare=2):
        self.model, self.page_size = model, page_size
        generator = torch.Generator().manual_seed(seed)
        needed = [-(-len(tokens) // page_size) for tokens in sequences]
        self.pages = PagedLatents(model, sum(needed) + spare, page_size)
        self.pages.latent.fill_(torch.nan)
        self.pages.k_rope.fill_(torch.nan)
        order = torch.randperm(sum(needed) + spare, generator=generator).split([*needed, spare])
        self.tables = torch.full((len(sequences), max(needed) + 1), -7, dtype=torch.int32)  # behind: not read
        for row, pages in zip(self.tables, order):
            row[: len(pages)] = pages
        self.sequences, self.filled = sequences, [0] * len(sequences)

    def step(self, counts, wanted=None):
        """New tokens of each sequence, 0 for none: logits and hidden states by sequence."""
        chosen = [index for index, count in enumerate(counts) if count]
        tokens = [self.sequences[i][self.filled[i] : self.filled[i] + counts[i]] for i in chosen]
        total = sum(counts)
        batch = RaggedBatch(
            torch.cat(tokens),
            [self.filled[i] for i in chosen],
            [counts[i] for i in chosen],
            self.tables[chosen],
            torch.arange(total) if wanted is None else wanted,
        )
        output = forward_pages(self.model, self.pages, batch)
        for index in chosen:
            self.filled[index] += counts[index]
        return output, chosen


def texts(model, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(model.config.vocab_size, (length,), generator=generator) for length in lengths]


def beside_caches(model, plans, page_size, seed=0):
    """Largest difference of logits and hidden states where sequences are given in chunks, all at once.

    Args:
        plans: of each sequence the step at which it begins, and its chunks.
    """
    sequences = texts(model, [sum(chunks) for _, chunks in plans], seed)
    pool = Pool(model, sequences, page_size, seed)
    got = [[] for _ in plans]
    for number in range(max(begin + len(chunks) for begin, chunks in plans)):
        counts = [chunks[number - begin] if 0 <= number - begin < len(chunks) else 0 for begin, chunks in plans]
        if not any(counts):
            continue
        output, chosen = pool.step(counts)
        parts = zip(
            output.logits.split([counts[i] for i in chosen]), output.hidden_states.split([counts[i] for i in chosen])
        )
        for index, part in zip(chosen, parts):
            got[index].append(part)
    worst = 0.0
    for tokens, (_, chunks), parts in zip(sequences, plans, got):
        expected = alone(model, tokens, torch.tensor(chunks).cumsum(0)[:-1].tolist())
        for one, other in zip(expected, (torch.cat(each) for each in zip(*parts))):
            assert one.shape == other.shape and one.dtype == other.dtype
            worst = max(worst, float((one - other).abs().max()))
    return worst


PLANS = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.sampled_from([1, 1, 1, 2, 5, 17]), min_size=1, max_size=5)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=15, deadline=None)
@given(
    plans=PLANS,
    page_size=st.sampled_from([1, 3, 16, 64]),
    q_lora=st.sampled_from([None, 12]),
    groups=st.sampled_from([(8, 2, 1, 3), (6, 1, 1, 2), (4, 2, 2, 4)]),
    dense=st.integers(0, 2),
    rope=st.sampled_from(["default", "yarn"]),
    latents=st.sampled_from([4, 24]),
    implementation=st.sampled_from(["sdpa", "eager"]),
)
def test_each_sequence_is_as_by_itself(
    make_model, measured, plans, page_size, q_lora, groups, dense, rope, latents, implementation
):
    E, n_group, topk_group, K = groups
    scaling = {} if rope == "default" else {"factor": 4.0}
    model = make_model(
        q_lora_rank=q_lora, n_routed_experts=E, n_group=n_group, topk_group=topk_group, num_experts_per_tok=K,
        first_k_dense_replace=dense, rope_parameters={"rope_type": rope, "rope_theta": 10000.0, **scaling},
        kv_lora_rank=latents, attn_implementation=implementation,
    )  # fmt: skip
    worst = beside_caches(model, plans, page_size)
    assert worst < 1e-5
    measured["pages beside caches, fp32"] = max(measured.get("pages beside caches, fp32", 0.0), worst)


@pytest.fixture
def steps(monkeypatch):
    """A list that grows by one at each pass that the program runs."""
    found, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda self, *given, **named: found.append(1) or run(self, *given, **named))
    return found


COMPILED = pytest.mark.skipif(library.unavailable is not None, reason="no compiled CPU library")
BITS = {
    "hidden_size": 128, "kv_lora_rank": 64, "q_lora_rank": 32, "v_head_dim": 16, "vocab_size": 500,
    "moe_intermediate_size": 32, "intermediate_size": 64,
}  # fmt: skip


@COMPILED
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("isa", library.INSTRUCTION_SETS)
def test_in_fp32_neighbours_and_pieces_change_no_bit(make_model, steps, isa, bits, request):
    """A text by itself, token by token, is the same text amid 31 others that come in pieces of any length."""
    request.addfinalizer(library.instruction_set)
    try:
        library.instruction_set(isa)
    except ValueError:
        pytest.skip("not on this processor")
    model = make_model(**BITS)
    if bits is not None:
        quantize(model, bits=bits)
    lengths = [23 + 7 * (i % 9) for i in range(32)]
    sequences = texts(model, lengths)
    alone = Pool(model, sequences[:1], 16)
    torch.set_num_threads(2)  # which share out the keys of a sequence by itself
    try:
        first = [alone.step([1]) for _ in range(lengths[0])]
    finally:
        torch.set_num_threads(1)
    hidden = torch.cat([output.hidden_states for output, _ in first])
    logits = torch.cat([output.logits for output, _ in first])
    pool, got, number = Pool(model, sequences, 16, seed=1), [], 0
    while (
        min(left := [length - done for length, done in zip(lengths, pool.filled)]) > 0 or pool.filled[0] < lengths[0]
    ):
        counts = [min(left[i], 1 + (5 * i + 3 * number) % 12) if left[i] else 0 for i in range(32)]
        output, chosen = pool.step(counts)
        got.append((output.logits[: counts[0]], output.hidden_states[: counts[0]]) if counts[0] else None)
        number += 1
    parts = [part for part in got if part is not None]
    assert torch.equal(torch.cat([part for part, _ in parts]), logits)
    assert torch.equal(torch.cat([part for _, part in parts]), hidden)
    assert len(steps) == lengths[0] + number  # all of them were the program's


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoding_row_does_not_know_its_neighbours(make_model, steps, dtype):
    """Also in bf16, as long as the program runs: alone, and amid others of other lengths."""
    model = make_model(**BITS).to(dtype)
    sequences = texts(model, [9 + 11 * (i % 17) for i in range(120)])
    results = []
    for count in (1, 2, 33, 120):
        pool = Pool(model, sequences[:count], 64)
        pool.step([len(sequence) - 1 if i == 0 else 0 for i, sequence in enumerate(sequences[:count])])
        for i in range(1, count):
            pool.step([len(sequences[i]) - 1 if j == i else 0 for j in range(count)])
        output, _ = pool.step([1] * count)
        results.append(output.logits[0])
    assert all(torch.equal(result, results[0]) for result in results)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(sequences[0][None, :-1], past_key_values=cache)
        expected = model(sequences[0][None, -1:], past_key_values=cache).logits[0, -1]
    assert (expected - results[0]).abs().max() < (1e-5 if dtype is torch.float32 else 0.1)


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_are_read_as_rows_of_a_cache_are(make_model, dtype, steps):
    """To the last bit: blocks of keys do not depend on where they lie."""
    model = make_model(**BITS).to(dtype)
    (tokens,) = texts(model, [301])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[None, :300], past_key_values=cache)
        pool = Pool(model, [tokens], 64)
        table = pool.tables[0, : -(-300 // 64)].long()
        for held, name in ((pool.pages.latent, "keys"), (pool.pages.k_rope, "values")):
            for layer in range(model.config.num_hidden_layers):
                rows = torch.full((len(table) * 64, held.shape[-1]), torch.nan, dtype=dtype)
                rows[:300] = getattr(cache.layers[layer], name)[0, 0]
                held[layer, table] = rows.view(len(table), 64, -1)
        pool.filled[0] = 300
        output, _ = pool.step([1])
        expected = model(tokens[None, 300:], past_key_values=cache).logits[0, -1]
    assert len(steps) == 2
    assert (output.logits[0] - expected).abs().max() < 1e-5  # the head alone is PyTorch's there
    assert torch.equal(
        pool.pages.latent[:, table[-1], 300 % 64], torch.stack([layer.keys[0, 0, -1] for layer in cache.layers])
    )


@COMPILED
def test_bf16_prompts_by_the_layers(make_model, steps, monkeypatch):
    """Pieces that are longer than the program takes, some expanded and some not, beside decoding rows."""
    monkeypatch.setattr(decoding_dsv3, "MOST_PAGED_TOKENS", {torch.bfloat16: 50})
    model = make_model(**BITS).to(torch.bfloat16)
    worst = beside_caches(model, [(0, [180, 1, 1]), (0, [40, 5, 1]), (0, [1, 1, 1])], 64)
    assert 0 < len(steps) and worst < 0.25


def test_float64(make_model):
    """As exact as the layers are there, whose softmax is in fp32."""
    model = make_model().double()
    assert beside_caches(model, [(0, [9, 1, 1]), (1, [1, 1, 6]), (0, [3])], 4) < 1e-6


def test_a_prefix_is_shared_and_a_page_is_copied(make_model):
    model = make_model()
    first, second = texts(model, [14, 14])
    second[:10] = first[:10]
    pool = Pool(model, [first, second])
    pool.step([10, 0])
    pool.tables[1, :2] = pool.tables[0, :2]  # whole pages; the third is half written, and goes on differently
    pool.pages.copy_page(int(pool.tables[0, 2]), int(pool.tables[1, 2]))
    pool.filled[1] = 10
    output, _ = pool.step([4, 4])
    for tokens, logits in zip((first, second), output.logits.split(4)):
        assert (logits - alone(model, tokens, [10])[0][10:]).abs().max() < 1e-5


def test_wanted_rows_alone_have_logits(make_model):
    model = make_model()
    pool, same = (Pool(model, texts(model, [7, 5])) for _ in range(2))
    output, _ = pool.step([7, 5], torch.tensor([11, 6]))
    whole, _ = same.step([7, 5])
    assert output.hidden_states.shape == (12, model.config.hidden_size)
    assert (output.logits - whole.logits[[11, 6]]).abs().max() < 1e-6
    assert pool.pages.bytes_per_page * pool.pages.pages == pool.pages.latent.nbytes + pool.pages.k_rope.nbytes


def test_adapters_and_hooks_are_run(make_model):
    model = make_model()
    adapted = get_peft_model(
        make_model(), LoraConfig(r=2, target_modules=["q_b_proj", "kv_b_proj", "o_proj"], init_lora_weights=False)
    ).eval()
    assert beside_caches(adapted.base_model.model, [(0, [9, 1]), (0, [1, 1])], 4) < 1e-5
    calls = []
    model.model.layers[1].self_attn.register_forward_hook(lambda module, inputs, output: calls.append(output[0].shape))
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape))
    assert beside_caches(model, [(0, [2]), (0, [3])], 4) < 1e-5
    assert calls[:2] == [(1, 5, model.config.hidden_size)] * 2


def test_bad_batches_are_refused_before_anything_is_written(make_model):
    model = make_model()
    pages = PagedLatents(model, 3, page_size=4)
    pages.latent.fill_(7.0)
    good = {
        "tokens_T": torch.tensor([1, 2, 3]), "starts_B": [0, 4], "counts_B": [2, 1],
        "tables_BP": torch.tensor([[0, 99], [1, 2]], dtype=torch.int32), "wanted_W": torch.tensor([2]),
    }  # fmt: skip
    for field, value, said in (
        ("tokens_T", torch.tensor([1, 2]), "tokens_T.*3 tokens"),
        ("tokens_T", torch.tensor([1, 2, 96]), "tokens_T.* 96"),
        ("tokens_T", torch.tensor([1, -2, 3]), "tokens_T.* -2"),
        ("tokens_T", torch.tensor([1, 2, 3], dtype=torch.int32), "tokens_T.*int32"),
        ("starts_B", [0], "starts_B"),
        ("starts_B", [0, -1], "starts_B.* -1"),
        ("starts_B", [0, 8], "tables_BP.* 9 tokens need 3 pages"),
        ("counts_B", [3, 0], "counts_B.* 0"),
        ("tables_BP", torch.tensor([[0, 99], [1, 3]]), "tables_BP.* page 3"),
        ("tables_BP", torch.tensor([[-1, 99], [1, 2]]), "tables_BP.* page -1"),
        ("tables_BP", torch.tensor([0, 1]), "tables_BP"),
        ("tables_BP", torch.tensor([[0.0, 1.0], [1.0, 2.0]]), "tables_BP.*float32"),
        ("wanted_W", torch.tensor([3]), "wanted_W.* 3"),
        ("wanted_W", torch.tensor([[1]]), "wanted_W"),
        ("places_F", torch.tensor([3]), "places_F.* 3"),
        ("places_F", torch.tensor([0]), "features_FD. is None"),
    ):
        with pytest.raises(ValueError, match=said):
            forward_pages(model, pages, RaggedBatch(**{**good, field: value}))
    with pytest.raises(ValueError, match="float64"):
        forward_pages(model, PagedLatents(model, 3, 4, dtype=torch.float64), RaggedBatch(**good))
    assert (pages.latent == 7.0).all()
    with pytest.raises(ValueError, match="pages"):
        PagedLatents(model, 0)
    with pytest.raises(ValueError, match="dynamic"):
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
        PagedLatents(make_model(rope_parameters=rope), 1)
    with pytest.raises(ValueError, match="training"):
        forward_pages(make_model().train(), pages, RaggedBatch(**good))
