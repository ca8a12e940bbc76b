"""DistributedDataParallel with gradient checkpointing, which waits for a gradient of every trainable parameter."""

import subprocess
import sys
from pathlib import Path


def test_checkpoints_with_idle_mtp_layers_train():
    script = Path(__file__).with_name("ddp_steps.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "trained DeepseekV3ForCausalLM" in run.stdout and "trained DeepseekV3ForTokenClassification" in run.stdout
