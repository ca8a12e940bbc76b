"""Pipelines on two processes: losses, weights, biases and file of one process, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, TrainingArguments

from tests import programs
from tests.training.pipeline_steps import run
from transformers_dsv3 import PipelineArguments, PipelineTrainer
from transformers_dsv3.option_error import OptionError
from transformers_dsv3.training.pipeline.partition import cut_by_cost, cut_model, modules_of


SCRIPT = Path(__file__).with_name("pipeline_steps.py")
CASES = [
    "1F1B, plain",
    "1F1B, lengths",
    "Interleaved1F1B, stream",
    "ZBV, checkpointing",
    "DualPipeV, accumulation",
    "resume 1F1B ZBV",
    "refusals",
]
MORE = [
    *(
        f"{name}, {settings}"
        for name in ("GPipe", "InterleavedZeroBubble", "ZBV by layers")
        for settings in ("plain",)
    ),
    *(f"{name}, {settings}" for name in ("1F1B", "ZBV") for settings in ("accumulation", "clipping", "long")),
    "1F1B, checkpointing",
    "DualPipeV, long",
    "1F1B, tied",
    "ZBV, tied",
    "1F1B, evaluation",
    "resume DualPipeV 1F1B",
]
FIELDS = {"num_hidden_layers": 4, "mtp_loss_weight": 0.3}


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_model(**FIELDS).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def reports(folder):
    """Function from cases to what each rank reported; one group of processes runs all of them."""

    def run_cases(cases):
        done = programs.run_ranks(2, [SCRIPT, folder, *cases])
        assert done.returncode == 0, done.stderr[-6000:]
        return {
            case: [json.loads((folder / case / f"report-{rank}.json").read_text()) for rank in range(2)]
            for case in cases
        }

    return run_cases


@pytest.fixture(scope="module")
def ran(reports):
    return reports(CASES)


@pytest.fixture(scope="module")
def alone(folder):
    """Function from settings to the report and the weights of one process."""
    kept = {}

    def run_alone(settings):
        if settings not in kept:
            output = folder / f"alone {settings}"
            kept[settings] = run(folder / "model", output, settings), load_file(output / "model.safetensors")
        return kept[settings]

    return run_alone


def check(case, both, alone, folder, measured):
    settings = "plain" if case.startswith("resume") else case.split(", ")[1]
    expected, weights = alone(settings)
    saved = load_file(folder / case / "model.safetensors")
    start = load_file(folder / "model" / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, tensor in weights.items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(saved[name], tensor) and not torch.equal(tensor, start[name]), name
        else:
            torch.testing.assert_close(saved[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 0.02
    for report in both:
        for name, values in expected.items():
            # The sums over both ranks of what each logs for itself
            torch.testing.assert_close(
                torch.tensor(report[name]), torch.tensor(values), rtol=1e-5, atol=1e-5, msg=name
            )
        assert report["table"] == both[0]["table"]
    assert sum(report["here"] for report in both) < 1.5 * both[0]["all"]
    measured[f"pipeline, {case}, largest difference of a weight from one process"] = max(
        (saved[name] - tensor).abs().max().item() for name, tensor in weights.items()
    )


@pytest.mark.parametrize("case", CASES[:-1])
def test_trains_as_one_process(case, ran, alone, folder, measured):
    check(case, ran[case], alone, folder, measured)


def test_forward_passes_under_checkpointing(ran):
    """Once, and once more in the backward pass: 3 steps of 4 microbatches through 4 layers."""
    assert sum(report["passes"] for report in ran["ZBV, checkpointing"]) == 2 * 3 * 4 * 4


def test_the_checkpoint_is_official(ran, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "ZBV, checkpointing").eval()
    native = DeepseekV3ForCausalLM.from_pretrained(folder / "ZBV, checkpointing").eval()
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, native(tokens).logits, rtol=1e-4, atol=1e-5)


def test_what_processes_do_not_share_is_refused_by_both(ran):
    first, second = ran["refusals"]
    assert first == second
    assert "Rank 1 and rank 0 have different rows" in first["other rows"]
    assert "Rank 1 cannot run a batch: reading the data failed" in first["a failing dataset"]
    assert "the disk is gone" in first["a failing dataset"]
    assert "Rank 1 has batches of shapes [" in first["a shorter stream"]
    assert "5 rows, which `microbatches=4` does not divide" in first["a broken last batch"]
    assert "`dataloader_drop_last=True`" in first["a broken data set"]
    assert "differ in PipelineArguments: microbatches is 8 and 4" in first["other settings"]
    assert "outside the vocabulary" in first["tokens out of range"]


@pytest.mark.slow
def test_more_schedules_and_settings(reports, alone, folder, measured):
    for case, both in reports(MORE).items():
        check(case, both, alone, folder, measured)


@pytest.mark.slow
def test_four_processes(make_model, tmp_path, measured):
    make_model(**{**FIELDS, "num_hidden_layers": 8}).save_pretrained(tmp_path / "model")
    expected = run(tmp_path / "model", tmp_path / "alone", "plain"), load_file(tmp_path / "alone/model.safetensors")
    cases = ["1F1B, plain", "Interleaved1F1B, plain", "ZBV, plain", "DualPipeV of 8, plain", "resume - ZBV"]
    for ranks, ran_here in ((2, ["resume 1F1B -"]), (4, cases)):
        done = programs.run_ranks(ranks, [SCRIPT, tmp_path, *ran_here])
        assert done.returncode == 0, done.stderr[-6000:]
    for case in cases:
        name = "resume" if "-" in case else case
        both = [json.loads((tmp_path / name / f"report-{rank}.json").read_text()) for rank in range(4)]
        check(name, both, lambda _: expected, tmp_path, measured)


REFUSED = {
    "schedule='1F2B'": ({"schedule": "1F2B"}, 2, 8),
    "ZBV takes 2 of each process": ({"schedule": "ZBV", "stages_per_rank": 1}, 2, 8),
    "Interleaved1F1B needs 2 or more": ({"schedule": "Interleaved1F1B", "stages_per_rank": 1}, 2, 8),
    "microbatches=0": ({"microbatches": 0}, 2, 8),
    "pipeline_timeout=0": ({"pipeline_timeout": 0}, 2, 8),
    "several processes": ({}, 1, 8),
    "8 stages .* more than the model's 4 layers": ({"schedule": "ZBV"}, 4, 8),
    "per_device_train_batch_size=6` must be a multiple of `microbatches=4": ({"microbatches": 4}, 2, 6),
    "1F1B needs at least one for each of 4 stages": ({"microbatches": 2}, 4, 8),
    "a multiple of 2, its number of rounds": ({"schedule": "Interleaved1F1B", "microbatches": 5}, 2, 10),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_before_any_process_is_asked(message, tiny_config):
    fields, ranks, batch_size = REFUSED[message]
    with pytest.raises(OptionError, match=message):
        PipelineArguments(**fields).check(tiny_config(**FIELDS), ranks, batch_size)


def test_refused_settings_of_the_trainer(make_model, tmp_path, monkeypatch):
    model = make_model(**FIELDS)

    def arguments(**fields):
        return TrainingArguments(tmp_path, use_cpu=True, report_to="none", **fields)

    for fields, message in (
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ):
        with pytest.raises(OptionError, match=message):
            PipelineTrainer(model=model, args=arguments(**fields))
    with pytest.raises(OptionError, match="compute_metrics"):
        PipelineTrainer(model=model, args=arguments(), compute_metrics=len)
    with pytest.raises(OptionError, match="not a Linear"):
        PipelineTrainer(model=torch.nn.Linear(1, 1), args=arguments())
    plain = arguments()
    assert plain.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="`use_cpu=True`"):
        PipelineTrainer(model=model, args=plain)
    monkeypatch.delenv("WORLD_SIZE")
    model.get_decoder().embed_tokens.requires_grad_(False)
    with pytest.raises(OptionError, match="embedding is frozen"):
        PipelineTrainer(model=model, args=arguments())


def test_the_cut_has_the_cheapest_dearest_stage():
    import itertools

    generator = torch.Generator().manual_seed(0)
    for number, stages in ((7, 3), (9, 4), (5, 5), (6, 1)):
        costs = torch.rand(number, generator=generator).tolist()
        starts = cut_by_cost(costs, stages)

        def dearest(starts, costs=costs):
            return max(sum(costs[a:b]) for a, b in zip(starts, [*starts[1:], len(costs)]))

        least = min(dearest([0, *rest]) for rest in itertools.combinations(range(1, number), stages - 1))
        assert starts[0] == 0 and dearest(starts) == pytest.approx(least)


@pytest.mark.parametrize("cut, stages", [("cost", 4), ("layers", 4), ("0.5,2,3.5", 4), ("cost", 1)])
def test_every_part_is_on_one_stage(cut, stages, make_model):
    model = make_model(**FIELDS).train()
    parts = cut_model(model, cut, stages)
    assert len(parts) == stages and all(parts)
    names = [part.name for stage in parts for part in stage]
    assert names[0] == "embedding" and names[-2:] == ["head", "mtp"] and names[1:3] == ["0 attention", "0 network"]
    assert len(names) == len(set(names)) == 2 * 4 + 3
    held = {id(p) for stage in parts for part in stage for m in modules_of(part, model) for p in m.parameters()}
    assert held == {id(parameter) for parameter in model.parameters()}
    if cut == "0.5,2,3.5":
        assert [stage[0].name for stage in parts] == ["embedding", "0 network", "2 attention", "3 network"]


@pytest.mark.parametrize("cut", ["halves", "1", "2,1,3", "1,2,4", "1,2,2.25"])
def test_cuts_that_the_model_does_not_have(cut, make_model):
    with pytest.raises(OptionError, match=f"cut='{cut}'"):
        cut_model(make_model(**FIELDS), cut, 4)


def test_balancing_adds_up_by_layer_of_the_network(make_model, monkeypatch):
    """Two processes that have other layers of a model, as pipelines of other libraries cut it."""
    from transformers_dsv3.training import load_balancing

    model = make_model(**FIELDS)
    whole = load_balancing.routers(model)
    gone = model.get_decoder().layers[1].mlp.gate  # the first of the mixtures is on the other process
    monkeypatch.setattr(load_balancing, "routers", lambda _: [gate for gate in whole if gate is not gone])
    for number, gate in enumerate(whole):
        gate.tokens_per_expert = torch.full((gate.num_experts,), number)
    sent = []

    def all_reduce(tensor):
        sent.append(tensor[:-1].view(5, -1).clone())
        tensor[:-1] += torch.arange(5).repeat_interleave(whole[0].num_experts) * 100

    monkeypatch.setattr(load_balancing.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(load_balancing.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(load_balancing.dist, "all_reduce", all_reduce)
    loads_LE, _ = load_balancing.take_loads(model)
    assert sent[0][:, 0].tolist() == [0, 0, 1, 2, 3]
    assert loads_LE[:, 0].tolist() == [201, 302, 403]


def test_pipelines_of_transformers_are_refused_by_name(folder):
    with pytest.raises(ValueError, match="`pp_size`.*PipelineTrainer"):
        AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config={"pp_size": 2})
