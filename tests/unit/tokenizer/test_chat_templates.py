"""Chat templates: the text that transformers renders, within hard limits."""

import asyncio
import contextlib
import os

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from penstock.common.errors import InvalidRequest
from penstock.tokenizer.continuation import cut, marked
from penstock.tokenizer.templates import TemplateError, TemplateLimits, Templates

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LLAMA_2 = "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
LLAMA_3 = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
MISTRAL = "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content'] %}\n    {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n{%- endif %}\n{{- bos_token }}\n{%- for message in loop_messages %}\n    {%- if message['role'] == 'user' %}\n        {%- if loop.last and system_message is defined %}\n            {{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}\n        {%- else %}\n            {{- '[INST] ' + message['content'] + '[/INST]' }}\n        {%- endif %}\n    {%- elif message['role'] == 'assistant' %}\n        {{- ' ' + message['content'] + eos_token}}\n    {%- else %}\n        {{- raise_exception('Only user and assistant roles are supported, with the exception of an initial optional system message!') }}\n    {%- endif %}\n{%- endfor %}\n"
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' + (tools | tojson) }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.last_query_index = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "system" and loop.first %}{%- continue %}{%- endif %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
ODDS = """{{ strftime_now('%Y') }} {{ {'a': '<b>&', 'é': [1, none]} | tojson(indent=2) }}
  {% for m in messages %}
{% generation %}{{ m.content | upper }}{% endgeneration %}

    {% endfor %}
{{ messages | tojson }}{% if documents is none %}no documents{% endif %}"""

CONVERSATIONS = [
    [{"role": "user", "content": "  안녕 <b>&amp; 'quoted'\n"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>hm</think>\n\nHello."},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}", "name": "Ada"},
    ],
]
LIMITS = TemplateLimits(seconds=0.1, memory_bytes=256 << 20, output_characters=1_000_000, workers=2)


@contextlib.asynccontextmanager
async def _templates(source, limits=LIMITS):
    templates = Templates(source, SPECIAL, limits)
    try:
        await templates.start()
        yield templates
    finally:
        await templates.close()


@pytest.mark.parametrize(
    "source", [CHATML, LLAMA_2, LLAMA_3, MISTRAL, QWEN, ODDS], ids=["chatml", "llama2", "llama3", "mistral", "qwen", "odds"]
)
async def test_renders_what_transformers_renders(source):
    async with _templates(source) as templates:
        for messages in CONVERSATIONS:
            for generation in (False, True):
                (expected,), _ = render_jinja_template(
                    [messages], chat_template=source, add_generation_prompt=generation, **SPECIAL
                )
                assert await templates.render(messages, add_generation_prompt=generation) == expected


@pytest.mark.parametrize("given", [{"enable_thinking": False}, {"enable_thinking": True}, {"enable_thinking": None}])
async def test_a_template_reads_what_is_given_beside_the_messages(given):
    (expected,), _ = render_jinja_template([CONVERSATIONS[1]], chat_template=QWEN, add_generation_prompt=True, **given, **SPECIAL)
    async with _templates(QWEN) as templates:
        text = await templates.render(CONVERSATIONS[1], add_generation_prompt=True, chat_template_kwargs=given)
        assert text == expected
        assert text.endswith("</think>\n\n") == (given["enable_thinking"] is False)


@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "add_generation_prompt", "tools", "bos_token", "ns", "range", ""])
async def test_what_a_template_does_not_read_of_a_request_is_refused(name):
    source = (
        "{% set ns = range(3) %}{{ bos_token }}{{ messages }}{{ tools }}{{ ns }}{% if enable_thinking is defined %}hm{% endif %}"
    )
    async with _templates(source) as templates:
        refusal = rf"^chat_template_kwargs: '{name}' is nothing that .* reads of a request; it reads enable_thinking$"
        with pytest.raises(InvalidRequest, match=refusal):
            await templates.render(CONVERSATIONS[0], add_generation_prompt=True, chat_template_kwargs={name: []})
    async with _templates(CHATML) as templates:
        with pytest.raises(InvalidRequest, match="it reads nothing but the conversation"):
            await templates.render(CONVERSATIONS[0], add_generation_prompt=True, chat_template_kwargs={name: []})


# The last stands in what closes a message, or in what opens an answer.
@pytest.mark.parametrize("said", ["It is", "It is ", "\n  Well:\n", "m", "end", "assistant"])
@pytest.mark.parametrize("source", [CHATML, LLAMA_2, LLAMA_3, MISTRAL, QWEN], ids=["chatml", "llama2", "llama3", "mistral", "qwen"])
async def test_a_conversation_ends_within_its_last_message_where_it_ends_in_transformers(source, said):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
    (expected,), _ = render_jinja_template([messages], chat_template=source, continue_final_message=True, **SPECIAL)
    open_ended, mark = marked(messages)
    async with _templates(source) as templates:
        assert cut(await templates.render(open_ended, add_generation_prompt=False), mark, said) == expected


async def test_a_message_that_can_not_be_gone_on_with_is_refused():
    for nothing in ("", " \n"):
        with pytest.raises(InvalidRequest, match=r"^messages: the last one has no text"):
            marked([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": nothing}])
    open_ended, mark = marked([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is"}])
    async with _templates("{{ messages[0].content }}") as templates:
        with pytest.raises(InvalidRequest, match=r"^continue_final_message: .* leaves the end of the last message out"):
            cut(await templates.render(open_ended, add_generation_prompt=False), mark, "It is")


@pytest.mark.parametrize("said", ["<think>hm</think>", "<think>hm</think>\n\nIt is"])
async def test_a_message_of_which_the_template_takes_away_is_refused_as_in_transformers(said):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
    with pytest.raises(ValueError, match="does not appear in the chat"):
        render_jinja_template([messages], chat_template=QWEN, continue_final_message=True, **SPECIAL)
    open_ended, mark = marked(messages)
    async with _templates(QWEN) as templates:
        with pytest.raises(InvalidRequest, match=r"^continue_final_message: .* does not keep the last message as it is"):
            cut(await templates.render(open_ended, add_generation_prompt=False), mark, said)


async def test_tells_why_a_template_refuses():
    async with _templates(LLAMA_2) as templates:
        with pytest.raises(InvalidRequest, match=r"^messages: .*roles must alternate"):
            await templates.render([{"role": "assistant", "content": "me first"}], add_generation_prompt=True)


# Each costs nothing where the user says "fine".
EVIL = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "huge range": "{% for i in range(10**9) %}{% endfor %}",
    "huge text": "{{ messages[0].content * 10**9 }}",
    "doubling": "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "huge number": "{{ 10 ** (10 ** (messages|length * 9)) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "much output": "{% for a in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "way out": "{{ messages.__class__.__mro__[1] }}",
    "long filters": "{% for a in range(99999) %}{{ (messages[0].content * 10**6) | upper | length }}{% endfor %}",
}


@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL)
async def test_a_template_without_end_or_measure_is_ended_and_harms_no_other_rendering(evil):
    source = "{% if messages[0].content == 'fine' %}ok{% else %}" + evil + "{% endif %}"
    async with _templates(source) as templates:
        bad = asyncio.create_task(templates.render([{"role": "user", "content": "go"}], add_generation_prompt=False))
        assert await templates.render([{"role": "user", "content": "fine"}], add_generation_prompt=False) == "ok"
        with pytest.raises(InvalidRequest, match=r"^messages: "):
            await bad
        assert await templates.render([{"role": "user", "content": "fine"}], add_generation_prompt=False) == "ok"


@pytest.mark.parametrize("source", ["{{ messages.nothing.at_all }}", "{{ 1 / 0 }}"])
async def test_what_jinja_says_is_for_the_log_alone(source):
    async with _templates(source) as templates:
        with pytest.raises(InvalidRequest) as failure:
            await templates.render(CONVERSATIONS[0], add_generation_prompt=True)
        assert failure.value.violations[0].description == "the model's chat template can not render them"


@pytest.mark.parametrize(
    ("source", "reason"), [("{% for %}", "is wrong: TemplateSyntaxError"), ("{{ 10 ** (10 ** 9) }}", "within its limits")]
)
async def test_a_template_that_can_not_be_compiled_does_not_start(source, reason):
    with pytest.raises(TemplateError, match=reason):
        async with _templates(source):
            pass


async def test_a_rendering_that_nobody_awaits_leaves_no_process():
    async with _templates(EVIL["nested loops"], TemplateLimits(30, 256 << 20, 1000, 1)) as templates:
        pid = templates._idle[0]._process.pid
        task = asyncio.create_task(templates.render([{"role": "user", "content": "go"}], add_generation_prompt=False))
        while templates._idle:  # noqa: ASYNC110 - nothing tells when a worker is taken
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_worker_that_was_killed_while_idle_is_replaced():
    async with _templates(CHATML) as templates:
        process = templates._idle[0]._process
        process.kill()
        await process.wait()
        assert "hi" in await templates.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)
