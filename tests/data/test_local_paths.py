import pytest

from transformers_dsv3.data.local_paths import local_or_hub, looks_like_path


@pytest.mark.parametrize(
    "name",
    ["./x", "../x", "/x", "~/x", ".", "a/b/c", "x.jsonl", "data/x.parquet", "config.json", ".\\x"],
)
def test_paths(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert looks_like_path(name)
    if name != ".":
        with pytest.raises(ValueError, match="no such file or folder"):
            local_or_hub(name)


@pytest.mark.parametrize("name", ["gpt2", "deepseek-ai/DeepSeek-V3", "org/model-v1.5", "https://host/x.jsonl"])
def test_other_names_stay_as_they_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not looks_like_path(name)
    assert local_or_hub(name, one_of=["config.json"]) == name


def test_existing_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("model", "./model", "~/model"):
        with pytest.raises(ValueError, match=f"^no config.json or params.json in {name}$"):
            local_or_hub(name, one_of=["config.json", "params.json"])
    (tmp_path / "model" / "config.json").touch()
    assert local_or_hub("model", one_of=["config.json"]) == "model"
    assert local_or_hub("~/model", one_of=["*.json"]) == str(tmp_path / "model")
    assert local_or_hub("./model/config.json", one_of=["config.json"]) == "./model/config.json"
