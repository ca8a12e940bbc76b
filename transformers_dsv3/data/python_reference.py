"""English prose that is on every machine with Python: the reference documentation behind `help("topic")`."""

from __future__ import annotations

from dataclasses import replace

from .text_files import Corpus, Document, build_corpus


def python_reference(held_out_share: float = 0.15) -> Corpus:
    """The topics of `pydoc_data`, half a megabyte of reference manual, whole topics of which are held out.

    Long topics repeat short ones ("compound" has the text of "for", "if" and others), so paragraphs that a held-out
    topic has are taken out of those to train on.
    """
    from pydoc_data.topics import topics

    documents = [Document(name, topics[name]) for name in sorted(topics)]
    corpus = build_corpus(documents, "the reference documentation of Python", held_out_share=held_out_share)
    held_out = {_words(paragraph) for document in corpus.held_out for paragraph in document.text.split("\n\n")}
    train = []
    for document in corpus.train:
        kept = [part for part in document.text.split("\n\n") if _words(part) not in held_out]
        if kept:
            train.append(Document(document.name, "\n\n".join(kept)))
    split = (
        f"{len(corpus.held_out)} of {len(documents)} topics held out, and their paragraphs wherever they are repeated"
    )
    return replace(corpus, train=tuple(train), split=split)


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())
