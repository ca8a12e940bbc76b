"""What tests of the adapting examples share: a small checkpoint, and a script run as users run it."""

import random
import signal
import sys
from pathlib import Path

import pytest

from tests import programs
from transformers_dsv3.data.byte_bpe import train_byte_bpe


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def base(tmp_path_factory, make_model):
    """A folder with a small checkpoint and its tokenizer, `model`, and with general text, `general.txt`."""
    folder = tmp_path_factory.mktemp("base")
    words, rng = ["ash", "birch", "cedar", "elm", "fir"], random.Random(0)
    text = "\n".join(" ".join(rng.choice(words) for _ in range(20)) for _ in range(400))
    (folder / "general.txt").write_text(text)
    tokenizer = train_byte_bpe([text, (EXAMPLES / "esft.py").read_text()], 320, 256)
    tokenizer.save_pretrained(folder / "model")
    model = make_model(vocab_size=len(tokenizer), num_hidden_layers=3, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder / "model")
    return folder


class Example:
    """An example script with the options that make it small, from a `base` into an output folder."""

    def __init__(self, name: str, options: str):
        self.script, self.options = EXAMPLES / name, options.split()

    def command(self, base, output, *options):
        given = ["--model", base / "model", "--general", base / "general.txt", "--output_dir", output, *options]
        return [sys.executable, str(self.script), *self.options, *map(str, given)]

    def run(self, base, output, *options):
        """What the script prints to its end."""
        result = programs.run(self.command(base, output, *options)[1:])
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    def kill_at(self, base, output, place):
        """Ends the script by SIGKILL as soon as something of this name is in its folder."""
        killed = programs.run(self.command(base, output)[1:], signal_when=(output / place, signal.SIGKILL))
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]


@pytest.fixture(scope="session")
def make_example():
    """Function from a script's name and options to an `Example`."""
    return Example
