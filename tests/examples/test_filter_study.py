"""The study of the filter at small size, on made-up packages: it resumes, and prints what its page quotes."""

import json
from pathlib import Path

import pytest

from tests import programs
from tests.data.known_pool.fake_packages import make_packages


STUDY = Path(__file__).parents[2] / "examples" / "filter_study.py"


def test_packages_that_are_missing_are_named(tmp_path):
    done = programs.run([STUDY, "--folder", tmp_path], cwd=tmp_path)
    assert done.returncode == 1 and "--download fetches" in done.stderr and "gnome-user-docs" in done.stderr
    assert not (tmp_path / "pool").exists()


@pytest.mark.slow  # seven models are trained, if for two steps each
def test_study(tmp_path):
    pytest.importorskip("datatrove")
    make_packages(tmp_path / "packages")
    command = [STUDY, "--folder", tmp_path, "--steps", 2, "--seeds", 1, "--scale", 0.025, "--no_passes"]
    done = programs.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    entries = json.loads((tmp_path / "study.json").read_text())
    assert len(entries) == 7 and all(5 < entry["mean"] < 14 for entry in entries)
    by_choice = {entry["choice"]: entry for entry in entries}
    assert by_choice["filter"]["passes"] == pytest.approx(by_choice["all"]["passes"] / 0.19, rel=0.3)
    assert "| clean by provenance | 2 |" in done.stdout and "| all | 2 |" in done.stdout

    # What is missing is done, and nothing else
    (tmp_path / "study.json").write_text(json.dumps(entries[:2] + entries[3:]))
    assert programs.run(command, cwd=tmp_path).returncode == 0
    again = json.loads((tmp_path / "study.json").read_text())
    assert again[:-1] == entries[:2] + entries[3:] and again[-1] == entries[2]
    done = programs.run([STUDY, "--folder", tmp_path, "--plot", tmp_path / "plot.png"], cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "plot.png").stat().st_size > 1000
