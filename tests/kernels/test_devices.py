"""What serves a model on each kind of device: the table of examples/gpu.md is what `explain` says there."""

import json
import re
from pathlib import Path

import pytest

import transformers_dsv3
from tests import programs
from transformers_dsv3.kernels.backends import ABSORBED, EXPANDED, EXPERTS, LINEAR, NORM, STEP
from transformers_dsv3.kernels.cpu import library as cpu_library
from transformers_dsv3.kernels.triton_src.tuned import FAMILIES


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples" / "gpu.md"
COLUMNS = {
    "experts": EXPERTS,
    "attention, decoding": ABSORBED,
    "attention, prefill": EXPANDED,
    "linear layers": LINEAR,
    "norms": NORM,
}


def rows(headings):
    """The rows of the page's table with these first headings: from a heading to a cell, for each row."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith(f"| {headings} |"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:]]
    table = cells[: next(at for at, line in enumerate(lines[start:]) if not line.startswith("|"))]
    return [dict(zip(table[0], row)) for row in table[2:]]


def named(cell):
    return re.findall(r"`([^`]+)`", cell)


def families_of(row):
    return re.findall(r"\b(?:sm\d+|gfx\w+)\b", row["shown"])


DEVICES = {row["device"]: row for row in rows("device | experts")}


@pytest.fixture(scope="module")
def fake():
    """Function from a device that is not there to what serves a model on it, found out in a process of its own."""
    known = {}

    def serve(device):
        if device not in known:
            script = ROOT / "tests" / "kernels" / "fake_device.py"
            done = programs.run([script, device])
            assert done.returncode == 0, done.stderr
            known[device] = json.loads(done.stdout)
        return known[device]

    return serve


def check(row, in_use, step):
    for column, operation in COLUMNS.items():
        # `auto` stands for what it chooses
        assert set(named(row[column])) == set(in_use[operation.name]) - {"auto"}, column
    assert named(row["decoding step"]) == step


def test_names_of_the_table():
    for row in DEVICES.values():
        for column, operation in {**COLUMNS, "decoding step": STEP}.items():
            assert set(named(row[column])) <= {b.name for b in operation.backends}, row["device"]
        assert set(families_of(row)) <= FAMILIES.keys()
    devices = " ".join(DEVICES)
    for name in ("x86", "ARM", "A100", "H100", "H800", "RTX 4090", "MI250", "MI300", "Ascend 910B", "Apple"):
        assert name in devices


def test_this_cpu(make_model):
    """On the table's x86; what a processor without AVX-512 or a compiler leaves out may be missing."""
    row = DEVICES["CPU, x86-64"]
    model = make_model(attn_implementation="sdpa")
    in_use = {operation.name: set() for operation in COLUMNS.values()}
    operation = None
    for line in transformers_dsv3.explain(model).splitlines()[1:]:
        if not line.startswith(" "):
            operation = line.partition(" (")[0]
        elif line[2] == "*" and operation in in_use:
            in_use[operation].add(line[4:].split()[0])
    for column, operation in COLUMNS.items():
        assert in_use[operation.name] - {"auto"} <= set(named(row[column])), column
        if cpu_library.unavailable is None:
            assert "cpu" in in_use[operation.name]


@pytest.mark.parametrize("device", [device for device, row in DEVICES.items() if families_of(row)])
def test_gpus(device, fake):
    there = fake("cuda")
    check(DEVICES[device], there["in use"], [*there["in use"][STEP.name], *there["static"]])
    assert "not run on a GPU" in DEVICES[device]["shown"]


@pytest.mark.parametrize("device, name", [("npu", "Ascend 910B"), ("mps", "Apple")])
def test_devices_of_plain_pytorch(device, name, fake):
    """Every backend of ours refuses with a reason, nothing fails, and PyTorch's own operators do the work."""
    row = next(row for title, row in DEVICES.items() if title.startswith(name))
    there = fake(device)
    plain = {
        **there["in use"],
        EXPERTS.name: [*there["in use"][EXPERTS.name], "grouped_mm", "batched_mm"],
    }  # as launched below
    check(row, plain, there["static"])
    assert "plain PyTorch" in row["shown"]
    for ours in ("cpu", "triton", "grouped_cpu", "cpu_training", "onednn", "flash_mla", "liger", "deepgemm"):
        lines = [line for line in there["text"].splitlines() if line[4:].split()[:1] == [ours]]
        assert lines and all("; no: " in line for line in lines), ours
    assert "aten.bmm" in there["launched"]["1"] and "aten._grouped_mm" not in there["launched"]["1"]
    assert "aten._grouped_mm" in there["launched"]["40"]
    assert not [name for names in there["launched"].values() for name in names if "dsv3" in name]


def test_compiled_figures_are_of_every_family():
    figures = rows("family | devices")
    assert [named(row["family"])[0] for row in figures] == list(FAMILIES)
    for row in figures:
        family = FAMILIES[named(row["family"])[0]]
        assert row["devices"] == family.devices
        largest, of = (int(number) for number in re.match(r"(\d+) of (\d+) KiB", row["shared memory"]).groups())
        assert of == family.shared // 1024
        assert largest <= of or row["shared memory"].endswith("does not fit")
        assert row["spilled"] == "0"
