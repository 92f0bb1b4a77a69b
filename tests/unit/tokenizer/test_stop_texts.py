"""Stop texts: found wherever the text was cut, never told too early, and told where they are asked for."""

import itertools
import weakref

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.tokenizer.decoding import Decoding, Decodings
from penstock.tokenizer.stops import stop_texts


class Letters:
    """A detokenizer whose ids stand for the given pieces of text."""

    def __init__(self, pieces):
        self.pieces = pieces

    def feed(self, token_id):
        return self.pieces[token_id]

    def finish(self):
        return ""


def _run(pieces, stop, **options):
    decoding = Decoding(1, Letters(pieces), stop, **options)
    told = []
    for i in range(len(pieces)):
        decoding.feed(i)
        told.append(decoding.take())
        if decoding.last:
            return told
    decoding.finish()
    return [*told, decoding.take()]


def _text(told):
    return "".join(one.text for one in told)


def _expected(text, stops):
    """By definition: the first end, then the longest, then the first listed."""
    for end in range(1, len(text) + 1):
        found = [(-len(s), i) for i, s in enumerate(stops) if s and text[:end].endswith(s)]
        if found:
            length, index = min(found)
            return text[: end + length], text[:end], index
    return text, text, None


@given(
    pieces=st.lists(st.text("ab한c", max_size=4), max_size=12),
    stops=st.lists(st.text("ab한", min_size=1, max_size=6), min_size=1, max_size=5),
    include=st.booleans(),
)
@example(pieces=["aab", "aabaaab"], stops=["aabaaab"], include=False)
@example(pieces=["abc"], stops=["abcd", "bc", "c"], include=True)
@settings(max_examples=1000, deadline=None)
def test_finds_what_the_definition_finds_however_the_text_is_cut(pieces, stops, include):
    told = _run(pieces, stops, include_stop=include)
    without, with_stop, index = _expected("".join(pieces), stops)
    assert _text(told) == (with_stop if include else without)
    assert told[-1].stop_index == index
    assert told[-1].last
    if index is not None:
        lengths = list(itertools.accumulate(map(len, pieces)))
        assert told[-1].tokens == next(i for i, length in enumerate(lengths, 1) if length >= len(with_stop))


@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=12),
    stops=st.lists(st.text("ab", min_size=2, max_size=5), min_size=1, max_size=3),
)
@settings(max_examples=500, deadline=None)
def test_holds_back_no_more_than_may_become_a_stop_text(pieces, stops):
    told = _run(pieces, stops)
    if told[-1].stop_index is not None:
        told, pieces = told[:-1], pieces[: len(told) - 1]
    for count in range(1, len(pieces) + 1):
        text = "".join(pieces[:count])
        may = max((k for s in stops for k in range(len(s)) if text.endswith(s[:k])), default=0)
        assert _text(told[:count]) == text[: len(text) - may]


def test_a_stop_text_counts_from_the_minimum_of_tokens_on():
    told = _run(["a", "END", "b", "END", "c"], ["END"], min_tokens=4)
    assert _text(told) == "aENDb"
    assert (told[-1].tokens, told[-1].stop_index) == (4, 0)


def test_a_stop_text_may_begin_before_the_minimum_and_be_complete_after_it():
    told = _run(["a", "E", "ND", "b"], ["END"], min_tokens=3)
    assert _text(told) == "a"
    assert told[-1].tokens == 3


def test_one_complete_before_the_minimum_is_ordinary_text():
    told = _run(["END", "x"], ["END"], min_tokens=2)
    assert _text(told) == "ENDx"
    assert told[-1].stop_index is None


def test_tokens_behind_a_stop_text_in_the_same_frame_are_not_consumed():
    decodings = Decodings()
    decodings.open(Decoding(1, Letters(["a", "#", "b"]), ["#"]))
    decodings.feed([1, 1, 1], [0, 1, 2])
    (told,) = decodings.take()
    assert (told.text, told.tokens, told.last) == ("a", 2, True)
    decodings.feed([1], [2])
    decodings.finish([1])
    assert decodings.take() == []
    assert len(decodings) == 0


def test_offsets_are_bytes():
    told = _run(["한", "é", "x"], [])
    assert [one.byte_offset for one in told] == [0, 3, 5, 6]


def test_a_replayed_decoding_tells_its_text_from_the_beginning_and_goes_on():
    pieces = ["one ", "two ", "three"]
    decodings = Decodings()
    decodings.open(Decoding(1, Letters(pieces)), [0, 1])
    (told,) = decodings.take()
    assert (told.text, told.byte_offset, told.tokens) == ("one two ", 0, 2)
    decodings.feed([1], [2])
    (told,) = decodings.take()
    assert (told.text, told.byte_offset, told.tokens) == ("three", 8, 3)


def test_a_closed_decoding_tells_nothing_more():
    decodings = Decodings()
    decodings.open(Decoding(1, Letters(["a"])))
    decodings.open(Decoding(2, Letters(["b"])))
    decodings.feed([1, 2], [0, 0])
    decodings.close([1, 99])
    assert [one.decoding_id for one in decodings.take()] == [2]
    assert len(decodings) == 1


def test_columns_of_different_length_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        Decodings().feed([1, 2], [3])


def test_automata_are_shared_while_they_are_in_use_and_few_are_kept_behind():
    """A client chooses the texts, and an automaton can take megabytes."""
    assert stop_texts(("one", "two")) is stop_texts(("one", "two"))
    made = [weakref.ref(stop_texts((f"text {number}",))) for number in range(100)]
    assert sum(one() is not None for one in made) <= 16
