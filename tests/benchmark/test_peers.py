"""Worker processes: answers, failures, and that none stays behind."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from transformers_dsv3.benchmark import peer_files, peers
from transformers_dsv3.benchmark.peers import Peer, PeerError, find_converter
from transformers_dsv3.benchmark.rounds import Turn
from transformers_dsv3.benchmark.settings import BenchSettings
from transformers_dsv3.benchmark.workloads import Inputs, Workload
from transformers_dsv3.option_error import OptionError


WORKER = """
import os, sys, time
sys.path.insert(0, {workers!r})
import worker_lines

def start():
    print("libraries print when they are loaded")
    os.write(1, b"some of them past Python\\n")
    if {mode!r} == "broken":
        raise ValueError("no such model")
    if {mode!r} == "dies":
        print("killed by someone", file=sys.stderr, flush=True)
        os._exit(3)
    if {mode!r} == "hangs":
        time.sleep(60)

    def handle(request):
        print("and when they work")
        if request["batch"] > 1:
            raise RuntimeError("one row at a time")
        if request["tokens"] == 13:
            os._exit(4)
        return {{"seconds": request["tokens"] / 1000, "units": request["new_tokens"]}}

    handle.version = "9.9"
    return handle

worker_lines.serve(start)
"""
NOTHING = Inputs(ids=None, latents=[])


@pytest.fixture
def make_peer(tmp_path):
    started = []

    def make(mode="", patience=30.0):
        script = tmp_path / "worker.py"
        script.write_text(WORKER.format(workers=str(peers.WORKERS), mode=mode))
        peer = Peer("peer", [sys.executable, str(script)], tmp_path / "log", patience=patience)
        started.append(peer)
        return peer

    yield make
    for peer in started:
        peer.close()
        assert peer.process.returncode is not None


def test_a_worker_answers_whatever_its_libraries_print(make_peer):
    peer = make_peer()
    assert peer.version == "9.9"
    assert peer.measure(Workload("decode", 128, 1, "bf16"), NOTHING, 8) == Turn(0.128, 8)
    with pytest.raises(PeerError, match="^RuntimeError: one row at a time$"):
        peer.measure(Workload("batched", 128, 4, "bf16"), NOTHING, 8)
    # It goes on after a request that it could not serve
    assert peer.measure(Workload("decode", 64, 1, "bf16"), NOTHING, 2) == Turn(0.064, 2)


def test_a_worker_that_cannot_start_gives_its_reason(make_peer):
    with pytest.raises(PeerError, match="ValueError: no such model"):
        make_peer("broken")
    with pytest.raises(PeerError, match="ended with 3: killed by someone"):
        make_peer("dies")


def test_a_worker_that_dies_or_hangs_is_no_end_of_the_run(make_peer):
    peer = make_peer()
    for _ in range(2):
        with pytest.raises(PeerError, match="ended with 4"):
            peer.measure(Workload("decode", 13, 1, "bf16"), NOTHING, 8)
    with pytest.raises(PeerError, match="no answer within 1 s"):
        make_peer("hangs", patience=1.0)


def test_workers_end_when_the_one_who_asks_is_gone(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(workers=str(peers.WORKERS), mode=""))
    done = subprocess.run([sys.executable, script], input="", capture_output=True, text=True, timeout=600)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"version": "9.9"}


def interpreter(folder, name):
    path = folder / name / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.symlink_to(sys.executable)
    return str(path)


def test_the_converter_is_found_beside_the_interpreter_or_named(tmp_path):
    python = interpreter(tmp_path, "llama")
    settings = BenchSettings(peers=(("llama.cpp", python),))
    with pytest.raises(OptionError, match="there is no converter at") as error:
        find_converter(settings)
    assert error.value.option == "--converter"
    beside = tmp_path / "llama" / "llama.cpp" / "convert_hf_to_gguf.py"
    beside.parent.mkdir()
    beside.write_text("")
    assert find_converter(settings) == beside
    named = tmp_path / "convert.py"
    named.write_text("")
    assert find_converter(BenchSettings(peers=(("llama.cpp", python),), converter=named)) == named
    assert find_converter(BenchSettings()) is None


def test_peers_without_their_programs_are_left_out_with_a_reason(make_model, tmp_path):
    """This interpreter has neither llama.cpp's converter nor vLLM."""
    broken = tmp_path / "convert.py"
    broken.write_text("raise SystemExit('this converter knows no DeepSeek')")
    programs = tuple((name, sys.executable) for name in ("llama.cpp", "ik_llama.cpp", "vllm"))
    settings = BenchSettings(peers=programs, converter=broken, keep=tmp_path / "kept")
    said = []
    model = make_model()
    with ExitStack() as stack:
        folder = peer_files.folder_of_files(settings, stack)
        checkpoint = peer_files.checkpoint_folder(settings, model, folder)
        ready, failed = peer_files.start_peers(settings, model, folder, checkpoint, 1, broken, stack, said.append)
    assert ready == []
    of_gguf = {f"{program} {kind}" for program in ("llama.cpp", "ik_llama.cpp") for kind in ("bf16", "Q8_0", "Q4_0")}
    assert set(failed) == {*of_gguf, "vLLM bf16"}
    assert "No module named 'ik_llama_cpp'" in failed["ik_llama.cpp Q4_0"]
    assert "No module named 'conversion'" in failed["llama.cpp bf16"]
    assert "No module named 'vllm'" in failed["vLLM bf16"]
    saved = {path.name for path in (tmp_path / "kept" / "checkpoint").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= saved
    assert "starting vLLM bf16" in said


def test_files_that_do_not_fit_the_disk_are_refused(tmp_path):
    settings = BenchSettings(peers=(("vllm", sys.executable),), keep=tmp_path / "new")
    peer_files.check_disk(settings, 1000)
    with pytest.raises(OptionError, match="GiB of files") as error:
        peer_files.check_disk(settings, 2**60)
    assert error.value.option == "--keep"
    peer_files.check_disk(BenchSettings(), 2**60)


def test_workers_import_nothing_of_the_package():
    for path in Path(peers.WORKERS).glob("*.py"):
        assert "transformers_dsv3" not in path.read_text(encoding="utf-8")
