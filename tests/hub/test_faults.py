"""Everything that can go wrong between a machine and the Hub, at every request that an upload or a download makes.

A call under a fault gets to its end all the same, or is refused with a sentence; then the same call goes through when
the fault is gone. At no time does the repository, or the folder or cache of a download, hold what is neither the old
nor the new. The counts are printed at the end of the run.
"""

import pytest
from transformers import AutoModelForCausalLM

from transformers_dsv3.hub.hub_errors import HubError
from transformers_dsv3.hub.pull import pull_from_hub
from transformers_dsv3.hub.push import push_to_hub


FOREVER = 10**6


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def differing(found, *allowed):
    """Names of the files by which `found` differs from the nearest of the `allowed`."""
    names = [{name for name in found.keys() | right.keys() if found.get(name) != right.get(name)} for right in allowed]
    return sorted(min(names, key=len))


# Requests of an upload, and of a download
UPLOAD = {
    "who asks": "GET .*/whoami",
    "may it": "GET .*/auth-check",
    "what is there": "GET /api/models/anna/model$",
    "its branches": "GET .*/refs",
    "its files": "GET .*/tree/",
    "a new branch": "POST .*/branch/",
    "the card's metadata": "POST .*/validate-yaml",
    "which files are large": "POST .*/preupload/",
    "where large files go": "POST .*/objects/batch",
    "a large file": "PUT /lfs/basic/",
    "a part of a larger file": "PUT /lfs/part/",
    "all parts are there": "POST /lfs/complete/",
    "has it arrived": "POST /lfs/verify/",
    "the commit": "POST .*/commit/",
}
DOWNLOAD = {
    "what is there": "GET /api/models/anna/model",
    "its files": "GET .*/tree/",
    "a file's name and size": "HEAD .*/resolve/",
    "a small file": "GET .*/resolve/.*/config.json",
    "a large file": "GET /cdn/",
}
FAULTS = {
    "500 once": {"kind": "status", "status": 500},
    "503 three times": {"kind": "status", "status": 503, "times": 3},
    "503 for ever": {"kind": "status", "status": 503, "times": FOREVER},
    "429 with a time to wait": {"kind": "status", "status": 429, "retry_after": 1},
    "token expires": {"kind": "status", "status": 401, "times": FOREVER},
    "right withdrawn": {"kind": "status", "status": 403, "times": FOREVER},
    "request cut": {"kind": "cut_request", "at": 40},
    "request cut for ever": {"kind": "cut_request", "at": 40, "times": FOREVER},
    "wrong bytes sent": {"kind": "corrupt_request", "at": 40},
    "answer cut": {"kind": "cut_response", "at": 40},
    "answer cut for ever": {"kind": "cut_response", "at": 40, "times": FOREVER},
    "answer lost": {"kind": "lose_answer"},
    "answer too short": {"kind": "truncate", "at": 40},
    "silence": {"kind": "stall", "at": 40},
    "wrong bytes received": {"kind": "corrupt", "at": 40},
    "wrong bytes received for ever": {"kind": "corrupt", "at": 40, "times": FOREVER},
}
# The others are slow: all of them take three minutes
EVERY_TIME = ("token expires", "answer lost", "wrong bytes sent", "wrong bytes received")


def cases(requests):
    """(request, fault) of those that can meet: what happens to a body needs one."""
    for request, where in requests.items():
        for fault, fields in FAULTS.items():
            kind = fields["kind"]
            meets = {
                "status": True,
                "cut_request": where.startswith(("POST", "PUT")) and "branch" not in where,
                "corrupt_request": where.startswith("PUT"),
                # Of other answers a wrong byte may be one that says something else
                "corrupt": where.startswith("GET") and requests is DOWNLOAD,
            }.get(kind, not where.startswith("HEAD"))
            if meets:
                marks = [] if fault in EVERY_TIME else pytest.mark.slow
                yield pytest.param(request, fault, marks=marks, id=f"{request}: {fault}")


def refusal(hub, call):
    """Runs `call`: the sentence that it was refused with, or None."""
    try:
        call()
    except HubError as error:
        message = str(error)
        assert "\n" not in message and "anna/model" in message and len(message) < 600
        assert not any(token in message for token in hub.tokens.values())
        return message
    return None


@pytest.mark.parametrize(["request_of", "fault"], list(cases(UPLOAD)))
def test_uploads(hub, checkpoints, impatient, tally, request_of, fault):
    push_to_hub(checkpoints / "single", "anna/model")
    before, new = hub.files("anna/model"), contents(checkpoints / "sharded")
    del before[".gitattributes"]
    if "part" in request_of:
        hub.part_bytes = 20_000
    injected = hub.inject(UPLOAD[request_of], **FAULTS[fault])

    def push():
        return push_to_hub(checkpoints / "sharded", "anna/model", revision="next")

    refused = refusal(hub, push)
    hub.faults.clear()

    def state(ref):
        files = hub.files("anna/model", ref)
        del files[".gitattributes"]
        return files

    lost = differing(state("main"), before)
    if "next" in hub.repositories["model", "anna/model"].refs:
        lost += differing(state("next"), *([before, new] if refused else [new]))
    else:
        assert refused
    if refused:
        push()
        lost += differing(state("next"), new)
    lost += differing(contents(checkpoints / "sharded"), new)
    tally.settle(injected.hits, tally.REFUSED if refused else tally.RESUMED, lost)


@pytest.mark.parametrize(["request_of", "fault"], list(cases(DOWNLOAD)))
@pytest.mark.parametrize("place", ["cache", "folder"])
def test_downloads(hub, checkpoints, impatient, tally, tmp_path, place, request_of, fault):
    push_to_hub(checkpoints / "sharded", "anna/model")
    there = hub.files("anna/model")
    injected = hub.inject(DOWNLOAD[request_of], **FAULTS[fault])
    target = {"output": tmp_path / "model"} if place == "folder" else {}

    def pull():
        return pull_from_hub("anna/model", **target)

    refused = refusal(hub, pull)
    hub.faults.clear()
    # A folder is there when it is whole. In the cache files may be missing, and those that are there are right
    found = tmp_path / "model"
    if place == "cache":
        found = next((tmp_path / "cache").glob("models--anna--model/snapshots/*"), found)
    arrived = contents(found) if found.exists() else {}
    lost = [name for name, content in arrived.items() if content != there[name]]
    if place == "folder":
        assert found.exists() != bool(refused)
    elif refused and len(arrived) < len(there):
        with pytest.raises(OSError):
            AutoModelForCausalLM.from_pretrained("anna/model", local_files_only=True)
    if refused:
        pull()
        found = found if found.exists() else next((tmp_path / "cache").glob("models--anna--model/snapshots/*"))
    lost += differing(contents(found), there)
    tally.settle(injected.hits, tally.REFUSED if refused else tally.RESUMED, lost)


def test_small_files_that_arrive_wrong_in_the_commit_itself(hub, checkpoints):
    """They have no hash that the Hub could compare: what it has afterwards is compared with what was sent."""
    flipped = hub.inject("POST .*/commit/", "corrupt_request", at=3000)
    with pytest.raises(HubError, match="is not the file that was sent"):
        push_to_hub(checkpoints / "single", "anna/model")
    assert flipped.hits == 1
    push_to_hub(checkpoints / "single", "anna/model")
    files = hub.files("anna/model")
    del files[".gitattributes"]
    assert files == contents(checkpoints / "single")
