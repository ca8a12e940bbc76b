import json
from dataclasses import replace
from pathlib import Path

import pytest

from transformers_dsv3.files import write_json
from transformers_dsv3.option_error import OptionError
from transformers_dsv3.training.quickstart_run import (
    RESULTS_NAME,
    QuickstartSettings,
    check_output,
    finished_steps,
    latest_checkpoint,
    plan_run,
    record_run,
    training_folder,
)


SETTINGS = QuickstartSettings(steps=10)


def plan(output, **changes):
    asked = {
        "settings": SETTINGS,
        "text_source": "notes",
        "text_fingerprint": "abc",
        "steps": None,
        "seed": None,
        **changes,
    }
    return plan_run(output, **asked)


def checkpoint(output, step, whole=True):
    folder = training_folder(output) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}) if whole else '{"global_st')
    return folder


def test_a_new_folder_starts_at_zero_and_writes_nothing(tmp_path):
    run = plan(tmp_path / "new")
    assert (run.start_step, run.target_step, run.seed) == (0, 10, 0)
    assert plan(tmp_path / "new", steps=3, seed=7).target_step == 3
    assert not (tmp_path / "new").exists()


def test_an_interrupted_run_is_finished(tmp_path):
    record_run(tmp_path, plan(tmp_path, seed=5))
    checkpoint(tmp_path, 4)
    run = plan(tmp_path)
    assert (run.start_step, run.target_step, run.seed) == (0, 10, 5)
    assert plan(tmp_path, steps=6).target_step == 6
    with pytest.raises(OptionError, match="interrupted at step 4 of 10, past the 3 asked for"):
        plan(tmp_path, steps=3)


def test_a_finished_run_is_trained_further(tmp_path):
    record_run(tmp_path, plan(tmp_path))
    write_json(tmp_path / RESULTS_NAME, {"steps": 10})
    run = plan(tmp_path)
    assert (run.start_step, run.target_step) == (10, 20)
    record_run(tmp_path, run)
    assert finished_steps(tmp_path) == 10
    again = plan(tmp_path)  # killed before its results: the same target again
    assert (again.start_step, again.target_step) == (10, 20)


@pytest.mark.parametrize(
    ("changes", "option", "message"),
    [
        ({"text_fingerprint": "other"}, "--text", r"was trained on other text \(notes"),
        ({"seed": 1}, "--seed", "was started with --seed 0"),
        ({"settings": replace(SETTINGS, vocab_size=99)}, "--output", "other sizes"),
    ],
)
def test_other_text_seed_or_sizes_are_refused(tmp_path, changes, option, message):
    record_run(tmp_path, plan(tmp_path))
    with pytest.raises(OptionError, match=message) as caught:
        plan(tmp_path, **changes)
    assert caught.value.option == option


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OptionError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(OptionError, match=r"holds something else \(file\)"):
        check_output(tmp_path)
    for below in ("file/sub", "file/sub/subsub"):
        with pytest.raises(OptionError, match="file is a file, not a folder") as caught:
            check_output(tmp_path / below)
        assert caught.value.option == "--output"
    if Path("/proc").is_dir():  # where nobody can write, whatever permissions say
        with pytest.raises(OptionError, match="nothing can be written in /proc"):
            check_output(Path("/proc/quickstart"))
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    (tmp_path / "killed" / "training").mkdir(parents=True)
    check_output(tmp_path / "killed")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "training").write_text("x")
    with pytest.raises(OptionError, match=r"holds something else \(training\)"):
        check_output(tmp_path / "other")


def test_a_damaged_record_is_named(tmp_path):
    record_run(tmp_path, plan(tmp_path))
    (training_folder(tmp_path) / "run.json").write_text("{")
    with pytest.raises(OptionError, match="run.json is damaged"):
        plan(tmp_path)


def test_half_written_checkpoints_are_passed_over_and_removed(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    whole = checkpoint(tmp_path, 9)
    half = checkpoint(tmp_path, 100, whole=False)
    empty = training_folder(tmp_path) / "checkpoint-50"
    empty.mkdir()
    assert latest_checkpoint(tmp_path) == whole
    assert not half.exists() and not empty.exists()
