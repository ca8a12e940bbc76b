import json

import pytest
import torch
from transformers import TrainingArguments

from transformers_dsv3.data.byte_bpe import train_byte_bpe
from transformers_dsv3.training.checkpoints import checkpoint_to_resume, latest_checkpoint
from transformers_dsv3.training.held_out_metrics import BitsPerByteMetric, nats_of_rows
from transformers_dsv3.training.run_folder import RunFolder, RunFolderError
from transformers_dsv3.training.stream_position import check_stream_arguments


def checkpoint(folder, step, state=None):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}) if state is None else state)
    return path


@pytest.mark.parametrize("state", ["", '{"global_st', "[]", "{}", '{"global_step": 7}'])
def test_half_written_checkpoints_are_removed(tmp_path, state):
    assert latest_checkpoint(tmp_path) is None
    whole = checkpoint(tmp_path, 90)
    checkpoint(tmp_path, 100, state)
    (tmp_path / "checkpoint-110").mkdir()
    own = tmp_path / "checkpoint-best"
    own.mkdir()
    assert latest_checkpoint(tmp_path) == whole
    assert set(tmp_path.iterdir()) == {whole, own}


def test_interrupted_removal_is_finished(tmp_path):
    for step in (5, 10, 100):
        checkpoint(tmp_path, step)
    best = tmp_path / "checkpoint-5"
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text(
        json.dumps({"global_step": 100, "best_model_checkpoint": str(best)})
    )
    assert checkpoint_to_resume(tmp_path, None) == tmp_path / "checkpoint-100"
    assert len(list(tmp_path.iterdir())) == 3
    assert checkpoint_to_resume(tmp_path, 2) == tmp_path / "checkpoint-100"
    assert set(tmp_path.iterdir()) == {best, tmp_path / "checkpoint-100"}


def test_folder_of_a_run(tmp_path):
    tokenizer = train_byte_bpe(["some words"], 260, 64)
    folder = RunFolder(tmp_path / "run")
    folder.check({"seed": 1})
    assert not folder.path.exists() and folder.tokenizer is None
    folder.record({"seed": 1, "text": "a"}, tokenizer)
    assert len(list(folder.path.iterdir())) == 2 and folder.tokenizer is not None
    folder.check({"seed": 1, "text": "a"})
    with pytest.raises(RunFolderError, match="text was 'a' and is 'b' now"):
        folder.check({"seed": 1, "text": "b"})
    folder.record_path.write_text("{")
    with pytest.raises(RunFolderError, match="run.json is damaged"):
        folder.check({})
    # Killed while its record was written, a run leaves this
    folder.record_path.rename(folder.path / "run.json.partial")
    with pytest.raises(RunFolderError, match=r"holds something else \(tokenizer\)"):
        folder.check({})
    with pytest.raises(RunFolderError, match="run.json.partial is a file"):
        RunFolder(folder.path / "run.json.partial").check({})


def test_finished_run(tmp_path):
    folder, args = RunFolder(tmp_path), TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=60)
    folder.record({}, train_byte_bpe(["some words"], 260, 64))
    assert folder.finished_step is None and not folder.is_finished(args)
    (tmp_path / "config.json").write_text("{}")
    for torn in ("", '{"eval_loss": 1.0}', "[]"):
        (tmp_path / "eval_results.json").write_text(torn)
        assert folder.finished_step is None
    (tmp_path / "eval_results.json").write_text('{"eval_loss": 1.0, "step": 60}')
    assert folder.finished_step == 60 and folder.is_finished(args)
    args.max_steps = 61
    assert not folder.is_finished(args)
    assert folder.checkpoint_to_resume(args) is None
    args.max_steps = 59
    with pytest.raises(RunFolderError, match="trained up to step 60, past --max_steps 59"):
        folder.checkpoint_to_resume(args)  # though its checkpoints were removed


def test_interruption_is_explained(tmp_path, capsys):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    folder = RunFolder(tmp_path / "run")
    checkpoint(folder.path, 50)
    for step, said in (
        (60, "before the first checkpoint"),
        (70, f"goes on from the last checkpoint, {folder.path / 'checkpoint-50'}."),
    ):
        with pytest.raises(SystemExit) as caught, folder.explaining_interruption(args):
            raise KeyboardInterrupt
        assert caught.value.code == 130 and said in capsys.readouterr().err
        folder.record({}, train_byte_bpe(["some words"], 260, 64))
        checkpoint(folder.path, step, "half wri")
    assert (folder.path / "checkpoint-60").exists()  # another process may be writing it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--max_steps must be given"),
        ({"max_steps": 1, "save_only_model": True}, "--save_only_model"),
        ({"max_steps": 1, "dataloader_num_workers": 2}, "--dataloader_num_workers 2"),
        ({"max_steps": 1, "accelerator_config": {"split_batches": True}}, "split_batches"),
    ],
)
def test_arguments_that_do_not_fit_a_stream(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        check_stream_arguments(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options))


def test_bits_per_byte_counts_targets():
    logits = torch.zeros(2, 4, 8)  # 3 bits a token, whatever it is
    labels = torch.tensor([[1, 2, 3, 4], [1, -100, 3, -100]])
    nats = nats_of_rows((logits, None), labels)
    assert nats.shape == (2,)

    class Prediction:
        predictions, label_ids = nats.numpy(), labels.numpy()

    metrics = BitsPerByteMetric(bytes_per_token=2.0)(Prediction)
    assert metrics == pytest.approx({"bits_per_byte": 1.5, "perplexity": 8.0})
