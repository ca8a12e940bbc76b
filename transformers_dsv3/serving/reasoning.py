"""What a model thinks before it answers, told apart from the answer as text comes in."""

from __future__ import annotations

from collections.abc import Iterator


BEGIN, END = "<think>", "</think>"


def held_back(text: str, *marks: str) -> int:
    """How many characters at the end of a text may be the beginning of a mark."""
    longest = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return longest


class ReasoningSplitter:
    """Splits text that comes in pieces into reasoning and answer.

    DeepSeek's templates either end the prompt with `<think>`, and the text begins within, or leave it to the model.

    Args:
        prompt: the text of the prompt, whose end says which.
    """

    def __init__(self, prompt: str):
        ended = prompt.rstrip()
        self.part: str | None = None  # not known yet
        if ended.endswith(BEGIN):
            self.part = "reasoning"
        elif ended.endswith(END):
            self.part = "content"
        self.buffer = ""
        self.trim = self.part is not None  # line breaks behind the marks belong to neither

    def feed(self, text: str, last: bool = False) -> Iterator[tuple[str, str]]:
        """Pieces ("reasoning" or "content", text). `last`: nothing comes any more, and nothing is held back."""
        self.buffer += text
        if self.part is None:
            start = self.buffer.lstrip()
            if not last and start != BEGIN and BEGIN.startswith(start):
                return
            if start.startswith(BEGIN):
                self.part, self.trim, self.buffer = "reasoning", True, start[len(BEGIN) :]
            else:
                self.part = "content"
        if self.part == "reasoning":
            before, mark, after = self.buffer.partition(END)
            told = len(before) - (0 if mark or last else held_back(before, END))
            yield from self._tell(before[:told])
            if not mark:
                self.buffer = before[told:]
                return
            self.part, self.trim, self.buffer = "content", True, after
        told_all, self.buffer = self.buffer, ""
        yield from self._tell(told_all)

    def _tell(self, text: str) -> Iterator[tuple[str, str]]:
        if self.trim:
            text = text.lstrip("\n")
        if text:
            self.trim = False
            yield self.part or "content", text
