"""The held-out split cannot leak: duplicates land on one side, and no character is in both halves of a cut document."""

import random

import pytest
from data_examples import story

from dlmconvert.data.sources import Document, content_hash
from dlmconvert.data.splits import FEW_DOCUMENTS, LOOK_AHEAD, Split, cut_tail, held_out, split_documents, split_rule


def corpus(numbers):
    return [Document(story(n), content_hash(story(n))) for n in numbers]


def sides(documents, fraction):
    train, validation = split_documents(lambda: iter(documents), fraction)
    return list(train), list(validation)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_the_share_is_about_the_fraction(fraction):
    share = sum(held_out(content_hash(str(i)), fraction) for i in range(20_000)) / 20_000
    assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / 20_000) ** 0.5


def test_a_larger_fraction_holds_out_all_that_a_smaller_one_does():
    groups = [content_hash(str(i)) for i in range(1000)]
    assert {g for g in groups if held_out(g, 0.1)} <= {g for g in groups if held_out(g, 0.3)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_documents", [FEW_DOCUMENTS, 30, LOOK_AHEAD + 50])
def test_duplicates_stay_on_one_side(seed, num_documents):
    draw = random.Random(seed)
    numbers = [draw.randrange(num_documents // 2) for _ in range(num_documents)]
    train, validation = sides(corpus(numbers), 0.2)
    assert validation and len(train) + len(validation) == num_documents
    assert not {d.text for d in train} & {d.text for d in validation}


def test_the_order_of_the_documents_does_not_matter():
    documents = corpus(range(300))
    shuffled = random.Random(0).sample(documents, len(documents))
    assert {d.text for d in sides(documents, 0.1)[1]} == {d.text for d in sides(shuffled, 0.1)[1]}


def test_a_small_corpus_always_holds_something_out():
    for start in range(0, 500, 25):
        train, validation = sides(corpus(range(start, start + 25)), 0.001)
        assert len(validation) == 1 and len(train) == 24


@pytest.mark.parametrize("num_documents", [1, 5, FEW_DOCUMENTS - 1])
def test_few_documents_are_cut_at_a_line_end_near_their_end(num_documents):
    documents = corpus(range(num_documents))
    train, validation = sides(documents, 0.2)
    assert [a.text + b.text for a, b in zip(train, validation, strict=True)] == [d.text for d in documents]
    for head, tail in zip(train, validation, strict=True):
        assert head.text.endswith("\n") and 0.05 < len(tail.text) / len(head.text + tail.text) < 0.45


def test_cut_tail_without_line_ends():
    assert cut_tail("x" * 100, 0.1) == ("x" * 90, "x" * 10)
    assert cut_tail("ab", 0.01) == ("ab", "")


def test_a_document_of_a_small_source_is_cut_wherever_it_turns_up():
    small, large = corpus(range(5)), corpus(range(300))  # the large source holds the documents of the small one as well
    rule = split_rule([small, large], 0.3)
    train, validation = set(), set()
    for document in small + large:
        head, tail = rule.parts(document)
        train.update(head.splitlines()[1:] if head else [])
        validation.update(tail.splitlines()[1:] if tail else [])
    assert train and validation and not train & validation


def test_excluded_groups_are_on_no_side():
    document = corpus([1])[0]
    assert Split(0.0, excluded=frozenset([document.group])).parts(document) == ("", "")


def test_no_fraction_holds_nothing_out():
    train, validation = sides(corpus(range(5)), 0.0)
    assert len(train) == 5 and not validation
