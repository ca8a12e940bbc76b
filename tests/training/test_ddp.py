"""DistributedDataParallel with gradient checkpointing, which waits for a gradient of every trainable parameter."""

from pathlib import Path

from tests import programs


def test_checkpoints_with_idle_mtp_layers_train():
    script = Path(__file__).with_name("ddp_steps.py")
    run = programs.run_ranks(2, [script])
    assert run.returncode == 0, run.stderr[-3000:]
    assert "trained DeepseekV3ForCausalLM" in run.stdout and "trained DeepseekV3ForTokenClassification" in run.stdout
