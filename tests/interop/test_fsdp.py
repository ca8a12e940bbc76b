"""FSDP1 and FSDP2 by accelerate, told native's layer by its name: units, losses and checkpoint as one process's.

Two gloo processes. accelerate shards on GPUs only, so sharded_steps.py sets the state that it would set there.
"""

import pytest


pytestmark = pytest.mark.slow

LAYERS = ["model.layers.0", "model.layers.1", "model.layers.2"]


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2"])
def test_layers_are_wrapped_and_trained_as_natives(engine, sharded_run, assert_same_training):
    alone, native, ours = sharded_run("none", False), sharded_run(engine, False), sharded_run(engine, True)
    assert (native.report["module"], ours.report["module"]) == ("transformers", "transformers_dsv3")
    assert ours.report["units"] == native.report["units"]
    assert set(LAYERS) < set(ours.report["units"])
    assert_same_training(native, alone)
    assert_same_training(ours, alone)


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("more", [(), ("--gradient-checkpointing",)], ids=["", "gradient checkpointing"])
def test_mtp_layers_are_units_of_their_own(engine, more, sharded_run, assert_same_training):
    alone, shared = sharded_run("none", True, mtp=True, more=more), sharded_run(engine, True, mtp=True, more=more)
    assert {*LAYERS, "model.mtp.0"} < set(shared.report["units"])
    assert "model.layers.3.eh_proj.weight" in shared.weights
    assert_same_training(shared, alone)
