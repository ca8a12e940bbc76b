"""A domain's text beside general text, cut into blocks: what studies of fine-tuning train on, choose by and report."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .byte_bpe import TokenBlocks, token_stream
from .python_reference import python_reference
from .text_files import build_corpus, standard_library


@dataclass(frozen=True)
class DomainBlocks:
    """Blocks of tokens of four texts that have nothing in common.

    Attributes:
        train: of the domain.
        validation: of the domain, to choose settings by.
        test: of the domain, to report.
        general: of other text, to report.
    """

    train: TokenBlocks
    validation: TokenBlocks
    test: TokenBlocks
    general: TokenBlocks

    @property
    def held_out(self) -> dict[str, TokenBlocks]:
        """All but `train`, by name."""
        return {"validation": self.validation, "test": self.test, "general": self.general}


def python_domain_blocks(tokenizer: PreTrainedTokenizerBase, length: int = 256) -> DomainBlocks:
    """Python's reference documentation, its held-out topics in two halves, beside its standard library's source.

    Of the standard library these are the files that the quickstart holds out.

    Args:
        length: tokens of a block.
    """
    domain = python_reference()
    halves: tuple[list[str], list[str]] = ([], [])
    for document in sorted(domain.held_out, key=lambda document: -document.n_bytes):
        min(halves, key=lambda half: sum(map(len, half))).append(document.text)  # of about the same size
    general = build_corpus(standard_library(), "").held_out
    texts = ([d.text for d in domain.train], *halves, [d.text for d in general])
    return DomainBlocks(*(TokenBlocks(token_stream(tokenizer, part), length) for part in texts))
