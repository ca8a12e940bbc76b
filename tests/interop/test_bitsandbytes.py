"""bitsandbytes, native fine-grained FP8, torchao and PyTorch's own quantisation take the modules they take in native.

One process without the plugin and one with it quantise the same checkpoint; names, classes and stored types of all
modules are compared, sizes, and what the models compute on a CPU.
"""

import json
from pathlib import Path

import pytest
import torch


pytestmark = pytest.mark.interop

SCRIPT = Path(__file__).parent / "quantized_models.py"
# bitsandbytes and torchao leave small layers as they are
CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "num_nextn_predict_layers": 0,
}
LINEAR_LAYERS = 16  # of attention, of the dense network and of the shared experts, in two layers
# What has to be found how often, and how far results may lie apart as part of the largest logit. Four bits are
# multiplied in another way for other shapes of the input.
EXPECTED = {
    "bitsandbytes 4 bit": ("Linear4bit", LINEAR_LAYERS, 1e-2),
    "bitsandbytes NF4, double": ("Linear4bit", LINEAR_LAYERS, 1e-2),
    "bitsandbytes 8 bit": ("Linear8bitLt", LINEAR_LAYERS, 1e-2),
    "FineGrainedFP8Config": ("FP8Linear", LINEAR_LAYERS, None),
    "TorchAoConfig": ("Linear", LINEAR_LAYERS + 1, 1e-4),
    "torchao.quantize_": ("Linear", LINEAR_LAYERS + 1, 1e-4),
    "quantize_dynamic": ("Linear", LINEAR_LAYERS + 1, 1e-4),
}


@pytest.fixture(scope="module")
def reports(peer, make_model, tmp_path_factory):
    """What quantized_models.py says of native and of the plugin."""
    quantizers = peer("DSV3_QUANTIZERS_PYTHON", "bitsandbytes", "bitsandbytes torchao")
    folder = tmp_path_factory.mktemp("quantized")
    make_model(**CONFIG).save_pretrained(folder / "model")
    root = str(Path(__file__).parents[2])
    for name, options in (("native", []), ("plugin", ["--plugin"])):
        quantizers.run(SCRIPT, folder / "model", folder / f"{name}.json", *options, PYTHONPATH=root)
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("native", "plugin")]


@pytest.mark.parametrize("way", EXPECTED)
def test_same_modules_and_results(way, reports):
    if way not in reports[0]:
        pytest.skip(f"{way} is not installed there: tests/interop/run.sh installs it")
    native, ours = (report[way] for report in reports)
    kind, count, tolerance = EXPECTED[way]
    assert (native["module"], ours["module"]) == ("transformers", "transformers_dsv3")
    assert ours["kinds"] == native["kinds"] and ours["bytes"] == native["bytes"]
    assert sum(name == kind for name, _ in ours["kinds"].values()) == count
    if tolerance is None:
        assert "FP8Experts" in [name for name, _ in ours["kinds"].values()]
        return
    assert "error" not in ours, ours["error"]
    if "error" in native:
        # bitsandbytes 0.50 multiplies 8 bits of no input of four dimensions on a CPU, and native makes such a one
        print(f"{way}: {count} x {kind}; native does not run: {native['error']}")
        assert torch.tensor(ours["logits"]).isfinite().all() and len(ours["tokens"][0]) == 18
        return
    logits, expected = torch.tensor(ours["logits"]), torch.tensor(native["logits"])
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    print(f"{way}: {count} x {kind}, largest difference of a logit {difference:.1e} of the largest, tokens equal")
    assert difference <= tolerance and ours["tokens"] == native["tokens"]
