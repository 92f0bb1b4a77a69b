"""The built-in model's checkable answers through both doors, streamed and not, are the same right text."""

import json

import pytest
from openai import BadRequestError, OpenAI
from suite import Suite

from penstock.client import Client, FinishReason, InvalidRequest, Message
from penstock.common.sources import BUILTIN_FOLDER

ANSWERS = json.loads((BUILTIN_FOLDER / "answers.json").read_text())
COMPLETIONS = [a for a in ANSWERS if "prompt" in a]
CHATS = [a for a in ANSWERS if "messages" in a]
REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


@pytest.fixture(scope="module")
def suite():
    with Suite("builtin", "--dtype", "f32") as running:
        yield running


@pytest.fixture(scope="module")
def openai(suite):
    with OpenAI(base_url=f"http://{suite.http}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def client(suite):
    with Client(suite.grpc) as client:
        yield client


def names(answers):
    return [a["name"] for a in answers]


def ask_grpc(client, answer):
    options = {"max_tokens": answer["max_tokens"], "token_ids": True, "logprobs": 2}
    if "prompt" in answer:
        return client.generate(answer["prompt"], **options)
    return client.chat([Message(**m) for m in answer["messages"]], **options)


@pytest.mark.parametrize("answer", ANSWERS, ids=names(ANSWERS))
def test_over_grpc(client, answer):
    events = list(ask_grpc(client, answer))
    whole = ask_grpc(client, answer).result()
    assert "".join(event.text for event in events) == whole.text == answer["text"]
    assert [i for event in events for i in event.token_ids] == list(whole.choices[0].token_ids)
    assert whole.choices[0].finish.reason is REASONS[answer["finish"]]
    usage = whole.closing.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (answer["prompt_tokens"], len(whole.choices[0].token_ids))
    assert len(whole.choices[0].logprobs) == usage.completion_tokens


@pytest.mark.parametrize("answer", COMPLETIONS, ids=names(COMPLETIONS))
def test_completions_over_http(openai, client, answer):
    request = {"model": "builtin", "prompt": answer["prompt"], "max_tokens": answer["max_tokens"], "logprobs": 2}
    whole = openai.completions.create(**request)
    choice = whole.choices[0]
    assert (choice.text, choice.finish_reason) == (answer["text"], answer["finish"])
    chunks = list(openai.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == answer["text"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], whole.usage.completion_tokens)
    assert whole.usage.prompt_tokens == answer["prompt_tokens"]
    other_door = ask_grpc(client, answer).result().choices[0].logprobs
    assert choice.logprobs.token_logprobs == pytest.approx([p.logprob for p in other_door], abs=1e-4)


@pytest.mark.parametrize("answer", CHATS, ids=names(CHATS))
def test_chats_over_http(openai, answer):
    request = {"model": "builtin", "messages": answer["messages"], "max_tokens": answer["max_tokens"]}
    whole = openai.chat.completions.create(**request)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (answer["text"], answer["finish"])
    chunks = list(openai.chat.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer["text"]
    assert chunks[-1].choices[0].finish_reason == answer["finish"]
    assert whole.usage.prompt_tokens == answer["prompt_tokens"]


def test_prompts_as_lists_of_texts_and_of_ids(openai):
    texts = [a["prompt"] for a in COMPLETIONS[:3]]
    told = {"model": "builtin", "max_tokens": 6, "extra_body": {"return_token_ids": True, "ignore_eos": True}}
    apart = [openai.completions.create(prompt=text, **told).choices[0] for text in texts]
    together = openai.completions.create(prompt=texts, **told).choices
    assert [(c.index, c.text, c.token_ids) for c in together] == [(i, c.text, c.token_ids) for i, c in enumerate(apart)]
    by_ids = openai.completions.create(prompt=[c.prompt_token_ids for c in apart], **told).choices
    assert [c.text for c in by_ids] == [c.text for c in apart]
    assert openai.completions.create(prompt=apart[0].prompt_token_ids, **told).choices[0].text == apart[0].text


@pytest.mark.parametrize("answer", CHATS, ids=names(CHATS))
def test_an_answer_that_was_begun_is_gone_on_with(openai, client, answer):
    half = max(answer["text"].find(" ", len(answer["text"]) // 2), 1)  # where a token ends, as in the answer itself
    begun, rest = answer["text"][:half], answer["text"][half:]
    messages = [*answer["messages"], {"role": "assistant", "content": begun}]
    over_grpc = client.chat(messages, max_tokens=answer["max_tokens"], continue_final_message=True).result()
    over_http = openai.chat.completions.create(
        model="builtin",
        messages=messages,
        max_tokens=answer["max_tokens"],
        # As vLLM asks for it; here the second may be left out.
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    assert over_grpc.text == over_http.choices[0].message.content == rest


def test_an_answer_is_not_begun_and_gone_on_with_at_once(openai, client):
    messages = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
    with pytest.raises(InvalidRequest, match=r"^conversation\.continue_final_message: can not stand with add_generation_prompt"):
        client.chat(messages, continue_final_message=True, add_generation_prompt=True).result()
    with pytest.raises(BadRequestError, match="continue_final_message: can not stand with add_generation_prompt") as caught:
        openai.chat.completions.create(
            model="builtin", messages=messages, extra_body={"continue_final_message": True, "add_generation_prompt": True}
        )
    assert caught.value.param == "continue_final_message"


def test_a_conversation_is_counted_as_it_would_be_rendered(client):
    messages = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
    opened, closed, continued = (
        client.count_tokens(messages, **rendering).count
        for rendering in ({}, {"add_generation_prompt": False}, {"continue_final_message": True})
    )
    assert opened > closed > continued
    with pytest.raises(InvalidRequest, match=r"^conversation\.chat_template_kwargs: 'enable_thinking' is nothing that"):
        client.count_tokens(messages, chat_template_kwargs={"enable_thinking": False})


def test_the_seed_that_was_drawn_gives_the_same_answer_again(openai, client):
    """As a client reads it whose numbers are doubles, such as JavaScript's."""
    options = {"max_tokens": 24, "temperature": 2.0}
    drawn = [client.generate("Once", **options).result() for _ in range(4)]
    assert len({answer.text for answer in drawn}) == len(drawn)
    for answer in drawn:
        read = int(float(answer.closing.seed))
        assert client.generate("Once", seed=read, **options).result().text == answer.text
    over_http = openai.completions.create(model="builtin", prompt="Once", **options)
    read = int(float(over_http.closings[0]["seed"]))
    assert client.generate("Once", seed=read, **options).result().text == over_http.choices[0].text
