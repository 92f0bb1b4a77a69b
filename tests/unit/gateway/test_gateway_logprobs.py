"""Where tokens stand in a completion's text, whatever they are parts of."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from penstock.gateway.answer import Logprob
from penstock.gateway.http_door.logprobs import CompletionLogprobs


def known(token):
    return Logprob(1, -1.0, token, 1, ())


def test_a_special_token_takes_up_none_of_the_text_and_a_character_in_parts_begins_once():
    columns = CompletionLogprobs()
    face = "😀".encode()
    form = columns.prompt("Hi😀!", b"<s>", [known(t) for t in (b" Hi", face[:2], face[2:], b"!")])
    form = columns.output([known(b"\xed"), known(b"\x95\x9c"), known(b"x")], form)
    assert form["tokens"][:2] == ["<s>", " Hi"]
    assert form["token_logprobs"][:2] == [None, -1.0]
    assert form["text_offset"] == [0, 0, 2, 2, 3, 4, 4, 5]


@given(st.text(max_size=12), st.text(min_size=1, max_size=12), st.lists(st.integers(0, 40)), st.integers(0, 40))
def test_offsets_are_those_of_the_characters_that_tokens_begin(prompt, output, cuts, split):
    def tokens(text):
        content = text.encode()
        ends = sorted({0, len(content), *(c for c in cuts if c < len(content))})
        return [content[a:b] for a, b in itertools.pairwise(ends)]

    first, *rest = tokens(prompt) or [b""]
    columns = CompletionLogprobs()
    form = columns.prompt(prompt, first, [known(t) for t in rest])
    told = [known(t) for t in tokens(output)]
    later = columns.output(told[split:], columns.output(told[:split], form))
    at = 0
    whole = prompt + output
    for token, offset in zip([first, *rest, *(t.token for t in told)], later["text_offset"], strict=True):
        assert offset == len(whole.encode()[:at].decode(errors="ignore"))
        at += len(token)


def test_a_token_behind_one_that_breaks_off_begins_a_character_of_its_own():
    face = "😀".encode()
    tokens = [face[:1], b"ell", face[:3], face[:2], face[2:], b"\xff", b"\xe0", b"\x80", b"\xed", b"\xa1", b"."]
    text = b"".join(tokens).decode(errors="replace")
    assert text == "�ell�😀�����."
    offsets = [0, 1, 4, 5, 5, 6, 7, 8, 9, 10, 11]
    assert CompletionLogprobs().output([known(t) for t in tokens])["text_offset"] == offsets
    form = CompletionLogprobs().prompt(text, tokens[0], [known(t) for t in tokens[1:]])
    assert form["text_offset"] == offsets
