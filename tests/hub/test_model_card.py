"""Model cards: every figure is the record's or the weights' own, unknown things are said to be, wrong ones refused."""

import json
import math
import re
import shutil

import card_rules
import pytest
import torch
from card_material import SECRET, evaluation, save_adapter, tasks_and_human_eval, train
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from transformers_dsv3 import Dsv3ForSequenceClassification, model_card, push_to_hub, quantize
from transformers_dsv3.evaluation.checkpoint_identity import CheckpointIdentity, checkpoint_digest
from transformers_dsv3.evaluation.checkpoint_record import describe_checkpoint, read_checkpoint_record
from transformers_dsv3.evaluation.decoding import cache_bytes_per_token
from transformers_dsv3.evaluation.evaluation_record import RecordError
from transformers_dsv3.evaluation.training_record import read_training_record, result
from transformers_dsv3.hub import card_figures, card_metadata
from transformers_dsv3.hub.card_figures import drawn_from
from transformers_dsv3.hub.model_card import CardError, unsealed, write_card
from transformers_dsv3.models.dsv3.checkpoint_files_dsv3 import CheckpointError


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(vocab_size=258, num_nextn_predict_layers=2)


@pytest.fixture(scope="module")
def material(model, byte_tokenizer, tmp_path_factory):
    """A folder with `model` (trained, it says), `results` about it, and `adapter`, an adapter of it."""
    root = tmp_path_factory.mktemp("cards")
    model.save_pretrained(root / "model")
    byte_tokenizer.save_pretrained(root / "model")
    train(root / "model", extra={"completions": [{"prompt": "def f(", "text": "x):\n```|<b>`"}]})
    (root / "results").mkdir()
    evaluation(root / "model", model).write(root / "results" / "evaluation.json")
    others = tasks_and_human_eval() | {"date": "2026-02-01T12:00:00+00:00"}
    evaluation(root / "model", None, "transformers-dsv3 evaluate model --tasks gsm8k,mmlu", **others).write(
        root / "results" / "tasks.json"
    )
    save_adapter(root / "model", AutoModelForCausalLM.from_pretrained(root / "model"), root / "adapter")
    train(root / "adapter", "LoRA", base=root / "model", parameters={"trained": 500, "total": 50_000})
    return root


@pytest.fixture(autouse=True)
def drawing(request, monkeypatch):
    """Pictures take most of a card's time: they are drawn for tests that ask for `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(card_figures, "plot_refusal", lambda: "left out in this test")


@pytest.fixture
def pictures():
    pytest.importorskip("matplotlib")


@pytest.fixture
def here(material, tmp_path, monkeypatch):
    """The same, to be changed."""
    shutil.copytree(material, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "model")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def card(material):
    return model_card(material / "model", [material / "results"], license="apache-2.0", language=["en"])


def section(card, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card.text, flags=re.DOTALL | re.MULTILINE)[1]


def rows(text):
    """Cells of every table, by the first of a row."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_sizes_are_the_models_own(card, model, material):
    table = rows(section(card, "Model"))
    config = model.config
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    mtp = sum(size for name, size in sizes.items() if ".mtp." in name)
    main = sum(sizes.values()) - mtp
    assert mtp == sum(p.numel() for layer in model.model.mtp_layers for p in layer.parameters())
    routed = model.model.layers[1].mlp.experts
    idle = sum(p.numel() for p in routed.parameters()) * (config.n_routed_experts - config.num_experts_per_tok)
    assert table["parameters"] == [f"{main:,}, and {mtp:,} in its MTP layers"]
    assert table["active a token"] == [f"{main - idle // config.n_routed_experts:,}: 3 of 8 routed experts"]
    assert table["layers"] == ["2: 1 dense, 1 mixture of experts; 2 MTP layers behind them"]
    assert table["architecture"] == ["`DeepseekV3ForCausalLM`"]
    cache = cache_bytes_per_token(model, torch.arange(32)[None])
    assert table["cache"][0].startswith(f"{cache:.0f} bytes a token (2 layers × (16 + 8) × 4 bytes)")
    assert table["sha256 over tensors and configuration"] == [f"`{checkpoint_digest(material / 'model')}`"]
    size = (material / "model" / "model.safetensors").stat().st_size
    assert f"{size / 1e6:.3g} MB in 1 file" in table["stored as"][0] or f"{size / 1e3:.3g} kB" in table["stored as"][0]
    assert table["tokenizer"] == ["`TokenizersBackend` of 258 entries, without a chat template"]


def test_shards_and_types_are_counted_alike(model, tmp_path):
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    one, many = (describe_checkpoint(tmp_path / name) for name in ("one", "many"))
    assert many.files > 1 == one.files
    assert (one.parameters, one.stored_as) == (many.parameters, many.stored_as)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    described = describe_checkpoint(tmp_path / "half")
    # The correction bias stays in fp32
    assert described.stored_as == {"BF16": one.stored_as["F32"] - 3 * 8, "F32": 3 * 8}
    assert described.parameters == one.parameters
    text = model_card(tmp_path / "half").text
    assert "| cache | 96 bytes a token (2 layers × (16 + 8) × 2 bytes) |" in text


def test_packed_weights_are_not_counted(here, model):
    config = json.loads((here / "model" / "config.json").read_text())
    for quantization, counted in (({"quant_method": "awq"}, False), ({"weight_block_size": [128, 128]}, True)):
        (here / "model" / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        assert (describe_checkpoint(here / "model").parameters is not None) == counted


def test_the_metadata_pass_the_hubs_rules(hub, card, material):
    card.validate()
    data = ModelCard(str(card)).data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", ["en"], "transformers")
    assert data.pipeline_tag == "text-generation" and data.model_name == "model" and data.base_model is None
    assert {"deepseek_v3", "mixture-of-experts", "multi-token-prediction", "pre-training"} <= set(data.tags)
    found = {(entry.dataset_type, entry.metric_type): entry.metric_value for entry in data.eval_results}
    assert found == {
        ("held-out-text", "bits_per_byte"): 1.8683,
        ("the-notes-of-Ada", "bits_per_byte"): 1.86834,
        ("the-notes-of-Ada", "perplexity"): 90.017,
        ("openai/gsm8k", "exact_match"): 0.25,
        ("cais/mmlu", "acc"): 0.3,
        ("openai/openai_humaneval", "pass@1"): 0.0122,
    }
    adapter = model_card(material / "adapter", base_model="ada/model", name="ada/adapter", license="mit")
    adapter.validate()
    assert (adapter.data.base_model, adapter.data.library_name) == ("ada/model", "peft")


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("license: mine", '"license" must be one of'),
        ("license: other", '"license_name" is required'),
        ("base_model: ./folder", '"base_model" with value'),
        ("datasets: [null]", "must be an array of strings"),
        ("language: english", '"language" with value'),
        ("model-index: [{name: a, results: [{task: {}, dataset: {type: a, name: b}, metrics: [{}]}]}]", "task.type"),
        ("a: [", "bad YAML"),
    ],
)
def test_the_rules_refuse_something(hub, header, says):
    assert any(says in error for error in card_rules.metadata_errors(f"---\n{header}\n---\n"))
    if "[" not in header:
        with pytest.raises(ValueError, match=re.escape(says.replace('"', '\\"'))):
            ModelCard(f"---\n{header}\n---\n").validate()


def test_every_figure_is_a_records(card, material):
    training = read_training_record(material / "model" / "training_record.json")
    text = section(card, "Training")
    table = rows(text)
    assert table["data"] == ["the notes of Ada"] and table["time"][0].startswith("2 min 41 s of training steps")
    assert table["tokens"] == [f"{training['tokens']:,}"] == [f"{20 * 2 * 64:,}"]
    assert table["`learning_rate`"] == [f"`{training['arguments']['learning_rate']}`"]
    assert table["bits per byte"] == ["held-out text", "", "1.868", "zlib -9 2.136"]
    assert "```bash\ntransformers-dsv3 quickstart --text notes\n```" in text
    assert "````\ndef f(x):\n```|<b>`\n````" in text
    table = rows(section(card, "Evaluation"))
    assert table["bits per byte"][0] == "1.8683" and "zlib 2.136, lzma 1.888" in table["bits per byte"][1]
    assert table["mmlu: acc"] == ["0.3000 ± 0.0134", "4 documents, 5 examples"] and "mmlu_law: acc" not in table
    assert table["own: acc"][0] == "none"
    assert table["HumanEval: pass@1"] == ["0.0122 ± 0.0086", "2 passed, 162 raised AssertionError"]
    for command in ("evaluate model", "evaluate model --tasks gsm8k,mmlu"):
        assert f"```bash\ntransformers-dsv3 {command}\n```" in card.text
    assert table["limit"] == ["the first 4 documents of each task, for a try"]
    mean = json.loads((material / "results" / "evaluation.json").read_text())["routing"]["mean"]
    assert table["utilisation of experts"][0] == f"{mean['utilisation']:.1%}"


@pytest.mark.parametrize(("load", "busy"), [(2.4, False), (2.6, True), (None, False)])
def test_times_of_a_busy_machine_are_told(here, model, load, busy):
    path = here / "model" / "training_record.json"
    record = json.loads(path.read_text())
    record["hardware"] |= {"cores": 2, "load_average": load}
    path.write_text(json.dumps(record))
    speed = {"threads": 2, "prefill_tokens_per_second": 100.0, "greedy_tokens_per_second": 10.5}
    measured = evaluation(here / "model", None, speed={**speed, "cache_bytes_per_token": 192.0})
    measured.hardware |= {"cores": 2, "load_average": None if load is None else load - 2}
    measured.write(here / "speed.json")
    card = model_card(here / "model", "speed.json")
    assert rows(section(card, "Training"))["time"] == [
        f"2 min 41 s of training steps{', beside other programs' if busy else ''}"
    ]
    told = rows(section(card, "Evaluation"))["greedy decode tokens/s"]
    assert told[0] == "10.5" and ("other programs were running, load average 0.60 on 2 cores" in told[1]) == busy


def test_before_and_after_and_the_way_from_the_first_command(here):
    record = train(
        here / "adapter",
        "LoRA",
        base=here / "model",
        results=[result("loss", "held-out notes", 4.1234567, 5.5), result("accuracy", "pairs", 0.913, 0.45)],
        parameters={"trained": 500, "total": 50_000},
    )
    text = section(model_card(here / "adapter"), "Training")
    assert "| loss, nats a token | held-out notes | 5.500 | 4.123 |  |" in text
    assert "| accuracy | pairs | 45.0% | 91.3% |  |" in text
    assert rows(text)["trained"] == ["500 of 50,000 parameters (1.0%)"]
    assert rows(text)["from"] == [f"`model`, sha256 `{checkpoint_digest(here / 'model')}`"]
    assert (
        len(record["commands"]) == 2
        and f"```bash\n{record['commands'][0]} && \\\n  {record['commands'][1]}\n```" in text
    )


def test_what_is_unknown_is_said_to_be(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    card = model_card(tmp_path / "model")
    for says in (
        "There is no record of its training: what it was trained on is not known.",
        "Not known: the folder has no `training_record.json`.",
        "Not measured: there is no record of `transformers-dsv3 evaluate`.",
        "| tokenizer | none in the folder |",
        "## Licence\n\nNot stated.",
        "Bias, safety, and whether what it says is true: not measured.",
        "How much it was trained on is not known.",
    ):
        assert says in card.text
    assert card.data.license is None and card.data.eval_results is None and card.figures == {}
    assert "the licence is not stated" in card.remarks[0] and len(card.remarks) == 3
    assert "Its speed was not measured." in card.text and "No task was evaluated" in card.text


def test_the_same_records_give_the_same_bytes(here, pictures):
    card, path = write_card(here / "model", [here / "results"], license="apache-2.0", name="ada/notes")
    assert path == here / "model" / "README.md" and path.read_text() == str(card) == str(ModelCard(str(card)))
    assert {p.name for p in (here / "model").glob("*.json")} >= {"evaluation.json", "tasks.json"}
    first = snapshot(here / "model")
    write_card(here / "model")  # with what was said the first time, and the records that are there now
    assert snapshot(here / "model") == first

    # Elsewhere, and from there without the weights
    other = write_card(here / "model", output=here / "card")[1]
    assert other.read_text() == str(card)
    assert not list((here / "card").glob("*.safetensors"))
    shutil.rmtree(here / "model")
    copy = snapshot(here / "card")
    write_card(here / "card")
    assert snapshot(here / "card") == copy
    other.unlink()
    assert str(model_card(here / "card", **unsealed(str(card)))) == str(card)
    assert read_checkpoint_record(here / "card" / "checkpoint_record.json").parameters.mtp > 0


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_options_are_kept_until_others_are_given(here):
    options = {"license": "other", "license_name": "my-own-1.0", "license_link": "LICENSE", "language": ["en"]}
    path = write_card(here / "model", **options)[1]
    assert unsealed(path.read_text()) == options and "[my-own-1.0](LICENSE)." in path.read_text()
    card, _ = write_card(here / "model", license="mit")
    assert unsealed(path.read_text()) == {"license": "mit", "language": ["en"]}
    assert card.data.license_name is None


def test_pictures(here, pictures, monkeypatch):
    card, _ = write_card(here / "model", [here / "results"])
    assert set(card.figures) == {"routing.png", "training.png"}
    for name, data in card.figures.items():
        assert f"(figures/{name})" in card.text
        assert drawn_from(data).startswith("sha256:") and (here / "model" / "figures" / name).read_bytes() == data
    assert model_card(here / "model").figures == card.figures  # byte for byte
    import matplotlib

    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red"}):
        assert model_card(here / "model").figures == card.figures

    # Without matplotlib those are kept that were drawn from the same data
    monkeypatch.setattr(card_figures, "plot_refusal", lambda: "needs matplotlib")
    assert model_card(here / "model").figures == card.figures
    record = json.loads((here / "model" / "training_record.json").read_text())
    record["history"]["loss"]["values"][0] += 1
    (here / "model" / "training_record.json").write_text(json.dumps(record))
    (here / "model" / "figures" / "mine.png").write_bytes(b"\x89PNG\r\n\x1a\n of my own")
    changed, _ = write_card(here / "model")
    assert set(changed.figures) == {"routing.png"} and "training.png" not in changed.text
    assert any("figures/training.png: not drawn without matplotlib" in remark for remark in changed.remarks)
    assert {path.name for path in (here / "model" / "figures").iterdir()} == {"routing.png", "mine.png"}


def test_the_pictures_data_are_the_records(here):
    training = json.loads((here / "model" / "training_record.json").read_text())
    drawn = {figure.name: figure for figure in card_figures.card_figures(sources(here / "model", [here / "results"]))}
    assert drawn["training.png"].data == {"curves": training["history"]}
    routing = json.loads((here / "results" / "evaluation.json").read_text())["routing"]
    loads = [layer["tokens_per_expert"] for layer in drawn["routing.png"].data["report"]["layers"]]
    assert [list(load) for load in loads] == [layer["tokens_per_expert"] for layer in routing["layers"]]


def sources(*arguments):
    from transformers_dsv3.hub.card_sources import read_sources

    return read_sources(*arguments)


# Bad input


def test_records_of_another_model_are_refused(here, make_model, monkeypatch):
    other = make_model(vocab_size=258, num_nextn_predict_layers=2, seed=1)
    other.save_pretrained(here / "other")
    evaluation(here / "other", None).write(here / "other.json")
    theirs, mine = checkpoint_digest(here / "other"), checkpoint_digest(here / "model")
    with pytest.raises(RecordError, match="is of another model") as caught:
        write_card(here / "model", ["other.json"])
    for part in ("other.json", theirs, mine, "of other", str(here / "model")):
        assert part in str(caught.value)
    assert not (here / "model" / "README.md").exists()

    # A training record that an earlier model has left behind
    other.save_pretrained(here / "model")
    with pytest.raises(RecordError, match="training_record.json is of another model"):
        model_card(here / "model")

    # Another configuration shows before any weight is read
    make_model(vocab_size=258, num_nextn_predict_layers=1).save_pretrained(here / "shallow")
    evaluation(here / "shallow", None).write(here / "shallow.json")
    monkeypatch.setattr("transformers_dsv3.hub.card_sources.describe_checkpoint", None)
    with pytest.raises(
        RecordError, match="shallow.json is of another model: of shallow, whose configuration has the sha256"
    ):
        model_card(here / "model", ["shallow.json"])


def test_an_adapter_evaluated_on_another_base_is_refused(here, model):
    identity = CheckpointIdentity("model", checkpoint_digest(here / "model"), "b" * 64)
    evaluation(here / "adapter", None, base=identity).write(here / "right.json")
    text = model_card(here / "adapter", ["right.json"]).text
    assert f"| base model | `model`, sha256 `{identity.sha256}` |" in text
    wrong = CheckpointIdentity("else", "c" * 64, "b" * 64)
    evaluation(here / "adapter", None, base=wrong).write(here / "wrong.json")
    with pytest.raises(RecordError, match="wrong.json is of adapter on else .* trained on another base model"):
        model_card(here / "adapter", ["wrong.json"])


def test_folders_that_are_no_checkpoint(here):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        write_card("nowhere")
    (here / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty is no checkpoint: it has neither config.json nor"):
        write_card(here / "empty")
    shutil.copy(here / "model" / "config.json", here / "empty")
    with pytest.raises(CheckpointError, match="empty has neither safetensors weights nor checkpoint_record.json"):
        write_card(here / "empty")
    (here / "empty" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type is 'llama', and cards are of 'deepseek_v3'"):
        write_card(here / "empty")
    (here / "empty" / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match="empty/config.json is not a configuration in JSON"):
        write_card(here / "empty")
    weights = here / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors: truncated"):
        write_card(here / "model")


def test_broken_records(here):
    path = here / "results" / "evaluation.json"
    values = json.loads(path.read_text())
    for change, says in (
        (
            {"complete": False},
            "evaluation.json is not complete: run the same command again, transformers-dsv3 evaluate",
        ),
        ({"text": {}}, "evaluation.json: field 'text.source' is missing"),
        ({"record": "notes"}, "is no record of `transformers-dsv3 evaluate`"),
    ):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(RecordError, match=re.escape(says)):
            model_card(here / "model", [path])
    path.write_text('{"record":')
    with pytest.raises(RecordError, match="evaluation.json is not JSON"):
        model_card(here / "model", [path])
    with pytest.raises(RecordError, match="gone.json: no such file or folder"):
        model_card(here / "model", ["gone.json"])
    with pytest.raises(RecordError, match="adapter holds no record of `transformers-dsv3 evaluate`"):
        model_card(here / "model", [here / "adapter"])
    for name in ("checkpoint_record.json", "config.json"):
        write_card(here / "model", output=here / name)
        record = json.loads((here / name / name).read_text())
        record.update({"files": "one"} if name.startswith("checkpoint") else {"rope_theta": 3.0})
        (here / name / name).write_text(json.dumps(record))
        with pytest.raises(RecordError, match="field 'files' is 'one', not int|is of another model"):
            model_card(here / name)


def test_of_an_evaluation_made_twice_the_last_counts(here, model):
    old = evaluation(here / "model", model, date="2025-01-01T00:00:00+00:00")
    old.text["bits_per_byte"] = 9.0
    old.write(here / "model" / "evaluation.json")
    card, _ = write_card(here / "model", [here / "results"])
    assert "9.0000" not in card.text and "1.8683" in card.text
    assert json.loads((here / "model" / "evaluation.json").read_text())["text"]["bits_per_byte"] == 1.86834


def test_two_records_of_one_name(here, model):
    (here / "more").mkdir()
    evaluation(here / "model", model, settings={"window": 128}, date="2026-03-01T00:00:00+00:00").write(
        here / "more" / "evaluation.json"
    )
    card, _ = write_card(here / "model", [here / "results", "more"])
    assert "[evaluation.json](evaluation.json)" in card.text and "[evaluation-2.json](evaluation-2.json)" in card.text
    assert (here / "model" / "evaluation-2.json").read_bytes() == (here / "more" / "evaluation.json").read_bytes()


def test_cards_of_somebody_are_not_written_over(here):
    readme = here / "model" / "README.md"
    readme.write_text("# My model\n")
    with pytest.raises(CardError, match="README.md was not written by this command: --force"):
        write_card(here / "model")
    assert readme.read_text() == "# My model\n"
    write_card(here / "model", force=True, license="mit")
    write_card(here / "model")
    readme.write_text(readme.read_text().replace("Limits", "Bounds"))
    with pytest.raises(CardError, match="README.md was changed by hand since"):
        write_card(here / "model")
    write_card(here / "model", force=True)
    assert "Bounds" not in readme.read_text() and "license: mit" in readme.read_text()
    # What PEFT writes by itself says nothing
    save_adapter(here / "model", AutoModelForCausalLM.from_pretrained(here / "model"), here / "new")
    template = "".join(f"- **Field {n}:** [More Information Needed]\n" for n in range(30))
    (here / "new" / "README.md").write_text(template)
    write_card(here / "new")


def test_places_where_a_card_does_not_belong(here, monkeypatch):
    monkeypatch.setattr("transformers_dsv3.hub.model_card.read_sources", None)  # before anything is read
    (here / "file").write_text("")
    with pytest.raises(CardError, match="file is a file, not a folder"):
        write_card(here / "model", output=here / "file")
    with pytest.raises(CardError, match="adapter holds weights"):
        write_card(here / "model", output=here / "adapter")
    (here / "mine").mkdir()
    (here / "mine" / "config.json").write_text("{}")
    with pytest.raises(CardError, match=r"mine holds something else \(config.json\)"):
        write_card(here / "model", output=here / "mine")

    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(CardError, match="nothing can be written in .*model: Permission denied"):
        write_card(here / "model")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"license_name": "mine"}, "license_name and license_link go with license 'other'"),
        ({"license": "other", "license_name": "mine"}, "'other' needs license_name and license_link"),
        ({"license": "other", "license_name": "My own", "license_link": "LICENSE"}, "'My own' is not of lower-case"),
        ({"language": ["English"]}, "language 'English' is no code"),
        ({"base_model": "./model"}, "base_model './model' is no name on the Hub"),
    ],
)
def test_options_that_the_hub_would_refuse(material, options, says, monkeypatch):
    monkeypatch.setattr("transformers_dsv3.hub.model_card.read_sources", None)
    with pytest.raises(CardError, match=re.escape(says)):
        model_card(material / "model", **options)


def test_licences(material):
    assert card_metadata.LICENSES == card_rules.LICENSES
    with pytest.raises(CardError, match="'apache2' is none of the Hub's identifiers, perhaps 'apache-2.0'"):
        model_card(material / "model", license="apache2")


def test_secrets_and_folders_stay_here(here):
    """Records are written without them; these were changed afterwards."""
    for path in (here / "model" / "training_record.json", here / "results" / "evaluation.json"):
        text = path.read_text().replace("the notes of Ada", f"/home/ada/{SECRET}/notes")
        path.write_text(re.sub(r'"(?=transformers-dsv3 (quickstart|evaluate))', f'"HF_TOKEN={SECRET} ', text))
    config = json.loads((here / "model" / "config.json").read_text())
    (here / "model" / "config.json").write_text(json.dumps({**config, "_name_or_path": f"/home/ada/{SECRET}"}))
    card, path = write_card(here / "model", [here / "results"], output=here / "card")
    assert "hf_***" in card.text
    for file in (here / "card").rglob("*.*"):
        assert SECRET.encode() not in file.read_bytes() and b"/home/ada" not in file.read_bytes(), file


def test_text_of_records_is_no_markup(here):
    path = here / "model" / "training_record.json"
    record = json.loads(path.read_text())
    record["data"]["source"] = "a | b <script> [x](y) `c`\n## Evil"
    record["method"] = "<!-- pre"
    record["commands"] = ["echo '\n```\n# out'"]
    record["settings"] = {"p|q": "`|`"}
    path.write_text(json.dumps(record))
    card = model_card(here / "model")
    assert r"a \| b &lt;script&gt; \[x\](y) \`c\` ## Evil" in card.text and "<script>" not in card.text
    assert "\n## Evil" not in card.text and "&lt;!-- pre" in card.text
    assert "````bash\necho '\n```\n# out'\n````" in card.text
    for line in card.text.splitlines():
        if line.startswith("| ") and "p" in line and "q" in line:
            assert len(re.split(r"(?<!\\)\|", line)) in (4, 5, 7)
    assert unsealed(str(card)) == {}


# How it is loaded


@pytest.mark.parametrize(
    ("fields", "says", "not_says"),
    [
        ({"kv_lora_rank": 16}, "**vLLM**: not this model.", "vllm serve"),
        ({"kv_lora_rank": 312}, "`vllm serve ./model --model-impl transformers`", "not this model"),
        ({"q_lora_rank": None}, "Without a query LoRA it takes 26, 27 or 48 layers; there are 2.", "export-gguf"),
        # Widths of which groups of 32 are no part
        ({"q_lora_rank": 12}, "export-gguf ./model --output model-bf16.gguf --type bf16", "Without a query LoRA"),
        ({"moe_layer_freq": 2, "num_hidden_layers": 3}, "does not know `moe_layer_freq=2`", "the same files"),
        ({"num_nextn_predict_layers": 0}, "`deepseek_v3` class.\n", "use_mtp"),
        ({"num_nextn_predict_layers": 1}, "It leaves the MTP layers out, lists their tensors", "moe_layer_freq"),
        ({"first_k_dense_replace": 2}, "| layers | 2: 2 dense, 0 mixtures of experts", "routed experts"),
    ],
)
def test_who_opens_it(make_model, tmp_path, fields, says, not_says):
    make_model(**fields).save_pretrained(tmp_path / "model")
    text = model_card(tmp_path / "model").text
    assert says in text and not_says not in text


def test_what_plain_transformers_needs_for_packed_weights(make_model, tmp_path):
    model = make_model(hidden_size=64, intermediate_size=96, moe_intermediate_size=32, q_lora_rank=32)
    needs = "opens the same files, with the `compressed-tensors` package installed, without the import"
    model.save_pretrained(tmp_path / "plain")
    quantize(model, 4).save_pretrained(tmp_path / "packed")
    assert needs in model_card(tmp_path / "packed").text and needs not in model_card(tmp_path / "plain").text


def test_classifiers(make_model, tmp_path):
    make_model(Dsv3ForSequenceClassification, num_labels=3, num_nextn_predict_layers=0).save_pretrained(
        tmp_path / "model"
    )
    card = model_card(tmp_path / "model")
    assert card.data.pipeline_tag == "text-classification"
    assert 'AutoModelForSequenceClassification.from_pretrained("./model")' in card.text
    assert "vLLM" not in card.text and "llama.cpp" not in card.text.replace("llama.cpp and", "")


def python_blocks(card):
    return re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)


def test_the_code_runs(here, capsys):
    card = model_card(here / "model")
    (block,) = python_blocks(card)
    exec(block, {})  # in the folder that has `model`
    assert "The" in capsys.readouterr().out


def test_adapters(here, model, byte_tokenizer):
    card = model_card(here / "adapter")
    assert "A LoRA adapter of " in card.text and "for `model`, a DeepSeek-V3 model, trained by LoRA on" in card.text
    loading, merging = python_blocks(card)
    names = {}
    exec(loading + merging, names)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        adapted = names["model"](ids).logits
        merged = AutoModelForCausalLM.from_pretrained("./merged")(ids).logits
        assert not torch.allclose(adapted, model(ids).logits, atol=1e-3)
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    table = rows(section(card, "Model"))
    stored = sum(p.numel() for p in names["model"].parameters())  # LoRA's own factors
    assert table["rank"] == ["`2`"] and stored > 0
    assert table["adapted modules"] == ["`o_proj`"]  # by the name that was given
    assert "PEFT puts it on Transformers' own `deepseek_v3` class too" in card.text
    assert math.prod(model.lm_head.weight.shape) < int(table["active a token"][0].split(":")[0].replace(",", ""))

    # The base model's architecture goes with the card
    write_card(here / "adapter", output=here / "card")
    shutil.rmtree(here / "model")
    assert str(model_card(here / "card")) == str(card)
    # Not at hand, it is not known
    card = model_card(here / "adapter")
    assert "Its base model's architecture is not known here." in card.text and card.data.base_model is None


def test_adapters_that_need_the_package(here):
    model = AutoModelForCausalLM.from_pretrained(here / "model")
    save_adapter(here / "model", model, here / "mlp", target_modules=["o_proj", "shared_experts.gate_proj"])
    assert "**Without the package** it does not open" in model_card(here / "mlp").text


# On the Hub


def test_a_folders_card_is_pushed_with_it(hub, here, pictures):
    card, _ = write_card(here / "model", [here / "results"], license="mit", name="anna/model")
    push_to_hub(here / "model", "anna/model")
    there = hub.files("anna/model")
    assert there["README.md"].decode() == str(card)
    assert there["figures/routing.png"] == card.figures["routing.png"]
    assert {"evaluation.json", "tasks.json", "training_record.json", "checkpoint_record.json"} <= set(there)


def test_a_card_beside_a_model_object(hub, here, pictures, model, byte_tokenizer):
    card = model_card(here / "model", [here / "results"], license="mit")
    push_to_hub(model, "anna/model", tokenizer=byte_tokenizer, card=card)
    there = hub.files("anna/model")
    assert there["README.md"].decode() == str(card) and there["figures/training.png"] == card.figures["training.png"]
    assert json.loads(there["config.json"])["model_type"] == "deepseek_v3"
