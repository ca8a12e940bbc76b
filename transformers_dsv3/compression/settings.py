"""What a checkpoint is to be compressed to, and on how much text that is calibrated."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..option_error import OptionError
from .expert_choice import check_criterion


# Bits of a weight that is left as it is
WHOLE = 16
BITS, EXPERTS_BITS = (4, 8, WHOLE), (2, 3, 4, 8, WHOLE)
METHODS = ("gptq", "nearest")
_UNITS = {
    "": 1,
    "B": 1,
    **{
        f"{letter}{kind}": (1000 if kind == "B" else 1024) ** (i + 1)
        for i, letter in enumerate("KMGT")
        for kind in ("B", "iB")
    },
}


@dataclass(frozen=True)
class CompressionSettings:
    """How a checkpoint is compressed. All of it decides the result, to the bit.

    Attributes:
        bits: of a weight of linear layers: attention, dense networks, shared experts, the projection of MTP layers;
            16, here and below, leaves them as they are.
        experts_bits: of a weight of routed experts; None for as many as `bits`.
        head_bits: of a weight of the embedding and the output head; tied ones are left as they are.
        method: "gptq" rounds so that the outputs on a text change least, "nearest" each weight on its own.
        tokens: of the text to calibrate on, in whole windows.
        window: tokens of a window, which sees nothing before it.
        min_tokens: experts that fewer tokens are routed to are calibrated on those of the whole layer.
        seed: by which the windows are drawn.
        prune: share of the routed experts of each layer that is removed before.
        prune_by: what they are chosen by: "reap", "frequency" or "random".
        heal: optimizer steps of training on the text between pruning and rounding.

    Raises:
        OptionError: for a value that cannot be; names the option of `transformers-dsv3 compress`.
    """

    bits: int = 4
    experts_bits: int | None = None
    head_bits: int = 8
    method: str = "gptq"
    tokens: int = 131_072
    window: int = 256
    min_tokens: int = 256
    seed: int = 0
    prune: float = 0.0
    prune_by: str = "reap"
    heal: int = 0

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--bits", self.bits, BITS),
            ("--experts-bits", self.of("experts"), EXPERTS_BITS),
            ("--head-bits", self.head_bits, BITS),
            ("--method", self.method, METHODS),
        ):
            if value not in known:
                *first, last = map(str, known)
                raise OptionError(option, f"{value!r} is not {', '.join(first)} or {last}")
        for option, value, least in (
            ("--window", self.window, 2),
            ("--tokens", self.tokens, self.window),
            ("--min-tokens", self.min_tokens, 1),
            ("--seed", self.seed, 0),
            ("--heal", self.heal, 0),
        ):
            if value < least:  # type: ignore[operator]
                what = "one window" if option == "--tokens" else "the least"
                raise OptionError(option, f"{value} is less than {what}, {least}")
        if not 0 <= self.prune < 1:
            raise OptionError("--prune", f"{self.prune} is no share from 0 to below 1")
        check_criterion(self.prune_by)

    def of(self, kind: str) -> int:
        """Bits of a kind of weights: "linear", "experts" or "head"; 16 for others."""
        if kind == "experts":
            return self.bits if self.experts_bits is None else self.experts_bits
        return {"linear": self.bits, "head": self.head_bits}.get(kind, WHOLE)

    def __str__(self) -> str:
        pruned = f", {self.prune:.4g} of the experts pruned" if self.prune else ""
        return f"{self.bits} bits, experts {self.of('experts')}, embedding and head {self.head_bits}{pruned}"


def parse_memory(text: str, option: str = "--memory") -> int:
    """Bytes of a size such as `8GiB`, `500 MB` or a number. Raises `OptionError`, which names the option."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    factor = None if match is None else {unit.lower(): size for unit, size in _UNITS.items()}.get(match[2].lower())
    if match is None or factor is None:
        raise OptionError(option, f"{text!r} is no size: write 8GiB, 500MB or a number of bytes")
    return int(float(match[1]) * factor)
