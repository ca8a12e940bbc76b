"""What a causal language model needs for a text, in bits a byte."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


class ModelScorer:
    """Scores texts by a checkpoint, in windows that do not overlap.

    Args:
        checkpoint: a folder or name, of a DSv3 of any size or any other model that Transformers opens.
        window: tokens of context.
        most_characters: of a longer text, its first ones are scored.
    """

    def __init__(self, checkpoint: str, window: int = 512, most_characters: int = 20_000):
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        self.window = min(window, getattr(self.model.config, "max_position_embeddings", window))
        self.most_characters = most_characters
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        self.start = 0 if start is None else int(start)

    @torch.inference_mode()
    def __call__(self, text: str) -> float:
        """Bits a byte of the text; each window begins with the token that begins texts."""
        text = text[: self.most_characters]
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        nats = 0.0
        for first in range(0, len(ids), self.window - 1):
            row = torch.tensor([[self.start, *ids[first : first + self.window - 1]]])
            logits = self.model(input_ids=row).logits[0, :-1].float()
            nats += float(cross_entropy(logits, row[0, 1:], reduction="sum"))
        return nats / math.log(2) / max(1, len(text.encode("utf-8")))
