import errno
import json
import os
from pathlib import Path

import pytest

from transformers_dsv3.files import file_refusal, json_bytes, partial_path, write_json, write_refusal, write_whole


def test_a_file_is_written_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_whole(path, b"old")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]

    # A disk that fills up half way
    def fail(self, target):
        assert self == partial_path(path) and self.read_bytes() == b"new"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A loss of power leaves one or the other; a process that is killed leaves the system's memory as it is."""
    path, seen = tmp_path / "record.json", []
    sync = os.fsync

    def watch(descriptor):
        seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))
        sync(descriptor)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    monkeypatch.setattr(os, "fsync", watch)
    write_whole(path, b"new")
    assert seen == [(str(partial_path(path)), False), (str(tmp_path), True)]


def test_json_for_programs_and_people(tmp_path):
    value = {"name": "größe", "steps": [1, 2.5, -3e-05], "words": ["a", "b"], "file": os.fsdecode(b"caf\xe9")}
    for options in ({}, {"indent": 1}, {"rows": True}):
        assert json.loads(json_bytes(value, **options)) == value
    lines = json_bytes(value, indent=1, rows=True).decode().splitlines()
    assert lines[1:3] == [' "name": "größe",', ' "steps": [1, 2.5, -3e-05],']
    write_json(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").read_bytes() == json_bytes(value)
    # A list in a string stays as it is
    assert json.loads(json_bytes({"text": "[1,   2]"}, rows=True)) == {"text": "[1,   2]"}


def test_folders_that_take_no_files(tmp_path):
    assert write_refusal(tmp_path) is None
    missing = tmp_path / "missing"
    assert write_refusal(missing) == f"nothing can be written in {missing}: No such file or directory"


def test_places_where_no_file_can_be(tmp_path):
    assert file_refusal(tmp_path / "new.json") is None and not list(tmp_path.iterdir())
    assert file_refusal(tmp_path) == f"{tmp_path} is a folder, not a file"
    assert file_refusal(tmp_path / "no" / "x.json") == f"there is no folder {tmp_path / 'no'}"
    # A finished file takes its name by a rename, which root can do to /dev/null too
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "is a device or a pipe" in file_refusal(pipe) and "is a device or a pipe" in file_refusal(Path("/dev/null"))
