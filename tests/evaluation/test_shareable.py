"""Nothing of a user's folders or secrets gets into what is published."""

import pytest

from transformers_dsv3.evaluation.shareable import shareable, shareable_command, shareable_text


TOKEN = "hf_" + "aB3dE6gH9j" * 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ada/models/dsv3", "dsv3"),
        ("text of /home/ada/my-notes/a.txt, and ~/b/c.txt", "text of a.txt, and c.txt"),
        ("'/srv/data/x.jsonl'", "'x.jsonl'"),
        ("(/srv/x/)", "()"),
        (r"C:\Users\ada\models\dsv3", "dsv3"),
        ("file:///home/ada/x", "x"),
        ("https://huggingface.co/datasets/a/b", "https://huggingface.co/datasets/a/b"),
        ("./dsv3-quickstart and and/or ../x/y", "./dsv3-quickstart and and/or ../x/y"),
        ("tokens/s 3 / 4 router/utilisation", "tokens/s 3 / 4 router/utilisation"),
        (f"key {TOKEN}.", "key hf_***."),
        ("hf_transfer is a package", "hf_transfer is a package"),
    ],
)
def test_text(text, expected):
    assert shareable_text(text) == expected


def test_values():
    value = {"a": ["/x/y/z", 1, None, {"b": TOKEN}], "c": (True, 1.5)}
    assert shareable(value) == {"a": ["z", 1, None, {"b": "hf_***"}], "c": [True, 1.5]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/usr/bin/transformers-dsv3", "quickstart", "--seed", "3"], "transformers-dsv3 quickstart --seed 3"),
        (["/a/transformers_dsv3/cli.py", "card", "./x"], "transformers-dsv3 card ./x"),
        (["examples/dpo.py", "--model", "/home/ada/x"], "python examples/dpo.py --model x"),
        (
            ["/src/repo/examples/dpo.py", "--output_dir=/home/ada/my models"],
            "python examples/dpo.py '--output_dir=my models'",
        ),
        (["t.py", "--text", "/home/ada/my notes/new", "~/more"], None),
        (
            ["transformers-dsv3", "x", "--hub_token", "secret", "--n", "1"],
            "transformers-dsv3 x --hub_token '***' --n 1",
        ),
        (["transformers-dsv3", "x", "--api-key=secret"], "transformers-dsv3 x '--api-key=***'"),
        (["transformers-dsv3", "x", TOKEN, f"a={TOKEN}"], "transformers-dsv3 x 'hf_***' 'a=hf_***'"),
    ],
)
def test_commands(arguments, expected):
    command = shareable_command(arguments)
    assert "ada" not in command and "secret" not in command and TOKEN not in command
    if expected is not None:
        assert command == expected
