"""What a checkpoint was compressed to and how, kept beside it: `compression_record.json`.

{
  "record": "transformers-dsv3 compression", "version": 1,
  "source": "dsv3-quickstart",     the folder's own name
  "config_sha256": "…",            of its configuration, as in evaluation records
  "settings": {…},                 see `CompressionSettings`
  "text": null, or {"source", "windows", "tokens", "sha256"},     of the token ids that it was calibrated on
  "weights": 10281985,             parameters, copies in MTP layers included
  "weights_before": 10281985,      the same before experts were removed
  "bytes_before": 20561640, "bytes_after": 5600000,               of all safetensors files
  "bits_per_weight": 4.4, "ratio": 3.7,                           bytes before over bytes after
  "ratio_from_bf16": 3.7, "ratio_from_fp32": 7.4,                 the same if those were bf16, or fp32
  "layers": [{"layer": 1, "tokens_per_expert": [4096, …], "methods": ["gptq", …], "kept": []}, …],   experts by number
  "seconds": 93.5                  of all commands that it took
}
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict

from ..evaluation.record_fields import check_kind, plain, read_fields, read_values
from ..evaluation.shareable import shareable


COMPRESSION_RECORD = "compression_record.json"
RECORD, VERSION = "transformers-dsv3 compression", 1


@strict
@dataclass
class Text:
    """Where the text came from, in words, and what of it was used."""

    source: str
    windows: int
    tokens: int
    sha256: str


@strict
@dataclass
class Layer:
    """One layer by its number in the checkpoint; lists have an entry an expert and are empty for a dense network.

    Attributes:
        tokens_per_expert: tokens of the text that were routed to each.
        methods: "gptq" on these, "gptq, the layer's tokens" where they were too few, or "nearest".
        kept: where experts were removed before, the numbers that those that are left had.
    """

    layer: int
    tokens_per_expert: list[int]
    methods: list[str]
    kept: list[int] = field(default_factory=list)

    @property
    def uncalibrated(self) -> list[int]:
        """Experts that were not calibrated on tokens of their own."""
        return [expert for expert, method in enumerate(self.methods) if method != "gptq"]


@strict
@dataclass
class CompressionRecord:
    """See the top of this file, which lists the fields as they stand in JSON."""

    source: str
    config_sha256: str
    settings: dict
    text: Text | None
    weights: int
    weights_before: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    ratio: float
    ratio_from_bf16: float
    ratio_from_fp32: float
    layers: list[Layer] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without folders of this machine."""
        return plain(shareable({"record": RECORD, "version": VERSION, **asdict(self)}))


def read_compression_record(path: str | Path) -> CompressionRecord:
    """A record as it was written.

    Raises:
        RecordError: naming the file and the first field that is missing or wrong.
    """
    source, values = str(path), read_values(path)
    check_kind(source, values, RECORD, VERSION, "a compression")
    return read_fields(CompressionRecord, values, source)
