"""`transformers-dsv3 export-gguf`."""

import gguf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.conftest import WIDTHS_OVER_BYTES
from transformers_dsv3 import quantize
from transformers_dsv3.compression.gguf.export import export_gguf
from transformers_dsv3.data.byte_bpe import train_byte_bpe
from transformers_dsv3_cli.main import app


def test_folders_of_a_gguf_file_alone(make_model, tmp_path):
    """What opens one as it is, and what says that it does not."""
    folder, alone = tmp_path / "model", tmp_path / "alone"
    make_model(vocab_size=300, max_position_embeddings=512).save_pretrained(folder)
    train_byte_bpe(["a text of the tests"], 280, 256).save_pretrained(folder)
    alone.mkdir()
    file = alone / "model.gguf"
    (tmp_path / "text.txt").write_text("a text of the tests, " * 60)

    def run(*words):
        done = CliRunner().invoke(app, [str(word) for word in words])
        return done.exit_code, " ".join(done.output.replace("│", " ").split())

    export_gguf(folder, file, "f32", progress=False)
    for checkpoint in (alone, file):
        code, output = run("explain", checkpoint)
        assert code == 0 and "linear layers" in output, output
    code, output = run("routing", alone, "--beside", folder, "--text", tmp_path / "text.txt", "--window", 64)
    assert code == 0 and "8 experts, 3 a token" in output, output
    code, output = run("evaluate", alone, "--what", "text")
    assert code == 2 and "holds a GGUF file alone, model.gguf: this reads safetensors" in output, output
    (alone / "other.gguf").write_bytes(file.read_bytes()[:200])
    for verb in ("explain", "routing"):
        code, output = run(verb, alone)
        assert code == 2 and "holds several GGUF files (model.gguf, other.gguf): name one" in output, output
        code, output = run(verb, alone / "other.gguf")
        assert code == 2 and "other.gguf: truncated, the file of 200 bytes ends within its header" in output, output


def test_a_scale_that_is_missing_is_named(make_model, tmp_path):
    """By whatever opens the checkpoint, before any work."""
    quantize(make_model(**{**WIDTHS_OVER_BYTES, "vocab_size": 300}), 4).save_pretrained(tmp_path / "model")
    train_byte_bpe(["a text of the tests"], 280, 256).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    scale = "model.layers.1.mlp.experts.2.up_proj.weight_scale"
    del tensors[scale]
    save_file(tensors, file, metadata={"format": "pt"})
    for verb, *options in (["explain"], ["evaluate", "--what", "text"], ["export-gguf", "--output", tmp_path / "out"]):
        refused = CliRunner().invoke(app, [verb, str(tmp_path / "model"), *map(str, options)])
        text = " ".join(refused.output.replace("│", " ").split())
        assert refused.exit_code == 2 and f"is quantised and has no '{scale}'" in text, text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export(make_model, tmp_path):
    folder, output = tmp_path / "model", tmp_path / "model.gguf"
    make_model(vocab_size=300).save_pretrained(folder)
    train_byte_bpe(["a text of the tests"], 280, 256).save_pretrained(folder)

    def run(*options):
        return CliRunner().invoke(app, ["export-gguf", str(folder), "--output", str(output), *options])

    done = run("--type", "f32")
    assert done.exit_code == 0, done.output
    assert f"{output}: {output.stat().st_size:,} bytes" in done.stdout
    assert "blk.2.nextn.eh_proj.weight" in {tensor.name for tensor in gguf.GGUFReader(output).tensors}
    for options, said in ((("--type", "q9"), "--type"), (("--type", "q4_0"), "--type")):
        refused = run(*options)
        assert refused.exit_code == 2 and said in refused.output
    (folder / "model.safetensors").write_bytes(b"short")
    broken = run()
    assert broken.exit_code == 1 and "Error: " in broken.output and "model.safetensors" in broken.output
