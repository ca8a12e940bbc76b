"""Processes killed in the middle of an upload or a download, and full disks: the same command again completes them."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from transformers_dsv3.hub.hub_errors import HubError
from transformers_dsv3.hub.pull import pull_from_hub
from transformers_dsv3.hub.push import push_to_hub
from transformers_dsv3_cli.main import app


COMMAND = ("-m", "transformers_dsv3.cli")


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def there(hub):
    files = hub.files("anna/model")
    del files[".gitattributes"]
    return files


def killed(hub, shell, where, at, *arguments, **environment):
    """Runs the command and kills it (-9) when `at` bytes of the body of a request `where` have gone over."""
    processes = []
    fault = hub.inject(where, "call", at=at, action=lambda: os.kill(processes[0].pid, signal.SIGKILL))
    processes.append(shell(*COMMAND, *arguments, **environment))
    output = "".join(processes[0].communicate(timeout=120))
    assert (processes[0].returncode, fault.hits) == (-signal.SIGKILL, 1), output
    assert not any(token in output for token in hub.tokens.values())
    hub.faults.clear()


def again(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ["where", "at"],
    [
        ("PUT /lfs/basic/", 20_000),
        pytest.param("PUT /lfs/part/", 10_000, marks=pytest.mark.slow),
        pytest.param("POST .*/objects/batch", 40, marks=pytest.mark.slow),
        pytest.param("POST .*/commit/", 2_000, marks=pytest.mark.slow),
    ],
)
def test_pushes(hub, checkpoints, shell, tally, where, at):
    push_to_hub(checkpoints / "single", "anna/model")
    before, new = there(hub), contents(checkpoints / "sharded")
    if "part" in where:
        hub.part_bytes = 20_000
    killed(hub, shell, where, at, "push", checkpoints / "sharded", "anna/model")
    # The Hub may have had the commit to its end already
    assert there(hub) in ([before, new] if "commit" in where else [before])
    arrived = sum(len(data) for name, data in new.items() if hub.has(data))
    hub.received.clear()
    again("push", checkpoints / "sharded", "anna/model")
    files = there(hub)
    lost = [name for name in new if files.get(name) != new[name]]
    tally.settle(1, tally.KILLED, lost)
    # Nothing that had arrived was sent a second time
    large = sum(len(data) for name, data in new.items() if name.endswith(".safetensors"))
    assert hub.received["PUT"] == large - arrived


@pytest.mark.parametrize(
    ["place", "where", "at"],
    [
        ("folder", "GET /cdn/", 20_000),
        pytest.param("cache", "GET /cdn/", 20_000, marks=pytest.mark.slow),
        pytest.param("cache", "GET .*/resolve/.*/tokenizer.json", 500, marks=pytest.mark.slow),
        pytest.param("folder", "GET .*/resolve/.*/tokenizer.json", 500, marks=pytest.mark.slow),
    ],
)
def test_pulls(hub, checkpoints, shell, tally, tmp_path, place, where, at):
    push_to_hub(checkpoints / "sharded", "anna/model")
    wanted = hub.files("anna/model")
    target = ["--output", tmp_path / "model"] if place == "folder" else []
    killed(hub, shell, where, at, "pull", "anna/model", *target)
    if place == "folder":
        assert not (tmp_path / "model").exists()
    elif "cdn" in where:
        with pytest.raises(OSError):
            AutoModelForCausalLM.from_pretrained("anna/model", local_files_only=True)
    arrived = contents(tmp_path / "cache" / "models--anna--model" / "snapshots")
    lost = [name for name, data in arrived.items() if data != wanted[name.partition("/")[2]]]
    again("pull", "anna/model", *target)
    found = tmp_path / "model"
    if place == "cache":
        (found,) = (tmp_path / "cache").glob("models--anna--model/snapshots/*")
    else:
        assert [path.name for path in tmp_path.iterdir() if "model" in path.name] == ["model"]
    files = contents(found)
    lost += [name for name in wanted if files.get(name) != wanted[name]]
    tally.settle(1, tally.KILLED, lost)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB; where this user cannot mount one, the tests that need it are skipped."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs to be root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_a_disk_that_fills_up_while_downloading(hub, checkpoints, tally, small_disk, place):
    push_to_hub(checkpoints / "sharded", "anna/model")
    wanted = hub.files("anna/model")
    filler = small_disk / "somebody else's"

    def fill():
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(4096)) == 4096:
                pass

    full = hub.inject("GET /cdn/", "call", at=100, action=fill)
    target = {"output": small_disk / "model"} if place == "folder" else {"cache_dir": small_disk / "cache"}
    with pytest.raises(HubError, match="downloading anna/model failed: .*No space left on device.*Run the same again"):
        pull_from_hub("anna/model", **target)
    assert not (small_disk / "model").exists()
    found = list((small_disk / "cache").glob("models--anna--model/snapshots/*"))
    lost = [name for folder in found for name, data in contents(folder).items() if data != wanted[name]]
    filler.unlink()
    files = contents(pull_from_hub("anna/model", **target))
    lost += [name for name in wanted if files.get(name) != wanted[name]]
    tally.settle(full.hits, tally.REFUSED, lost)


def test_no_space_for_the_copy_that_a_push_of_an_object_makes(hub, make_model, small_disk, monkeypatch):
    (small_disk / "somebody else's").write_bytes(bytes(900_000))
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    with pytest.raises(HubError, match="cannot save the model in .*: .*[Nn]o space left"):
        push_to_hub(make_model(), "anna/model")
    assert hub.requests == []
    assert [path.name for path in small_disk.iterdir()] == ["somebody else's"]


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("transformers_dsv3.cli", run_name="__main__")
"""


def test_a_quota_that_no_large_file_fits_in(hub, checkpoints, shell, tally, tmp_path):
    """What every user can try: files of more than 40,000 bytes break off in the middle."""
    push_to_hub(checkpoints / "sharded", "anna/model")
    wanted = hub.files("anna/model")
    process = shell("-c", LIMITED, 40_000, "pull", "anna/model", "--output", tmp_path / "model")
    output = "".join(process.communicate(timeout=120))
    assert process.returncode == 1, output
    assert "Error: downloading anna/model failed" in output and "File too large" in output
    assert "Traceback" not in output
    assert not (tmp_path / "model").exists()
    again("pull", "anna/model", "--output", tmp_path / "model")
    files = contents(tmp_path / "model")
    tally.settle(1, tally.REFUSED, [name for name in wanted if files.get(name) != wanted[name]])


def test_a_place_that_cannot_be_written_to(hub, checkpoints, tmp_path):
    push_to_hub(checkpoints / "single", "anna/model")
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="Not a directory"):
        pull_from_hub("anna/model", output=tmp_path / "file" / "model")


@pytest.mark.slow
def test_interrupted_by_the_keyboard(hub, checkpoints, shell):
    processes = []
    hub.inject("PUT /lfs/", "call", at=100, action=lambda: os.kill(processes[0].pid, signal.SIGINT))
    processes.append(shell(*COMMAND, "push", checkpoints / "single", "anna/model"))
    output = "".join(processes[0].communicate(timeout=120))
    assert processes[0].returncode == 130, output
    assert "Stopped. A push is one commit" in output and "Traceback" not in output
