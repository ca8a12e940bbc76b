"""README's install and test lines are the ones that CI runs."""

import re
from pathlib import Path

import transformers_dsv3


ROOT = Path(__file__).parents[1]


def shell_lines(document: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


SETS_UP = "python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 -e "


def test_readmes_two_commands_set_themselves_up_and_are_run_by_ci():
    """CI takes them from README, so that they are these very lines."""
    commands = [line for line in shell_lines("README.md") if ".venv" in line]
    quickstart, tests = commands
    assert quickstart == SETS_UP + ". && .venv/bin/transformers-dsv3 quickstart"
    assert tests.startswith(SETS_UP) and ".venv/bin/python -m pytest" in tests
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "sed -n '/^python3 -m venv .*pytest/p' README.md" in ci
    assert "sed -n '/^python3 -m venv .*quickstart/p' README.md" in ci


def test_public_names_are_those_of_the_pages():
    """What README and the pages import from the package itself is exported there, and what is exported exists."""
    named = set()
    for page in (ROOT / "README.md", *(ROOT / "examples").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for names in re.findall(r"^from transformers_dsv3 import ([\w, ]+)", text, flags=re.MULTILINE):
            named |= {name.strip() for name in names.split(",")}
        named |= set(re.findall(r"transformers_dsv3\.([a-z]\w+)\(", text))
        assert not re.findall(r"^from transformers_dsv3\.\S+ import", text, flags=re.MULTILINE), page.name
    assert named <= set(transformers_dsv3.__all__), named - set(transformers_dsv3.__all__)
    for name in transformers_dsv3.__all__:
        assert getattr(transformers_dsv3, name).__name__ == name or name.startswith("Dsv3")


def test_the_pages_are_linked():
    """A page that nothing leads to is not read; a link that leads nowhere is worse."""
    reached, to_read = set(), [ROOT / "README.md"]
    while to_read:
        page = to_read.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)#]+\.md)\)", page.read_text(encoding="utf-8"))
        to_read += [
            found for link in links if (found := (page.parent / link).resolve()).exists() and found not in reached
        ]
    assert set((ROOT / "examples").glob("*.md")) <= reached
    for page in (ROOT / "README.md", *(ROOT / "examples").glob("*.md"), *(ROOT / "tests").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
