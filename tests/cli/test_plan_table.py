"""The table of a plan."""

import io

from rich.console import Console

from transformers_dsv3.compression.plan import model_config, plan
from transformers_dsv3.compression.settings import CompressionSettings
from transformers_dsv3_cli.plan_table import plan_notes, plan_table


def test_every_part_and_the_sum_are_printed():
    made = plan(model_config("glm-4.7-flash"), CompressionSettings(4, experts_bits=3, prune=0.5))
    console = Console(width=120, file=io.StringIO())
    console.print(plan_table(made, "glm-4.7-flash"))
    text = console.file.getvalue()
    assert "glm-4.7-flash: 4 bits, experts 3, embedding and head 8, 0.5 of the experts pruned" in text
    for row in made.rows:
        (line,) = [line for line in text.splitlines() if f"│ {row.part} " in line]
        assert f"{row.bytes / 1e6:,.1f} MB" in line and f"{row.bits:.2f}" in line
    assert f"{made.file_bytes / 1e6:,.1f} MB" in text and "…" not in text
    notes = "\n".join(plan_notes(made, 5e10))
    assert f"{made.ratio():.2f} times smaller" in notes and "32 are left" in notes
    assert f"at most {5e10 / made.bytes_read:.3g} tokens a second" in notes
