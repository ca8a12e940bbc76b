"""Packed experts mapped from a disk, under a memory limit that the model is larger than."""

import json
import os
import uuid
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import programs
from transformers_dsv3 import PackedWeightsConfig, quantize
from transformers_dsv3.compression import disk_room as disk_room_module
from transformers_dsv3.compression.disk_room import disk_room
from transformers_dsv3.compression.gguf.export import export_gguf
from transformers_dsv3.compression.quantized_weights import QuantizedExperts
from transformers_dsv3.memory import total_memory
from transformers_dsv3.models.dsv3.checkpoint_files_dsv3 import CheckpointError


IDS = torch.arange(2, 12)[None]


def mapped_bytes():
    """Of files without a name that this process has mapped, in all and resident."""
    sizes, resident, inside = 0, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            inside = line.endswith("(deleted)") and "/dev/" not in line
        elif inside and line.startswith(("Size:", "Rss:")):
            count = int(line.split()[1]) * 1024
            sizes, resident = (sizes + count, resident) if line.startswith("Size") else (sizes, resident + count)
    return sizes, resident


def generated(model):
    return model.generate(IDS, max_new_tokens=8, do_sample=False)[0].tolist()


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux's /proc")
@pytest.mark.parametrize("form", ["packed", "gguf"])
def test_experts_lie_in_a_file_without_a_name(make_wide, save_for_gguf, tmp_path, form):
    folder, disk = tmp_path / "model", tmp_path / "disk"
    disk.mkdir()
    if form == "packed":
        quantize(make_wide(), 4).save_pretrained(folder)
        source = {"pretrained_model_name_or_path": folder}
    else:
        export_gguf(save_for_gguf(folder), tmp_path / "a.gguf", "q4_0", progress=False)
        source = {"pretrained_model_name_or_path": tmp_path, "gguf_file": "a.gguf"}
    before, _ = mapped_bytes()
    config = PackedWeightsConfig(map_from_disk=disk)
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=config).eval()
    stacks = [m for m in model.modules() if isinstance(m, QuantizedExperts)]
    tensors = [t for m in stacks for t in (m.gate_up_proj, m.down_proj, m.gate_up_proj_scale, m.down_proj_scale)]
    assert len(stacks) == 2 and mapped_bytes()[0] - before >= sum(t.nbytes for t in tensors)
    assert not list(disk.iterdir())
    plain = AutoModelForCausalLM.from_pretrained(**source).eval()
    for (name, tensor), other in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert generated(model) == generated(plain)
    model.save_pretrained(tmp_path / "again")
    plain.save_pretrained(tmp_path / "plain")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "plain")]
    assert files[0] == files[1]
    del model, stacks, tensors, tensor
    assert mapped_bytes()[0] == before


def test_which_models_are_mapped(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(disk_room_module, "free_memory", lambda: 1000)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert disk_room(800, 700, None) is None and disk_room(5000, 4000, False) is None
    assert disk_room(5000, 0, True) is None
    assert disk_room(1200, 1000, None).folder == tmp_path and disk_room(10, 5, True).folder == tmp_path
    with pytest.raises(CheckpointError, match="map_from_disk: there is no folder .*nowhere"):
        disk_room(10, 5, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"routed experts take .* GiB on a disk; .*\(map_from_disk=FOLDER\)"):
        disk_room(1 << 60, 1 << 59, None)


GROUPS = Path("/sys/fs/cgroup")
LIMITS = {GROUPS: "memory.max", GROUPS / "memory": "memory.limit_in_bytes"}


@pytest.fixture
def limited():
    """Function from bytes to a control group of so much memory, of either version; skips where none is made."""
    made = []

    def group(n_bytes):
        for top, name in LIMITS.items():
            folder = top / f"dsv3-test-{uuid.uuid4().hex}"
            try:
                folder.mkdir()
                if not (folder / name).exists():
                    folder.rmdir()
                    continue
                made.append(folder)
                (folder / name).write_text(str(n_bytes))
                return folder
            except OSError:
                continue
        pytest.skip("no control group can be made here: a memory limit needs one")

    yield group
    for folder in made:
        folder.rmdir()


PROGRAM = """
import json, sys
from pathlib import Path
folder, group, output = sys.argv[1:]
import torch, transformers_dsv3
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
Path(group, "cgroup.procs").write_text("0")  # what was loaded before counts where it was loaded
model = AutoModelForCausalLM.from_pretrained(folder).eval()
mapped = [m.gate_up_proj for m in model.modules() if hasattr(m, "shape_of")]
ids = model.generate(torch.arange(2, 12)[None], max_new_tokens=8, do_sample=False)[0].tolist()
Path(output).write_text(json.dumps(ids))
"""


@pytest.mark.slow
def test_a_file_half_as_large_again_as_the_limit(make_model, limited, tmp_path):
    """Loads, and generates the same text. Without mapping the kernel ends it."""
    widths = {"hidden_size": 512, "moe_intermediate_size": 768, "n_routed_experts": 128, "num_experts_per_tok": 4}
    model = make_model(**widths, num_hidden_layers=3, n_group=1, num_nextn_predict_layers=0, q_lora_rank=32)
    quantize(model, 8).save_pretrained(tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    limit = int(size / 1.5)
    expected = generated(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval())
    del model
    group = limited(limit)
    output = tmp_path / "ids.json"
    disk = tmp_path / "disk"
    disk.mkdir()
    done = programs.run(["-c", PROGRAM, tmp_path / "model", group, output], TMPDIR=str(disk))
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text()) == expected
    assert "of routed experts are mapped from a file in" in done.stderr
    peaks = [group / name for name in ("memory.peak", "memory.max_usage_in_bytes")]
    peak = next(int(path.read_text()) for path in peaks if path.exists())
    assert peak <= limit + (1 << 20) and size >= 1.49 * limit


def test_limits_of_control_groups_count(limited):
    group = limited(300 << 20)
    pid = os.fork()
    if not pid:
        try:
            (group / "cgroup.procs").write_text("0")
            os._exit(0 if total_memory() == 300 << 20 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
