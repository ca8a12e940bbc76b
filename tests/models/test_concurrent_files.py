"""Processes and threads that save to one folder or load from it at once, and saves that are killed."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from transformers_dsv3.models.dsv3 import checkpoint_saving_dsv3


forks = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes")
# By the number of whoever saves: one file, few shards, many
SIZES = ["10GB", "90KB", "40KB"]
ROUNDS = 5
PATIENCE = 120


@pytest.fixture
def numbered(make_model):
    """Function from a number to a model all of whose norms hold it, with a tied head and two MTP layers."""

    def make(number):
        model = make_model(tie_word_embeddings=True, num_nextn_predict_layers=2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.fill_(number + 1)
        return model

    return make


def assert_whole(folder, numbers):
    """One checkpoint of one of those who saved, by what is on disk, and nothing beside it."""
    files = {path.name for path in folder.iterdir()}
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else None
    shards = {"model.safetensors"} if weight_map is None else set(weight_map.values())
    assert files == shards | {"config.json", "generation_config.json"} | ({index.name} if index.exists() else set())
    tensors = {name: (file, t) for file in shards for name, t in load_file(folder / file).items()}
    if weight_map is not None:
        assert {name: file for name, (file, _) in tensors.items()} == weight_map
    found = {float(t.flatten()[0]) - 1 for name, (_, t) in tensors.items() if name.endswith("norm.weight")}
    assert len(found) == 1 and found <= set(numbers)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(model.model.mtp_layers) == 2
    for depth in range(2):
        for copy in ("embed_tokens", "shared_head.head"):
            assert torch.equal(tensors[f"model.layers.{2 + depth}.{copy}.weight"][1], model.lm_head.weight)
    return found.pop()


def run_in_processes(targets):
    """Runs functions in a forked process each; all have to succeed."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    alive = [process.kill() or process for process in processes if process.is_alive()]
    assert not alive and [process.exitcode for process in processes] == [0] * len(processes)


@forks
@pytest.mark.parametrize("sizes", [SIZES, ["40KB"] * 3, ["10GB"] * 3], ids=["mixed", "sharded", "one file"])
def test_processes_save_to_one_folder(numbered, tmp_path, sizes):
    barrier = multiprocessing.get_context("fork").Barrier(len(sizes))
    models = [numbered(number) for number in range(len(sizes))]

    def saver(number):
        def run():
            for _ in range(ROUNDS):
                barrier.wait(PATIENCE)
                models[number].save_pretrained(tmp_path, max_shard_size=sizes[number])

        return run

    run_in_processes([saver(number) for number in range(len(sizes))])
    assert_whole(tmp_path, range(len(sizes)))


@pytest.mark.parametrize("is_one_model", [False, True])
def test_threads_save_to_one_folder(numbered, tmp_path, is_one_model):
    barrier = threading.Barrier(len(SIZES))
    models = [numbered(0)] * len(SIZES) if is_one_model else [numbered(number) for number in range(len(SIZES))]

    def save(number):
        for _ in range(ROUNDS):
            barrier.wait(PATIENCE)
            models[number].save_pretrained(tmp_path, max_shard_size=SIZES[number])

    with ThreadPoolExecutor(len(SIZES)) as pool:
        list(pool.map(save, range(len(SIZES))))
    assert_whole(tmp_path, range(len(SIZES)))


@forks
@pytest.mark.parametrize("is_first", [False, True], ids=["over an earlier one", "the first"])
def test_a_killed_save_harms_nothing_and_is_cleared_away(numbered, tmp_path, monkeypatch, is_first):
    context = multiprocessing.get_context("fork")
    half_way = context.Event()
    if not is_first:
        numbered(0).save_pretrained(tmp_path, max_shard_size="40KB")

    def stop_after_two(tensors, filename, metadata=None):
        safetensors.torch.save_file(tensors, filename, metadata=metadata)
        if "00002-of" in str(filename):
            half_way.set()
            threading.Event().wait()  # until it is killed

    model = numbered(1)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", stop_after_two)
        process = context.Process(target=model.save_pretrained, args=(tmp_path,), kwargs={"max_shard_size": "40KB"})
        process.start()
    try:
        assert half_way.wait(PATIENCE)
        (staging,) = tmp_path.glob(".saving-*")
        # Others save while it lives, and leave what it has written alone
        if not is_first:
            numbered(2).save_pretrained(tmp_path, max_shard_size="90KB")
            assert len(list(staging.glob("*.safetensors"))) == 2
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join(PATIENCE)
    assert staging.is_dir()
    if is_first:
        assert [path.name for path in tmp_path.iterdir()] == [staging.name]
        with pytest.raises(ValueError, match="Unrecognized model"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        assert float(AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight[0]) == 3
    numbered(3).save_pretrained(tmp_path)
    assert assert_whole(tmp_path, [3]) == 3


def test_where_there_are_no_locks_only_old_folders_go(numbered, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_saving_dsv3, "fcntl", None)
    for name, age in ((".saving-new", 3600), (".saving-old", 30 * 24 * 3600)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    model = numbered(0)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: model.save_pretrained(tmp_path, max_shard_size="40KB"), range(6)))
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {".saving-new"}
    (tmp_path / ".saving-new").rmdir()
    assert_whole(tmp_path, [0])


def test_a_folder_that_is_cleared_away_before_it_is_locked(numbered, tmp_path, monkeypatch):
    made = []
    mkdtemp = checkpoint_saving_dsv3.tempfile.mkdtemp

    def make(**kwargs):
        made.append(mkdtemp(**kwargs))
        if len(made) == 1:
            shutil.rmtree(made[0])
        return made[-1]

    monkeypatch.setattr(checkpoint_saving_dsv3.tempfile, "mkdtemp", make)
    numbered(0).save_pretrained(tmp_path)
    assert len(made) == 2
    assert_whole(tmp_path, [0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threads_load_at_once(numbered, tmp_path, dtype):
    """Native's loading sets the default dtype of the process, and threads get, and leave, each other's."""
    model = numbered(0)
    inv_freq = model.model.rotary_emb.inv_freq.clone()
    model.to(dtype).save_pretrained(tmp_path, max_shard_size="40KB")
    barrier = threading.Barrier(4)

    def load(_):
        barrier.wait(PATIENCE)
        return AutoModelForCausalLM.from_pretrained(tmp_path)

    want = model.state_dict()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for loaded in pool.map(load, range(4)):
                got = loaded.state_dict()
                assert got.keys() == want.keys()
                assert all(got[name].dtype == t.dtype and torch.equal(got[name], t) for name, t in want.items())
                assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
                assert torch.equal(loaded.model.rotary_emb.inv_freq, inv_freq)
    assert torch.get_default_dtype() == torch.float32
