"""Which text is held out: a pure function of its content, so that the split cannot leak.

A document and its duplicates always land on one side, whatever their order, their number, or the source they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from dlmconvert.data.sources import Document

FEW_DOCUMENTS = 20
"""Below this number of documents a source is split inside its documents: at their ends."""

LOOK_AHEAD = 1000
"""Documents that are looked at to choose the rule of a source: so many that 2 percent of them are never none by chance."""


def held_out(group: str, fraction: float) -> bool:
    """Whether the documents of a group are held out. group: a hex hash; about `fraction` of all groups are."""
    return int(group[:15], 16) < fraction * 16**15


@dataclass(frozen=True)
class Split:
    """The rule for a whole corpus (all sources of a mixture together).

    tails: groups of the sources with fewer than `FEW_DOCUMENTS` documents: the last `fraction` of each document's characters
        is held out, wherever the document turns up.
    chosen: groups that are held out because a small source would have nothing held out otherwise.
    excluded: groups that may not be trained on because they are in a validation text given by path.
    """

    fraction: float
    tails: frozenset[str] = frozenset()
    chosen: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()

    def parts(self, document: Document) -> tuple[str, str]:
        """(text to train on, text held out) of a document; either may be empty. Nothing is in both."""
        if document.group in self.excluded:
            return "", ""
        if document.group in self.tails:
            return cut_tail(document.text, self.fraction)
        if document.group in self.chosen or held_out(document.group, self.fraction):
            return "", document.text
        return document.text, ""


def split_rule(corpora: Iterable[Iterable[Document]], fraction: float, excluded: Iterable[str] = ()) -> Split:
    """The rule for a mixture of corpora, from the first `LOOK_AHEAD` documents of each (read again afterwards).

    Fewer than `FEW_DOCUMENTS` documents: tails. Fewer than `LOOK_AHEAD` and, by chance, none of them held out: the one with
    the smallest hash is. So a fraction above 0 holds something out of every corpus of fewer than `LOOK_AHEAD` documents.
    """
    if fraction <= 0:
        return Split(0.0, excluded=frozenset(excluded))
    tails: set[str] = set()
    chosen: set[str] = set()
    for documents in corpora:
        groups = [document.group for document in islice(documents, LOOK_AHEAD)]
        if len(groups) < FEW_DOCUMENTS:
            tails.update(groups)
        elif len(groups) < LOOK_AHEAD and not any(held_out(group, fraction) for group in groups):
            chosen.update(smallest_group(groups))
    return Split(fraction, frozenset(tails), frozenset(chosen), frozenset(excluded))


def smallest_group(groups: Iterable[str]) -> set[str]:
    """The group with the smallest hash, unless it is the only one: then nothing would be left to train on."""
    distinct = sorted(set(groups))
    return set(distinct[:1]) if len(distinct) > 1 else set()


def split_documents(read: Callable[[], Iterator[Document]], fraction: float) -> tuple[Iterator[Document], Iterator[Document]]:
    """(documents to train on, documents held out) of one corpus. read: opens the corpus from its start, as often as asked."""
    rule = split_rule([read()], fraction)

    def side(index: int) -> Iterator[Document]:
        for document in read():
            text = rule.parts(document)[index]
            if text:
                yield Document(text, document.group, document.origin)

    return side(0), side(1)


def cut_tail(text: str, fraction: float) -> tuple[str, str]:
    """(head, tail): the tail has about `fraction` of the characters and begins after a line end where there is one near."""
    cut = len(text) - round(len(text) * fraction)
    window = max(1, len(text) - cut)  # look for a line end at most one tail's length away
    before = text.rfind("\n", max(0, cut - window), cut)
    after = text.find("\n", cut, min(len(text) - 1, cut + window // 2))
    ends = [end + 1 for end in (before, after) if end >= 0 and 0 < end + 1 < len(text)]
    cut = min(ends, key=lambda end: abs(end - cut)) if ends else cut
    return text[:cut], text[cut:]
