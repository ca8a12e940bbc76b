"""Weights and caches in huge pages: asked for where they may be, and tensors as any others all the same."""

import copy
import io
import mmap
import os

import pytest
import torch
from transformers import DynamicCache

import transformers_dsv3
from transformers_dsv3.kernels import pages, selection


@pytest.fixture
def asked(monkeypatch):
    """Ranges that are asked for, on a system that has huge pages, whatever this one has."""
    ranges = []
    monkeypatch.setattr(pages, "_system_refusal", lambda: None)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    monkeypatch.setattr(pages, "_madvise", lambda: lambda start, size, advice: ranges.append((start, size, advice)))
    return ranges


def test_all_of_a_large_tensor_is_asked_for(asked):
    tensor = torch.empty(pages.FEWEST_BYTES + 24, dtype=torch.uint8)
    assert pages.in_huge_pages(tensor) is tensor
    ((start, size, advice),) = asked
    assert start % mmap.PAGESIZE == 0 and start <= tensor.data_ptr() < start + mmap.PAGESIZE
    assert start + size == tensor.data_ptr() + tensor.nbytes
    assert advice == mmap.MADV_HUGEPAGE


def test_small_tensors_and_other_devices_are_left_alone(asked):
    pages.in_huge_pages(torch.empty(pages.FEWEST_BYTES - 1, dtype=torch.uint8))
    pages.in_huge_pages(torch.empty(2**30, device="meta"))
    assert not asked


def test_normal_pages_can_be_chosen(asked, monkeypatch):
    monkeypatch.setitem(selection.chosen, "pages", "normal")
    pages.in_huge_pages(torch.empty(pages.FEWEST_BYTES, dtype=torch.uint8))
    assert not asked and "chosen" in pages.refusal()


@pytest.mark.parametrize(
    "mode, taken",
    [("always [madvise] never", True), ("[always] madvise never", True), ("always madvise [never]", False)],
)
def test_the_systems_mode_decides(tmp_path, monkeypatch, mode, taken):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    monkeypatch.setattr(pages, "MODE", tmp_path / "enabled")
    pages.MODE.write_text(mode)
    assert (pages._system_refusal.__wrapped__() is None) == taken
    pages.MODE.unlink()
    assert "no" in pages._system_refusal.__wrapped__()


def test_what_was_asked_for_is_a_tensor_as_any_other():
    tensor = pages.in_huge_pages(torch.empty(3, pages.FEWEST_BYTES // 4))
    tensor.copy_(torch.arange(tensor.numel()).view(3, -1))
    expected = tensor[:, -1].tolist()
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    assert torch.load(file)[:, -1].tolist() == copy.deepcopy(tensor)[:, -1].tolist() == expected
    assert tensor.share_memory_()[:, -1].tolist() == expected and tensor.is_shared()
    other = pages.in_huge_pages(torch.empty(3, pages.FEWEST_BYTES // 4)).fill_(1.0)
    view = other[2]
    del other
    assert (view == 1).all()  # which keeps the memory
    resized = pages.in_huge_pages(torch.empty(pages.FEWEST_BYTES)).fill_(2.0).resize_(2 * pages.FEWEST_BYTES)
    assert (resized[: pages.FEWEST_BYTES] == 2).all()
    resized.untyped_storage().resize_(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
def test_a_child_process_writes_into_its_own_copy():
    values = pages.in_huge_pages(torch.empty(pages.FEWEST_BYTES, dtype=torch.uint8)).numpy()
    values[:] = 1
    child = os.fork()
    if child == 0:
        values[:] = 2
        os._exit(int(not (values == 2).all()))
    assert os.waitpid(child, 0)[1] == 0
    assert (values == 1).all()


@pytest.mark.skipif(pages.refusal() is not None, reason=f"{pages.refusal()}")
def test_where_weights_lie_is_counted():
    model = torch.nn.Linear(1024, 8 * 1024, bias=False)
    assert pages.bytes_in_huge_pages(model)[1] == model.weight.nbytes
    size = 16 * 2**20
    before = torch.empty(size, dtype=torch.uint8).fill_(1)
    model.weight = torch.nn.Parameter(pages.in_huge_pages(torch.empty(size // 4)).fill_(1.0))
    huge, total = pages.bytes_in_huge_pages(model)
    assert total == size and 0 <= huge <= total  # how many there are is the kernel's affair
    assert before.sum() == size


def test_loaded_weights_and_rooms_of_caches_are_asked_for(make_model, asked, monkeypatch, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(pages, "FEWEST_BYTES", 4096)
    loaded = type(model).from_pretrained(tmp_path)
    ranges = [(start, start + size) for start, size, _ in asked]
    for name, weight in loaded.named_parameters():
        if weight.nbytes >= 4096:
            assert any(a <= weight.data_ptr() and weight.data_ptr() + weight.nbytes <= b for a, b in ranges), name
    asked.clear()
    cache = DynamicCache(config=loaded.config)
    with torch.no_grad():
        for _ in range(2):
            loaded(torch.ones(1, 4, dtype=torch.long), past_key_values=cache)
    ranges = [(start, start + size) for start, size, _ in asked]
    assert all(any(a <= layer.keys.data_ptr() < b for a, b in ranges) for layer in cache.layers)


def test_explain_says_it(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(pages, "_system_refusal", lambda: None)
    monkeypatch.setattr(pages, "bytes_in_huge_pages", lambda model: (2**30, 2**31))
    text = transformers_dsv3.explain(model)
    assert "* huge" in text and "1.00 of 2.00 GiB" in text
    monkeypatch.setitem(selection.chosen, "pages", "normal")
    text = transformers_dsv3.explain(model)
    assert "* normal" in text and "normal pages were chosen" in text
