"""A dynamic cache that grows in place holds what Transformers' own `update` would have put there."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from transformers_dsv3.models.dsv3.cache_dsv3 import SPARE_TOKENS, extend, shared_room, take_back


R, P = 5, 3


def tokens(n, batch=2):
    return torch.randn(batch, 1, n, R), torch.randn(batch, 1, n, P)


def append(ours, plain, n, batch=2):
    new = tokens(n, batch)
    got = extend(ours, *new, 0)
    expected = plain.update(*new, 0)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert all(torch.equal(a, b) for a, b in zip((ours.layers[0].keys, ours.layers[0].values), expected))
    assert ours.get_seq_length() == plain.get_seq_length()


@pytest.fixture
def caches():
    torch.manual_seed(0)
    with torch.no_grad():
        ours, plain = DynamicCache(), DynamicCache()
        append(ours, plain, 7)
        yield ours, plain


def test_steps_across_several_enlargements(caches):
    for n in (1, 1, SPARE_TOKENS - 9, 1, 2, 700, 1, 1):
        append(*caches, n)


def test_steps_in_between_copy_nothing(caches):
    append(*caches, 1)
    place = caches[0].layers[0].keys.data_ptr()
    for _ in range(20):
        append(*caches, 1)
        assert caches[0].layers[0].keys.data_ptr() == place


@pytest.mark.parametrize(
    "change, batch",
    [
        (lambda cache: cache.crop(-1), 2),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), 2),
        (lambda cache: cache.batch_repeat_interleave(2), 4),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), 1),
        (lambda cache: cache.reset(), 2),
    ],
    ids=["crop", "reorder", "repeat", "select", "reset"],
)
def test_after_the_cache_was_changed(caches, change, batch):
    append(*caches, 1)
    for cache in caches:
        change(cache)
    for n in (1, 3, 1):
        append(*caches, n, batch=batch)


def test_a_copy_goes_its_own_way(caches):
    append(*caches, 1)
    ours, plain = copy.deepcopy(caches)
    append(*caches, 1)
    append(ours, plain, 2)
    append(*caches, 1)


def test_tensors_of_others_are_not_written_to(caches):
    """A layer whose keys are a part of somebody's larger tensor."""
    ours, plain = caches
    whole = torch.randn(2, 1, 50, R), torch.randn(2, 1, 50, P)
    before = [tensor.clone() for tensor in whole]
    for cache in caches:
        cache.layers[0].keys, cache.layers[0].values = whole[0][:, :, :10], whole[1][:, :, :10]
    append(ours, plain, 1)
    append(ours, plain, 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, before))


def test_room_kept_is_bounded(caches):
    ours, plain = caches
    append(ours, plain, 5000)
    append(ours, plain, 1)
    room = ours.layers[0].spare_room.keys.shape[2]
    assert room <= 5008 * 9 / 8 + SPARE_TOKENS


def test_gradients_flow_through_the_cache():
    ours, plain = DynamicCache(), DynamicCache()
    for cache, update in ((ours, extend), (plain, DynamicCache.update)):
        torch.manual_seed(0)
        pieces = [[x.requires_grad_() for x in tokens(n)] for n in (3, 1, 1)]
        for piece in pieces:
            keys, _ = update(cache, *piece, 0)
        keys.square().sum().backward()
        assert all(torch.equal(piece[0].grad, 2 * piece[0]) for piece in pieces)


def test_other_caches_are_left_to_themselves(make_model):
    model = make_model()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.arange(1, 5)[None], past_key_values=cache)
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    assert not hasattr(cache.layers[0], "spare_room") and int(cache.get_seq_length()) == 5


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:1].expand(2, -1, -1, -1), lambda x: x[:, :, ::2], lambda x: x[:, :, 1:]],
    ids=["expanded", "every second", "without the first"],
)
def test_views_that_begin_or_step_elsewhere(caches, view):
    append(*caches, 1)
    for cache in caches:
        layer = cache.layers[0]
        layer.keys, layer.values = view(layer.keys), view(layer.values)
    append(*caches, 1)
    append(*caches, 2)


def test_what_was_given_out_is_not_written_to(caches):
    """A snapshot of the tensors, then another continuation after a crop."""
    ours, plain = caches
    append(ours, plain, 1)
    snapshot = ours.layers[0].keys
    before = snapshot.clone()
    for cache in caches:
        cache.crop(-3)
    append(ours, plain, 2)
    append(ours, plain, 2)
    assert torch.equal(snapshot, before)


def test_a_shallow_copy_goes_its_own_way(caches):
    ours, plain = caches
    append(ours, plain, 1)
    other, other_plain = DynamicCache(), DynamicCache()
    other.layers, other_plain.layers = [copy.copy(ours.layers[0])], [copy.copy(plain.layers[0])]
    append(other, other_plain, 1)
    append(ours, plain, 1)
    append(other, other_plain, 1)


def test_drafts_are_taken_back_in_place(caches):
    ours, plain = caches
    append(ours, plain, 1)
    place = ours.layers[0].keys.data_ptr()
    for _ in range(5):
        append(ours, plain, 3)
        take_back(ours, 2)
        plain.crop(-2)
    assert ours.layers[0].keys.data_ptr() == place


def test_after_inference_mode(caches):
    ours, plain = DynamicCache(), DynamicCache()
    with torch.inference_mode():
        append(ours, plain, 4)
        append(ours, plain, 1)
    append(ours, plain, 1)
    append(ours, plain, 1)


# Layers that share one tensor, as a program of a decoding step writes to them

LAYERS = 3


def start_shared(batch=2, length=7):
    ours, plain = DynamicCache(), DynamicCache()
    for layer in range(LAYERS):
        new = tokens(length, batch)
        ours.update(*new, layer), plain.update(*new, layer)
    return ours, plain


def write(ours, plain, n, batch=2):
    """As `Decoding.run` does it."""
    like = torch.empty(batch, n, 0)
    room = shared_room(ours, LAYERS, like)
    end = room.filled + n
    for layer in range(LAYERS):
        latent, k_rope = tokens(n, batch)
        room.latent[layer, :, :, room.filled : end], room.k_rope[layer, :, :, room.filled : end] = latent, k_rope
        plain.update(latent, k_rope, layer)
    room.filled = end
    return room


def same(ours, plain):
    assert ours.get_seq_length() == plain.get_seq_length()
    for one, other in zip(ours.layers, plain.layers):
        assert one.get_seq_length() == other.get_seq_length()
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


CHANGES = {
    "nothing": (lambda cache: None, 2),
    "crop": (lambda cache: cache.crop(-2), 2),
    "take back": (lambda cache: take_back(cache, 2), 2),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), 2),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), 4),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), 1),
    "one layer": (lambda cache: cache.layers[1].update(*[torch.ones(2, 1, 0, w) for w in (R, P)]), 2),
    "tensors put there": (lambda cache: setattr(cache.layers[0], "keys", cache.layers[0].keys * 2), 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_shared_layers_hold_what_transformers_own_would(name):
    change, batch = CHANGES[name]
    with torch.no_grad():
        ours, plain = start_shared()
        for n in (1, 3, SPARE_TOKENS, 1):
            write(ours, plain, n)
            same(ours, plain)
        held = [(layer.keys, layer.values) for layer in ours.layers]
        before = [(keys.clone(), values.clone()) for keys, values in held]
        change(ours)
        if name == "take back":
            plain.crop(-2)
            held = []  # drafts, which nobody else has seen
        else:
            torch.manual_seed(1)
            change(plain)
        same(ours, plain)
        for n in (1, 2):
            write(ours, plain, n, batch)
            same(ours, plain)
        assert all(torch.equal(a, b) for pair in zip(held, before) for a, b in zip(*pair))


def test_copies_of_shared_layers_go_their_own_way():
    with torch.no_grad():
        ours, plain = start_shared()
        write(ours, plain, 2)
        shallow = [copy.copy(layer) for layer in ours.layers]
        deep, deep_plain, pickled = copy.deepcopy(ours), copy.deepcopy(plain), pickle.loads(pickle.dumps(ours))
        write(ours, plain, 3)
        same(ours, plain)
        for each in (deep, pickled):
            same(each, deep_plain)
            assert all(type(layer) is DynamicLayer for layer in each.layers)
        assert all(torch.equal(one.keys, other.keys) for one, other in zip(shallow, deep_plain.layers))
        write(deep, deep_plain, 1)
        same(deep, deep_plain)
        same(ours, plain)


def test_shared_layers_are_those_of_a_dynamic_cache_and_start_anew():
    with torch.no_grad():
        ours, plain = start_shared()
        write(ours, plain, 1)
        assert all(isinstance(layer, DynamicLayer) and layer.is_initialized for layer in ours.layers)
        ours.reset(), plain.reset()
        assert ours.get_seq_length() == 0
        for layer in range(LAYERS):
            new = tokens(4)
            ours.update(*new, layer), plain.update(*new, layer)
        write(ours, plain, 2)
        same(ours, plain)
        # Layers that run one by one again
        append(ours, plain, 1)
        assert ours.layers[0].get_seq_length() == ours.layers[1].get_seq_length() + 1
