"""The study of compression at small size: it resumes, and its entries are what its plot needs."""

import json
from pathlib import Path

import pytest

from tests import programs


STUDY = Path(__file__).parents[2] / "examples" / "compress_study.py"


@pytest.mark.slow  # eight models are trained, if for a step or two each
def test_study(tmp_path):
    command = [STUDY, "--folder", tmp_path, "--small", "--steps", 2, "--heal", 1]
    done = programs.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    entries = json.loads((tmp_path / "study.json").read_text())
    by_model = {}
    for entry in entries:
        by_model.setdefault(entry["model"], []).append(entry)
    assert list(by_model) == [
        "base",
        "control",
        *("reap 25% healed", "reap 50% healed", "random 50% healed", "reap 50%", "random 50%"),
        "dense",
    ]
    for name, of_model in by_model.items():
        sizes = [entry["bytes"] for entry in of_model]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) == (1 if name == "dense" else 4)
        assert all(2 < entry["bits"] < 9 for entry in of_model)
    for one, other in zip(by_model["reap 50%"], by_model["random 50% healed"], strict=True):
        assert one["bytes"] == pytest.approx(other["bytes"], abs=1024)  # headers
    assert by_model["base"][0]["bytes"] / by_model["reap 50%"][-1]["bytes"] > 2
    weights = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in by_model}
    assert weights["reap 50%"] < weights["reap 25% healed"] < weights["base"] == weights["control"]

    # What is missing is done, and nothing else
    (tmp_path / "study.json").write_text(json.dumps(entries[:-1]))
    before = (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns
    assert programs.run(command, cwd=tmp_path).returncode == 0
    again = json.loads((tmp_path / "study.json").read_text())
    assert again == entries and (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns == before
    done = programs.run([STUDY, "--folder", tmp_path, "--plot", tmp_path / "plot.png"], cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "plot.png").stat().st_size > 1000
