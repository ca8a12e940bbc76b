"""What the tests of quantised files share."""

import pytest
import torch
from gguf_checkpoints import WIDTHS
from packed_files import WIDE
from transformers import AutoTokenizer

from transformers_dsv3.compression.gguf.export import export_gguf
from transformers_dsv3.data.byte_bpe import train_byte_bpe


@pytest.fixture(scope="session")
def bpe():
    tokenizer = train_byte_bpe(["the theatre there, a thing that this does"] * 3, 300, 256)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return tokenizer


@pytest.fixture(scope="session")
def save_for_gguf(make_model, bpe):
    """Function from a folder, a dtype and changed fields to the folder with a small model and its tokenizer."""

    def save(folder, dtype=torch.bfloat16, **fields):
        ids = {"bos_token_id": bpe.bos_token_id, "eos_token_id": bpe.eos_token_id}
        make_model(**{**WIDTHS, **ids, **fields}).to(dtype).save_pretrained(folder)
        bpe.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def checkpoint(save_for_gguf, tmp_path_factory):
    """Folder of a small bf16 checkpoint with one MTP layer and a tokenizer."""
    return save_for_gguf(tmp_path_factory.mktemp("gguf") / "bf16")


@pytest.fixture(scope="session")
def gguf_files(checkpoint, tmp_path_factory):
    """Function from a type to the checkpoint's GGUF file of it, each written once, in a folder without other files."""
    made, folder = {}, tmp_path_factory.mktemp("gguf_files")

    def file(type):
        if type not in made:
            made[type] = export_gguf(checkpoint, folder / f"{type}.gguf", type, progress=False)
        return made[type]

    return file


@pytest.fixture(scope="session")
def resave():
    """Function that saves a model with the tokenizer of a GGUF file: `resave(model, file, folder)`."""

    def save(model, file, folder):
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def make_wide(make_model):
    """Function from changed fields to a small model all of whose widths are multiples of 32."""
    return lambda **fields: make_model(**{**WIDE, **fields})
