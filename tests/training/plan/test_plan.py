"""Plans of training: counts beside models, memory beside closed forms, predictions beside published runs, the verb."""

import json

import pytest
from typer.testing import CliRunner

from transformers_dsv3.compression.plan import model_config
from transformers_dsv3.training.metrics import multiplied_parameters
from transformers_dsv3.training.plan.gpus import GPUS
from transformers_dsv3.training.plan.idle import idle_table
from transformers_dsv3.training.plan.published import bills, compare
from transformers_dsv3.training.plan.search import Wanted, fastest, possible_splits
from transformers_dsv3.training.plan.splits import Split, Workload, estimate, plan
from transformers_dsv3.training.plan.units import operations_per_token, units_of
from transformers_dsv3_cli.main import app


@pytest.fixture(scope="module")
def comparisons():
    return compare(model_config)


@pytest.mark.parametrize(
    "fields", [{}, {"q_lora_rank": None, "n_shared_experts": 2}, {"num_hidden_layers": 4}], ids=str
)
def test_parameters_and_products_are_the_models(fields, make_model):
    model = make_model(**fields, mtp_loss_weight=0.3)
    units = units_of(model.config, sequence=64)
    parameters = sum(unit.parameters + unit.expert_parameters for unit in units)
    assert parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sum(unit.products for unit in units) == multiplied_parameters(model)
    context = sum(unit.context for unit in units)
    layers = model.config.num_hidden_layers + 1
    assert context == layers * 64 * 4 * (24 + 12)
    assert operations_per_token(units) == 6 * multiplied_parameters(model) + 3 * context


def test_memory_of_one_gpu_and_of_shards():
    config = model_config("moonlight-16b-a3b")
    workload = Workload(config, global_batch=256, mtp=False)
    units = workload.units
    parameters = sum(unit.parameters + unit.expert_parameters for unit in units)
    assert parameters == pytest.approx(15.96e9, rel=2e-3)  # as published
    one = plan(workload, Split(1, 1, 1, 1, None), GPUS["h100"])
    assert one.memory["weights"] == 2 * parameters and one.memory["gradients"] == 4 * parameters
    assert one.memory["optimizer"] == 12 * parameters and not one.fits
    assert one.idle == 0.0 and one.busy == [1.0]
    # ZeRO-1 shards what the optimizer has, FSDP2 all; experts are shared by EP, and by DP only beyond it
    experts = sum(unit.expert_parameters for unit in units)
    zero = plan(workload, Split(1, 1, 8, 64, None), GPUS["h100"])
    assert zero.memory["weights"] == 2 * (parameters - experts + experts / 8)
    assert zero.memory["optimizer"] == pytest.approx(12 * parameters / 64)
    whole = plan(workload, Split(1, 1, 8, 64, None, "full", sharded=True), GPUS["h100"])
    assert whole.memory["gradients"] == pytest.approx(4 * parameters / 64)
    assert whole.memory["activations"] == sum(unit.kept[2] for unit in units) * 4096
    for name in ("weights", "gradients", "optimizer"):
        parts = plan(workload, Split(2, 1, 8, 32, None), GPUS["h100"]).memory
        assert parts[name] <= zero.memory[name] * 1.01
    muon = plan(Workload(config, global_batch=256, mtp=False, optimizer="muon"), one.split, GPUS["h100"])
    assert muon.memory["optimizer"] == 8 * parameters and muon.parts["optimizer"] > one.parts["optimizer"]


def test_parts_of_a_step_are_the_step(comparisons):
    for comparison in comparisons:
        made = comparison.plan
        assert sum(made.parts.values()) == pytest.approx(made.seconds)
        assert all(value >= 0 for value in made.parts.values())
        guess = estimate(made.workload, made.split, made.gpu)
        assert 0.75 < guess.seconds / made.seconds < 1.02
        assert 0.4 < guess.memory_bytes / made.memory_bytes < 1.1


def test_published_runs(comparisons, measured):
    """Within a fifth, as the help says; and the report's bill."""
    for comparison in comparisons:
        name = f"{comparison.run.name}, {comparison.run.split.gpus} GPUs"
        measured[f"predicted over published tokens a second, less 1: {name}"] = comparison.difference
        assert abs(comparison.difference) < 0.2
    assert comparisons[0].run.tokens_per_second == pytest.approx(1543, abs=1)
    published, predicted, article, _ = bills(comparisons[0].plan)
    assert published.dollars(2.0) == pytest.approx(5.576e6) and published.days == pytest.approx(56.7, abs=0.1)
    assert article.gpus == 16384 and article.days == pytest.approx(7.09, abs=0.01)
    assert predicted.dollars(2.0) == pytest.approx(5.576e6, rel=0.2)


def test_idle_time_of_unequal_parts(measured):
    for row in idle_table(model_config("deepseek-v3")):
        measured[f"idle share of DeepSeek-V3 by ZBV, {row.ranks} ranks, {row.microbatches} microbatches"] = row.zbv
        assert row.floor < row.zbv <= row.target
        assert row.zbv < row.by_cost / 1.5 and row.by_cost < row.whole


def test_every_split_and_the_fastest():
    workload = Workload(model_config("moonlight-16b-a3b"), global_batch=256)
    splits = list(possible_splits(workload, 16, GPUS["h100"]))
    assert len(splits) == len(set(splits)) > 100 and all(split.gpus == 16 for split in splits)
    plans = fastest(workload, 16, GPUS["h100"], top=4, tries=0)
    assert len(plans) == 4 and all(made.fits for made in plans)
    assert [made.seconds for made in plans] == sorted(made.seconds for made in plans)
    assert len({(made.split.tp, made.split.pp, made.split.ep) for made in plans}) == 4
    (asked,) = fastest(workload, 16, GPUS["h100"], Wanted(tp=1, pp=4, ep=4, schedule="ZBV", fp8=False), tries=0)
    assert str(asked.split).startswith("TP1 PP4 EP4 DP4 ZBV BF16")
    (nearest,) = fastest(Workload(model_config("deepseek-v3"), global_batch=256), 8, GPUS["h100"], tries=0)
    assert not nearest.fits


@pytest.fixture
def run():
    return lambda *words: CliRunner().invoke(app, ["plan", *map(str, words)])


@pytest.fixture
def folder(tiny_config, tmp_path):
    tiny_config(num_hidden_layers=8).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_verb(run, folder, tmp_path):
    options = ["--gpus", 8, "--global-batch", 64, "--sequence", 128, "--tokens", "1B", "--top", 2]
    files = ["--json", tmp_path / "plans.json", "--gantt", tmp_path / "schedule.png"]
    done = run(folder, *options, "--pp", 4, "--gpu", "a100", *files, "--price-per-hour", 3)
    assert done.exit_code == 0, done.output
    assert "PP4" in done.output and "B tokens a day" in done.output and "FP8" not in done.output
    first, *_ = json.loads((tmp_path / "plans.json").read_text())
    assert first["split"]["pp"] == 4 and first["fits"] and len(first["busy_share_by_rank"]) == 4
    assert first["days"] == pytest.approx(1e9 / first["tokens_per_second_a_gpu"] / 8 / 86400)
    assert first["dollars"] == pytest.approx(3 * first["gpu_hours"])
    assert first["stages"][0].startswith("embedding") and first["stages"][-1].endswith("MTP layer 0's head")
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")
    done = run(folder / "config.json", "--gpus", 8, "--global-batch", 64, "--pp", 1, "--top", 1)
    assert done.exit_code == 0 and "no pipeline" in done.output


def test_its_other_tables(run, tmp_path):
    done = run("--published", "--price-per-hour", 2)
    assert done.exit_code == 0 and "5.576" in done.output and "16,384" in done.output and "78%" in done.output
    trace = {"ranks": [[["0F0", 0, 1], ["0B0", 5, 6]], [["1F0", 2, 3], ["1B0", 3, 4]]]}
    (tmp_path / "trace.json").write_text(json.dumps(trace))
    done = run("--replay", tmp_path / "trace.json", "--gantt", tmp_path / "replay.png")
    assert done.exit_code == 0 and "-33.3% off" in done.output and (tmp_path / "replay.png").exists()


@pytest.mark.parametrize(
    "words, option, reason",
    [
        ([], "CONFIG", "is needed"),
        (["deepseek-v3"], "--gpus", "is needed"),
        (["deepseek-v3", "--gpus", 0], "--gpus", "at least 1, not 0"),
        (["deepseek-v4", "--gpus", 8], "CHECKPOINT", "is not there"),
        (["deepseek-v3", "--gpus", 8, "--gpu", "h1000"], "--gpu", "is one of a100"),
        (["deepseek-v3", "--gpus", 8, "--gpu-memory", -1], "--gpu-memory", "above 0"),
        (["deepseek-v3", "--gpus", 8, "--tp", 3], "--gpus", "8 do not divide by TP 3"),
        (["deepseek-v3", "--gpus", 12, "--tp", 3], "--tp", "3 must divide 128 heads"),
        (["deepseek-v3", "--gpus", 64, "--ep", 128], "--ep", "128 must divide 256 experts and the"),
        (["deepseek-v3", "--gpus", 64, "--global-batch", 7, "--pp", 1], "--global-batch", "7 sequences do not divide"),
        (["deepseek-v3", "--gpus", 64, "--schedule", "FIFO"], "--schedule", "is one of GPipe"),
        (["deepseek-v3", "--gpus", 64, "--recompute", "some"], "--recompute", "is one of none"),
        (["deepseek-v3", "--gpus", 64, "--gpu", "a100", "--fp8"], "--fp8", "no products in FP8"),
        (["deepseek-v3", "--gpus", 256, "--pp", 128, "--global-batch", 256], "--pp", "more stages than"),
        (["deepseek-v3", "--gpus", 64, "--tokens", "many"], "--tokens", "14.8T or 300B"),
        (["deepseek-v3", "--gpus", 64, "--optimizer", "sgd"], "--optimizer", "is one of adamw, muon"),
        (["deepseek-v3", "--gpus", 64, "--price-per-hour", 0], "--price-per-hour", "above 0"),
        (["deepseek-v3", "--gpus", 64, "--top", 0], "--top", "at least 1"),
        (["deepseek-v3", "--gpus", 64, "--gantt", "/nowhere/a.png"], "--gantt", "nowhere"),
        (["deepseek-v3", "--idle", "--published"], "--published", "give one of them"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_what_is_refused(words, option, reason, run):
    done = run(*words)
    assert done.exit_code == 2, done.output
    said = " ".join(done.output.replace("│", " ").split())
    assert option in said and reason in said
