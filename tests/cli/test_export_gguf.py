"""`transformers-dsv3 export-gguf`."""

import gguf
from typer.testing import CliRunner

from transformers_dsv3.data.byte_bpe import train_byte_bpe
from transformers_dsv3_cli.main import app


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
