"""Whatever the ids, whatever the frames: the streamed text is the text of decoding all ids at once."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from penstock.tokenizer.decoding import Decoding, Decodings
from penstock.tokenizer.detokenizers import PrefixDetokenizer, TableDetokenizer
from penstock.tokenizer.pieces import pieces_of

TABLES = ["byte_level", "llama", "gemma", "metaspace", "word_piece", "no_decoder"]
STREAMABLE = [*TABLES, "suffixed", "by_pattern"]

WORDS = st.sampled_from(
    [
        "안녕하세요",
        "한국어",
        "ᄒ",
        "ᅡ",
        "ᆫ",
        "👩‍👩‍👧‍👦",
        "👍🏽",
        "🇰🇷",
        "\u200d",
        "é",
        "e\u0301",
        "n\u0303",
        "the",
        " the",
        "  ",
        "\n",
        "\x00",
        "\ufffd",
        "two words",
        "<|end|>",
        "▁",
        "<0xE3>",
    ]
)
TEXTS = st.lists(WORDS | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join)


_PIECES = {}


def _pieces(tokenizer):
    if id(tokenizer) not in _PIECES:
        _PIECES[id(tokenizer)] = pieces_of(tokenizer)
    return _PIECES[id(tokenizer)]


def _detokenizer(tokenizer, *, skip):
    pieces = _pieces(tokenizer)
    if pieces is None:
        return PrefixDetokenizer(tokenizer, skip_special_tokens=skip)
    return TableDetokenizer(pieces, skip_special_tokens=skip)


def _streamed(tokenizer, ids, cuts, *, skip):
    decodings = Decodings()
    decodings.open(Decoding(7, _detokenizer(tokenizer, skip=skip)))
    told, start = [], 0
    for cut in [*sorted(cuts), len(ids)]:
        decodings.feed([7] * len(ids[start:cut]), ids[start:cut])
        told += decodings.take()
        start = max(start, cut)
    decodings.finish([7])
    return told + decodings.take(), decodings


@pytest.fixture(scope="session")
def decode(kinds):
    def check(kind, ids, cuts, *, skip):
        tokenizer = kinds[kind]()
        told, decodings = _streamed(tokenizer, ids, [c for c in cuts if c <= len(ids)], skip=skip)
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(one.text for one in told) == whole
        offset = 0
        for one in told:
            assert one.byte_offset == offset
            offset += len(one.text.encode())
        assert told[-1].tokens == len(ids)
        assert [one.last for one in told] == [False] * (len(told) - 1) + [True]
        assert len(decodings) == 0

    return check


CUTS = st.lists(st.integers(0, 40), max_size=6)


@pytest.mark.parametrize("kind", STREAMABLE)
@given(text=TEXTS, cuts=CUTS, skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_streams_any_text_to_what_decoding_it_at_once_gives(kinds, decode, kind, text, cuts, skip):
    decode(kind, kinds[kind]().encode(text, add_special_tokens=False).ids, cuts, skip=skip)


@pytest.mark.parametrize("kind", STREAMABLE)
@given(text=TEXTS, cut=st.integers(0, 40), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_goes_on_with_a_prompt_reads_as_in_one_text_with_it(kinds, kind, text, cut, skip):
    tokenizer = kinds[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    prompt, whole = tokenizer.decode(ids[:cut], skip_special_tokens=skip), tokenizer.decode(ids, skip_special_tokens=skip)
    # Else the prompt ends within a character, or its last token reads by the next.
    assume(whole.startswith(prompt) and not prompt.endswith("\ufffd"))
    detokenizer = _detokenizer(tokenizer, skip=skip)
    detokenizer.follow(ids[:cut][-16:])
    assert prompt + "".join(map(detokenizer.feed, ids[cut:])) + detokenizer.finish() == whole


@pytest.mark.parametrize(("kind", "begun"), [("llama", "the"), ("metaspace", "the"), ("gemma", " the"), ("byte_level", " the")])
def test_only_what_begins_a_text_loses_its_space(kinds, kind, begun):
    tokenizer = kinds[kind]()
    ids = tokenizer.encode(" the" if kind == "byte_level" else "the", add_special_tokens=False).ids
    alone, behind = _detokenizer(tokenizer, skip=True), _detokenizer(tokenizer, skip=True)
    behind.follow(tokenizer.encode("fox", add_special_tokens=False).ids)
    assert "".join(map(alone.feed, ids)) == begun
    assert "".join(map(behind.feed, ids)) == " the"


@pytest.mark.parametrize("kind", TABLES)
@given(data=st.data(), cuts=CUTS, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_streams_arbitrary_ids_unknown_ones_included_to_the_same_text(kinds, decode, kind, data, cuts, skip):
    size = kinds[kind]().get_vocab_size()
    decode(kind, data.draw(st.lists(st.integers(0, size + 3) | st.integers(0, min(260, size)), max_size=40)), cuts, skip=skip)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@given(octets=st.binary(max_size=24) | TEXTS.map(lambda text: text.encode()), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_byte_tokens_read_as_the_library_reads_them_valid_or_not(kinds, decode, kind, octets, skip):
    ids = [kinds[kind]().token_to_id(f"<0x{octet:02X}>") for octet in octets]
    decode(kind, ids, range(len(ids)), skip=skip)


@given(octets=st.binary(max_size=24))
@settings(max_examples=300, deadline=None)
def test_invalid_utf_8_of_byte_level_tokens_becomes_the_same_replacement_characters(kinds, decode, octets):
    tokenizer = kinds["byte_level"]()
    own = {raw: i for i, raw in enumerate(_pieces(tokenizer).raw) if len(raw) == 1}
    decode("byte_level", [own[bytes([octet])] for octet in octets], range(len(octets)), skip=False)


def test_holds_back_the_bytes_of_a_character_until_it_is_whole(kinds):
    tokenizer = kinds["byte_level"]()
    raw = pieces_of(tokenizer).raw
    ids = [raw.index(bytes([octet])) for octet in "한".encode()]
    detokenizer = _detokenizer(tokenizer, skip=False)
    assert [detokenizer.feed(i) for i in ids] == ["", "", "한"]


def test_tells_each_id_its_own_bytes(kinds):
    raw = pieces_of(kinds["llama"]()).raw
    tokenizer = kinds["llama"]()
    assert raw[tokenizer.token_to_id("<0xE3>")] == b"\xe3"
    assert raw[tokenizer.token_to_id("▁t")] == b" t"
    assert raw[tokenizer.token_to_id("안")] == "안".encode()


@pytest.mark.parametrize("kind", ["suffixed", "by_pattern"])
def test_leaves_decoders_that_no_table_stands_for_to_the_library(kinds, kind):
    assert pieces_of(kinds[kind]()) is None
