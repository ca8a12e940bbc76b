"""A Hub on loopback, and checkpoints to push to it."""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants


def _load_server():
    """The module beside this file, which pytest's import mode does not put on the path."""
    path = Path(__file__).with_name("hub_server.py")
    spec = importlib.util.spec_from_file_location("hub_server", path)
    module = sys.modules.setdefault("hub_server", importlib.util.module_from_spec(spec))
    if not hasattr(module, "HubServer"):
        spec.loader.exec_module(module)
    return module


hub_server = _load_server()
TOKEN = "hf_" + "WriteTokenOfAnna" * 2 + "xy"
READ_TOKEN = "hf_" + "ReadTokenOfAnnaa" * 2 + "xy"
STRANGER = "hf_" + "TokenOfSomebodyE" * 2 + "xy"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running Hub that this process's Hugging Face libraries talk to, logged in as `anna`, with an empty cache.

    `hub.users` knows `anna`, who may write for the organisation `lab` too, and a stranger.
    """
    with hub_server.HubServer(part_bytes=300_000) as server:
        server.users |= {
            TOKEN: hub_server.User("anna", orgs=("lab",)),
            READ_TOKEN: hub_server.User("anna", role="read", orgs=("lab",)),
            STRANGER: hub_server.User("eve"),
        }
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        # These were made when they were imported, or first needed
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        server.tokens = {"anna": TOKEN, "read": READ_TOKEN, "eve": STRANGER}
        # What a shell needs for a process of its own
        server.environment = {
            "HF_ENDPOINT": server.url,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
        }
        huggingface_hub.utils.disable_progress_bars()
        yield server
        huggingface_hub.utils.enable_progress_bars()
        huggingface_hub.close_session()


@pytest.fixture
def short_waits(monkeypatch):
    """The client's pauses between tries take a hundredth of their time."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 100))


class Tally:
    """What became of the faults of a run: printed at its end, under "measured".

    A call that faults struck got over them ("resumed"), or was refused with a sentence and went through when they were
    gone, or its process was killed and the same command got to the end. "Lost" are files that differ, after a fault,
    from what was there and from what was to be there, and those that a repetition did not bring.
    """

    RESUMED = "faulty calls that resumed"
    REFUSED = "faulty calls refused clearly, and complete when repeated"
    KILLED = "processes killed, and complete by the same command"
    RAISED = "faulty calls of from_pretrained and snapshot_download, complete when repeated"

    def __init__(self, figures):
        self.figures = figures

    def count(self, what, number=1):
        self.figures[f"Hub, {what}"] = self.figures.get(f"Hub, {what}", 0) + number

    def settle(self, hits, outcome, lost):
        """One call under `hits` faults, and its outcome; `lost` names what is wrong afterwards."""
        assert hits > 0, "no fault struck"
        self.count("faults injected", hits)
        self.count(outcome)
        self.count("files lost", len(lost))
        assert not lost


@pytest.fixture
def tally(measured):
    return Tally(measured)


@pytest.fixture
def impatient(monkeypatch, short_waits):
    """Clients that take a second of silence for the end of a connection, and hardly wait between tries."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
    monkeypatch.setattr("transformers_dsv3.hub.patience.SILENCE", 0.5)
    monkeypatch.setattr("transformers_dsv3.hub.pull._TIMEOUT", 0.5)


@pytest.fixture
def shell(hub):
    """Starts a Python of its own, as a user's shell that knows this Hub: `shell(*arguments)` gives the process."""

    def start(*arguments, **environment):
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, **hub.environment, **environment},
            # Where a shell started the tests in the background, SIGINT is ignored, and would be here
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, make_model, byte_tokenizer):
    """Folders of one checkpoint: `single` in one file, `sharded` in several, both with tokenizer and card."""
    root = tmp_path_factory.mktemp("checkpoints")
    model = make_model(seed=1, vocab_size=258)
    for name, size in (("single", "5GB"), ("sharded", "60KB")):
        model.save_pretrained(root / name, max_shard_size=size)
        byte_tokenizer.save_pretrained(root / name)
        (root / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A small model\n")
    return root


@pytest.fixture(autouse=True)
def no_leaks(caplog):
    """No log line at any level, of any library, shows an access token."""
    caplog.set_level(logging.DEBUG)
    yield
    lines = [record.getMessage() for record in caplog.get_records("call")]
    assert not [line for line in lines if any(token in line for token in (TOKEN, READ_TOKEN, STRANGER))]
