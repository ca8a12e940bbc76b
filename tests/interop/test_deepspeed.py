"""DeepSpeed's ZeRO-3 under `Trainer`, two gloo processes on CPUs: losses and checkpoint as one process's, and leaves.

Parameters are sharded while they are made and loaded; no parameter stays whole on a rank. What DeepSpeed compiles (its
own optimizers, offloading to NVMe) is not run.
"""

import pytest


pytestmark = pytest.mark.interop


@pytest.fixture
def python(peer):
    deepspeed = peer("DSV3_DEEPSPEED_PYTHON", "deepspeed", "deepspeed (with DS_BUILD_OPS=0)")
    return deepspeed.python


def test_zero_3_trains_as_one_process(python, sharded_run, assert_same_training):
    alone = sharded_run("none", False)
    native, ours = (sharded_run("zero3", plugin, python=python) for plugin in (False, True))
    assert (native.report["module"], ours.report["module"]) == ("transformers", "transformers_dsv3")
    for run in (native, ours):
        assert run.report["wrapped"] == "DeepSpeedEngine" and run.report["sharded_when_loaded"]
        # `set_z3_leaf_modules`, by native's class and by its name
        assert run.report["leaves"] == ["model.layers.1.mlp", "model.layers.2.mlp"]
        assert_same_training(run, alone)
    print(f"DeepSpeed ZeRO-3, 2 processes: losses {ours.report['loss']}, native's on one {alone.report['loss']}")


def test_zero_3_with_mtp_layers(python, sharded_run, assert_same_training):
    alone, shared = sharded_run("none", True, mtp=True), sharded_run("zero3", True, mtp=True, python=python)
    assert shared.report["leaves"] == ["model.layers.1.mlp", "model.layers.2.mlp", "model.mtp.0.mlp"]
    assert "model.layers.3.eh_proj.weight" in shared.weights
    assert_same_training(shared, alone)
