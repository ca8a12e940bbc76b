"""Facts of the machine and of the source that records keep."""

import subprocess

from transformers_dsv3.evaluation import machine
from transformers_dsv3.evaluation.machine import source_commit


def test_commit_of_the_source(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(machine, "_PACKAGE", package)
    installed = source_commit()  # not tracked: whatever pip knows of the installed package
    git("add", ".")
    git("commit", "-qm", "one")
    assert source_commit() == git("rev-parse", "HEAD") != installed
    (package / "__init__.py").write_text("changed = True\n")
    assert source_commit() == git("rev-parse", "HEAD") + "-dirty"
