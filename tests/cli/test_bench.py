"""The bench command on a tiny checkpoint: what it writes, what it refuses, and what an interruption leaves."""

import builtins
import json
import math
import sys

import pytest
import torch
from typer.testing import CliRunner

import transformers_dsv3
from transformers_dsv3.benchmark import benchmark, ceilings, kernel_workloads, loading
from transformers_dsv3.benchmark.contenders import ModelContender
from transformers_dsv3.benchmark.host_time import kernel_calls
from transformers_dsv3.benchmark.peer_files import bytes_tokenizer
from transformers_dsv3.benchmark.presets import PRESETS, Preset
from transformers_dsv3.benchmark.settings import BenchSettings
from transformers_dsv3.evaluation import machine
from transformers_dsv3.kernels.cpu import library
from transformers_dsv3.option_error import OptionError
from transformers_dsv3_cli.main import app


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "READ_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "GEMM_SHAPE", (64, 64, 64))
    monkeypatch.setattr(machine, "load_average", lambda: 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # these are runs on the CPU


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "model"
    make_model().save_pretrained(folder)
    return str(folder)


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def refused(*arguments):
    result = bench(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_everything_in_one_run(checkpoint, tmp_path):
    threads = torch.get_num_threads()
    path = tmp_path / "bench.json"
    result = bench(
        *(checkpoint, "--what", "decode,prefill,batched,mtp,train", "--contexts", "8,16", "--prefill", "12"),
        *("--batch", "3", "--batch-context", "4", "--dtype", "fp32", "--rounds", "3", "--new-tokens", "4"),
        *("--train-batch", "2", "--train-length", "8", "--threads", "1", "--json", path),
    )
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    for text in ("decode, 16 cached, fp32", "plugin MTP", "of drafts", "x transformers", "GB/s", "MiB of them with"):
        assert text in result.output

    results = json.loads(path.read_text())
    assert results["finished"] and not results["failed"] and not results["warnings"]
    assert results["machine"]["threads"] == 1 and results["machine"]["torch"] == torch.__version__
    assert results["model"]["config"]["kv_lora_rank"] == 16 and results["model"]["weights"] == "of the checkpoint"
    assert results["agreement"]["transformers, fp32"]["relative_error"] < 1e-5
    assert set(results["contenders"]) == {"plugin", "plugin MTP", "transformers"}
    assert [(entry["what"], entry["tokens"], entry["batch"]) for entry in results["workloads"]] == [
        *(("decode", 8, 1), ("decode", 16, 1), ("prefill", 12, 1), ("batched", 4, 3), ("mtp", 8, 1)),
        ("train", 8, 2),
    ]
    for entry in results["workloads"]:
        assert set(entry["contenders"]) == {
            "plugin",
            "transformers",
            *(["plugin MTP"] if entry["what"] == "mtp" else []),
        }
        assert len(entry["ceilings"]["read_bytes_per_second"]) == 3
        for name, figures in entry["contenders"].items():
            assert len(figures["seconds"]) == 3 and min(figures["seconds"]) > 0
            assert figures["median"] == sorted(figures["seconds"])[1]
            if name != "plugin MTP":
                share = figures["floor"]["seconds"] / figures["median"]
                assert math.isclose(figures["floor"]["share"], share) and share > 0
            if entry["what"] in ("decode", "batched"):
                assert figures["host"]["seconds"] >= 0 and figures["host"]["calls"] > 0
        pair = entry["ratios"]["transformers / plugin"]
        seconds = [entry["contenders"][name]["seconds"] for name in ("transformers", "plugin")]
        assert pair["per_round"] == [a / b for a, b in zip(*seconds)]
    assert results["workloads"][0]["experts_used"] == 3.0
    mtp = results["workloads"][4]["contenders"]["plugin MTP"]["mtp"]
    assert mtp["drafted"] > 0 and mtp["acceptance"] == mtp["accepted"] / mtp["drafted"]
    memory = results["workloads"][5]["contenders"]["transformers"]["memory"]
    assert memory["peak_bytes"] >= memory["before_bytes"] > 2**20


@pytest.mark.slow
def test_loading_in_processes_of_their_own_and_the_quality_of_each_width(monkeypatch, make_model, tmp_path):
    monkeypatch.setattr(benchmark, "QUALITY_TOKENS", 100)
    monkeypatch.setattr(benchmark, "QUALITY_WINDOW", 32)
    folder, path = tmp_path / "model", tmp_path / "bench.json"
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
    make_model(**sizes).save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    result = bench(folder, "--what", "load", "--weights", "plain,int4", "--rounds", 1, "--json", path)
    assert result.exit_code == 0, result.output
    assert "plugin int4 loads in" in result.output and "bits a byte of" in result.output
    results = json.loads(path.read_text())
    figures = results["workloads"][0]["contenders"]
    assert set(figures) == {"plugin", "plugin int4", "transformers"}
    for each in figures.values():
        assert set(each["parts"]) == {"reading", "loading", "first_token", "next_token"}
        assert each["median"] == each["parts"]["loading"] + each["parts"]["first_token"]
    quality = {name: bits["value"] for name, bits in results["quality"].items()}
    assert math.isclose(quality["plugin, bf16"], quality["transformers, bf16"], rel_tol=1e-2)
    assert 5 < quality["plugin int4, bf16"] < 12  # a model that knows nothing: log2(300) bits


@pytest.mark.parametrize("contender", ["plain", "int8", "transformers"])
def test_what_a_process_that_loads_measures(checkpoint, contender):
    threads = torch.get_num_threads()
    request = {"contender": contender, "checkpoint": checkpoint, "dtype": "bfloat16", "tokens": 4, "threads": threads}
    parts = loading.load(request)
    assert list(parts) == ["reading", "loading", "first_token", "next_token"]
    assert min(parts["reading"], parts["loading"], parts["first_token"]) > 0


def test_host_time_counts_what_the_compiled_library_and_torch_are_called_for():
    ones = torch.ones(64, 64)

    def decode(tokens):
        torch.zeros(3)
        for _ in range(tokens):
            ones.neg_()
            library.read_seconds(ones)

    assert kernel_calls(decode).number == 2


def test_a_preset_is_made_of_random_weights(monkeypatch, tiny_config, tmp_path):
    fields = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48}
    config = tiny_config(**fields).to_dict()
    kept = {key: config[key] for key in PRESETS["small"].fields}
    monkeypatch.setitem(PRESETS, "small", Preset("tiny", kept))
    path = tmp_path / "bench.json"
    result = bench("small", "--layers", 2, "--what", "decode", "--contexts", 4, "--rounds", 1, "--json", path)
    assert result.exit_code == 0, result.output
    results = json.loads(path.read_text())
    assert results["model"]["cut"] == "2 of 3 layers, asked for"
    assert results["model"]["weights"] == "random"
    assert "2 of 3 layers" in result.output


@pytest.mark.parametrize(
    ("arguments", "option", "says"),
    [
        (["--what", "decode,speed"], "--what", "'speed' is none of decode, prefill"),
        (["--what", ""], "--what", "names nothing"),
        (["--dtype", "fp16"], "--dtype", "'fp16' is none of bf16, fp32"),
        (["--contexts", "128,many"], "--contexts", "'many' is no number"),
        (["--contexts", "128,0"], "--contexts", "0 is not at least 1"),
        (["--contexts", "1k,1024"], "--contexts", "names 1024 twice"),
        (["--prefill", "1"], "--prefill", "1 is not at least 2"),
        (["--batch", "-3"], "--batch", "'-3' is no number"),
        (["--batch-context", "1,2"], "--batch-context", "is not one number"),
        (["--device", "mps"], "--device", "'mps' is none of auto, cpu, cuda"),
        (["--contenders", "plugin,vllm"], "--contenders", "'vllm' is none of plugin, plugin static, transformers"),
        (["--contenders", "plugin,plugin"], "--contenders", "names plugin twice"),
        (["--contenders", "plugin MTP"], "--contenders", "takes part in mtp only"),
        (["--expert-tokens", "0"], "--expert-tokens", "0 is not at least 1"),
        (["--attention", "8k"], "--attention", "'8k' is not ROWSxTOKENS"),
        (["--attention", "1x0"], "--attention", "0 is not at least 1"),
        (["--rounds", "0"], "--rounds", "0 is not at least 1"),
        (["--new-tokens", "1"], "--new-tokens", "1 is not at least 2"),
        (["--threads", "0"], "--threads", "0 is not at least 1"),
        (["--seed", "-1"], "--seed", "does not lie between"),
        (["--json", "/no/such/folder/x.json"], "--json", "there is no folder /no/such/folder"),
        (["--plot", "bench.pdf"], "--plot", "does not end in .png"),
        (["--against", "vllm"], "--against", "is not NAME=PYTHON"),
        (["--against", "sglang=/bin/sh"], "--against", "'sglang' is none of vllm, llama.cpp"),
        (["--against", "vllm=/no/python"], "--against", "there is no interpreter /no/python"),
        (["--against", "vllm=/bin/sh", "--dtype", "fp32"], "--against", "measured in bf16"),
        (["--converter", "/no/convert.py"], "--converter", "there is no file"),
        (["no-such-preset"], "CHECKPOINT_OR_PRESET", "neither a preset (bench-2b, moonlight, small) nor a checkpoint"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, option, says):
    output = refused(*arguments)
    assert option in output and says in output


def test_a_checkpoint_that_cannot_be_measured_is_refused(checkpoint, tmp_path, make_model):
    assert "cuts presets only" in refused(checkpoint, "--layers", 2)
    assert "max_position_embeddings" in refused(checkpoint, "--contexts", "4k")
    make_model(num_nextn_predict_layers=0).save_pretrained(tmp_path / "no-mtp")
    assert "has none" in refused(tmp_path / "no-mtp", "--what", "mtp", "--contexts", 8)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    assert "is a 'llama' checkpoint" in refused(tmp_path / "llama")


def test_plot_without_matplotlib_is_refused_before_compute(checkpoint, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    output = refused(checkpoint, "--plot", tmp_path / "bench.png", "--json", tmp_path / "bench.json")
    assert "--plot" in output and "pip install 'transformers-dsv3[plot]'" in output
    assert not (tmp_path / "bench.json").exists()


def test_plot(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.png"
    result = bench(checkpoint, "--contexts", "4,8", "--prefill", 6, "--rounds", 1, "--dtype", "fp32", "--plot", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_interruption_leaves_the_rounds_that_were_complete(checkpoint, tmp_path, monkeypatch):
    turns = []
    measure = ModelContender.measure

    def interrupted(self, *arguments):
        turns.append(self.name)
        if len(turns) == 2 + 2 * 3 + 2 + 3:  # two warm-ups and three rounds, two warm-ups, then in the second round
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(ModelContender, "measure", interrupted)
    path = tmp_path / "bench.json"
    result = bench(
        checkpoint, "--what", "decode", "--contexts", "4,8", "--rounds", 3, "--dtype", "fp32", "--json", path
    )
    assert result.exit_code == 130
    assert "Stopped" in result.output and "decode, 4 cached" in result.output
    results = json.loads(path.read_text())
    assert not results["finished"]
    rounds = [len(entry["contenders"]["plugin"]["seconds"]) for entry in results["workloads"]]
    assert rounds == [3, 1]
    assert not list(tmp_path.glob("*.partial"))


def test_a_contender_that_fails_is_in_the_table_with_its_reason(checkpoint, tmp_path, monkeypatch):
    measure = ModelContender.measure

    def failing(self, workload, *arguments):
        if self.name == "transformers":
            raise RuntimeError("asks for 35 GB")
        return measure(self, workload, *arguments)

    monkeypatch.setattr(ModelContender, "measure", failing)
    path = tmp_path / "bench.json"
    result = bench(checkpoint, "--what", "decode", "--contexts", 4, "--rounds", 2, "--dtype", "fp32", "--json", path)
    assert result.exit_code == 0, result.output
    assert "asks for 35 GB" in result.output
    entry = json.loads(path.read_text())["workloads"][0]
    assert entry["failed"] == {"transformers": "asks for 35 GB"} and list(entry["contenders"]) == ["plugin"]


def test_a_busy_machine_is_told_and_recorded(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "load_average", lambda: 50.0)
    path = tmp_path / "bench.json"
    result = bench(checkpoint, "--what", "decode", "--contexts", 4, "--rounds", 1, "--dtype", "fp32", "--json", path)
    assert "The load average is 50.00" in result.output
    results = json.loads(path.read_text())
    assert results["machine"]["load_average"] == 50.0 and "other programs" in results["warnings"][0]
    assert machine.busy_warning(0.3, 2) is None and machine.busy_warning(None, 2) is None


def test_slow_contenders_decode_fewer_tokens(make_model, checkpoint, monkeypatch):
    asked = []
    measure = ModelContender.measure

    def noted(self, workload, inputs, new_tokens):
        asked.append(new_tokens)
        return measure(self, workload, inputs, new_tokens)

    monkeypatch.setattr(ModelContender, "measure", noted)

    class Silent:
        def say(self, message): ...
        def plan(self, turns): ...
        def turn(self, workload, contender): ...

    common = {"source": checkpoint, "what": ("decode",), "contexts": (4,), "dtypes": ("fp32",), "rounds": 1}
    for seconds, tokens in ((1e-9, 2), (1e9, 5)):
        asked.clear()
        settings = BenchSettings(**common, new_tokens=5, turn_seconds=seconds)
        benchmark.Benchmark(settings, Silent()).run()
        assert asked == [2, 2, tokens, tokens]


def test_a_model_that_native_does_not_know_is_measured_alone(make_model, tmp_path):
    make_model(moe_layer_freq=2, num_hidden_layers=3).save_pretrained(tmp_path / "model")
    path = tmp_path / "bench.json"
    result = bench(
        *(tmp_path / "model", "--what", "decode", "--contexts", 4, "--rounds", 1, "--dtype", "fp32", "--json", path)
    )
    assert result.exit_code == 0, result.output
    assert "transformers was left out: DeepseekV3ForCausalLM has weights of its own" in result.output
    assert list(json.loads(path.read_text())["workloads"][0]["contenders"]) == ["plugin"]


def test_a_gpu_that_is_not_there_is_refused(checkpoint):
    output = refused(checkpoint, "--device", "cuda")
    assert "--device" in output and "has no GPU to use here" in output


def test_other_programs_are_not_measured_beside_a_gpu(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    output = refused(checkpoint, "--against", f"vllm={sys.executable}")
    assert "--against" in output and "--device cpu" in output


def test_static_caches_and_parts_of_a_layer(checkpoint, tmp_path):
    path = tmp_path / "bench.json"
    names = ["plugin", "plugin static", "transformers", "transformers static"]
    result = bench(
        *(checkpoint, "--what", "decode,batched,experts,attention", "--contexts", "5"),
        *("--batch", "2", "--batch-context", "3", "--contenders", ",".join(names), "--expert-tokens", "1,9"),
        *("--attention", "2x7", "--dtype", "fp32", "--rounds", "2", "--new-tokens", "3", "--json", path),
    )
    assert result.exit_code == 0, result.output
    results = json.loads(path.read_text())
    assert results["finished"] and set(results["contenders"]) == set(names)
    for entry in results["workloads"]:
        assert not entry["failed"] and list(entry["contenders"]) == names
        for name, figures in entry["contenders"].items():
            assert figures["units_a_turn"] == 3 and figures["floor"]["bytes_read"] > 0
            assert ("first_generate_seconds" in figures) == name.endswith("static")
    kinds = [(entry["what"], entry["tokens"], entry.get("with_gradients")) for entry in results["kernels"]]
    assert kinds == [
        *(("experts", 1, False), ("experts", 9, False), ("experts", 9, True)),
        ("attention", 7, None),
    ]
    for entry in results["kernels"][:3]:
        assert {"triton", "liger"} <= entry["failed"].keys()  # on a CPU they are interpreted at best
    for entry in results["kernels"]:
        assert {"eager", "grouped_mm", "auto"} <= set(entry["contenders"]) or "torch" in entry["contenders"]
        for figures in entry["contenders"].values():
            assert figures["operations_per_second"] == entry["operations"] / figures["median"]
            assert 0 < max(figures["errors"].values()) < 1e-5
    one, _, both, attention = results["kernels"]
    assert one["operations"] == 2 * 3 * (3 * 32 * 24) and one["bytes_read"] == 3 * (3 * 32 * 24) * 4
    assert both["operations"] == 3 * 9 * one["operations"]
    assert len(both["contenders"]["eager"]["errors"]) == 5
    assert attention["bytes_read"] == 2 * 7 * (16 + 8) * 4
    assert {"cpu", "triton", "torch"} == attention["contenders"].keys() | attention["failed"].keys()
    assert "triton" in attention["failed"]
    for text in ("experts, 9 tokens, forward + backward, fp32", "x torch", "the first generate of plugin static"):
        assert text in result.output


def test_only_kernels_need_no_model(checkpoint, tmp_path, monkeypatch):
    monkeypatch.delattr(benchmark.Benchmark, "_plugin_model")
    result = bench(checkpoint, "--what", "attention", "--attention", "1x4", "--rounds", 1)
    assert result.exit_code == 0 and "attention over latents, 1 x 4 cached" in result.output, result.output


def test_a_backend_that_fails_is_told_with_its_reason(checkpoint, tmp_path, monkeypatch):
    def fails(*arguments):
        raise KeyError("no tile")

    monkeypatch.setattr(kernel_workloads, "absorbed_backends", lambda: {"torch": (None, fails)})
    path = tmp_path / "bench.json"
    result = bench(checkpoint, "--what", "attention", "--attention", "1x4", "--rounds", 1, "--json", path)
    assert result.exit_code == 0 and "torch is left out: KeyError: 'no tile'" in result.output, result.output
    assert json.loads(path.read_text())["kernels"][0]["failed"] == {"torch": "KeyError: 'no tile'"}


def test_variants_that_do_not_exist_are_refused(checkpoint):
    with pytest.raises(OptionError, match="none of plain") as error:
        benchmark.Benchmark(BenchSettings(source=checkpoint, contexts=(4,), weights=("int3",)), None)
    assert error.value.option == "--weights"
    assert transformers_dsv3.is_registered()


def test_serving(checkpoint, tmp_path):
    """Clients' answers by the engine and by static batches, in the table, the file and the plot."""
    result = bench(
        *(checkpoint, "--what", "serving", "--clients", "1,3", "--static-batches", "2,3", "--lengths", "6,4"),
        *("--rounds", "2", "--dtype", "fp32", "--json", tmp_path / "s.json", "--plot", tmp_path / "s.png"),
    )
    assert result.exit_code == 0, result.output
    for text in ("3 clients, fp32", "static 2", "of best static"):
        assert text in result.output
    entries = json.loads((tmp_path / "s.json").read_text())["serving"]
    assert [(entry["clients"], sorted(entry["contenders"])) for entry in entries] == [
        (1, ["engine", "static 1"]),
        (3, ["engine", "static 2", "static 3"]),
    ]
    for entry in entries:
        engine, best = entry["contenders"]["engine"], entry["contenders"][entry["best_static"]]
        assert not entry["failed"] and len(engine["runs"]) == len(best["runs"]) == 2
        assert engine["runs"][0]["tokens"] == best["runs"][0]["tokens"]
        assert engine["first_token"]["p50"] <= engine["runs"][0]["seconds"]
        assert engine["tokens_per_second"] > 0 and best["latency_a_token"]["p99"] >= best["latency_a_token"]["p50"]
    assert (tmp_path / "s.png").stat().st_size > 1000
    assert "--lengths" in refused(checkpoint, "--what", "serving", "--lengths", "6")
