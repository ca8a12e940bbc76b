"""README's install and test lines are the ones that CI runs."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[1]


def shell_lines(document: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def test_ci_runs_readmes_install_and_test_lines_in_order():
    lines = [line for line in shell_lines("README.md") if line.startswith(("pip install", "python -m pytest"))]
    assert lines[0] == "pip install torch==2.13.0"
    assert any("pytest" in line for line in lines)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    positions = [ci.index(line) for line in lines]
    assert positions == sorted(positions)


def test_quickstart_is_readmes_first_command_after_installing():
    lines = [line for line in shell_lines("README.md") if not line.startswith("pip install")]
    assert lines[0] == "transformers-dsv3 quickstart"


def test_the_pages_are_linked():
    """A page that nothing leads to is not read; a link that leads nowhere is worse."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "examples").glob("*.md"):
        assert f"(examples/{page.name})" in readme, page.name
    for page in (ROOT / "README.md", *(ROOT / "examples").glob("*.md"), *(ROOT / "tests").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
