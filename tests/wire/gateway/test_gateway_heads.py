"""A request's head is bounded in bytes and in seconds, and the connections in number; others are answered meanwhile.

Where a body ends is the client's word alone, whatever else it asks for, and a body that can not be read spoils no other answer.
"""

import asyncio
import contextlib
import json
import re
import tracemalloc

import httpx
import pytest
from structlog.testing import capture_logs
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from penstock.gateway.http_door import connection
from penstock.gateway.http_door import server as http_server

MOST = 2048
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
RUNNING = {"model": "story", "prompt": "x", "max_tokens": 20, "stream": True}


def head(size, line=b"GET /health"):
    """A request's head of so many bytes."""
    bare = line + b" HTTP/1.1\r\nHost: x\r\nX-Fill: \r\n\r\n"
    return bare.replace(b"X-Fill: ", b"X-Fill: " + b"f" * (size - len(bare)))


def posted(path, body, *, size=None):
    """A whole request, with a head of so many bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    line = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n".encode()
    fill = b"" if size is None else b"X-Fill: " + b"f" * (size - len(line) - 12) + b"\r\n"
    return line + fill + b"\r\n" + content


class Raw:
    """A connection that sends bytes as they are."""

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, suite):
        raw = cls()
        raw.reader, raw.writer = await asyncio.open_connection(*suite.http.removeprefix("http://").split(":"))
        yield raw
        raw.writer.close()

    def send(self, *parts):
        for part in parts:
            self.writer.write(part)

    async def flood(self, part, times):
        """Whether so much was let in."""
        try:
            for _ in range(times):
                self.writer.write(part)
                await self.writer.drain()
        except ConnectionError:
            return False
        return True

    async def answer(self):
        """The status and the body of the next response."""
        self.top = top = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"(?i)content-length: (\d+)", top)
        if length is not None:
            return int(top.split()[1]), await self.reader.readexactly(int(length[1]))
        body = await self.reader.readuntil(b"\r\n0\r\n\r\n")
        return int(top.split()[1]), body

    async def ended(self):
        """Whether nothing follows but the end."""
        return await self.reader.read() == b""

    async def refusal(self):
        """The status, type and code of an answer after which the connection ends."""
        status, body = await self.answer()
        assert await self.ended()
        assert re.search(r"(?i)\nx-request-id: \S", self.top)
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return status, error["type"], error["code"]


BROKEN = (400, "invalid_request_error", "invalid_request")
TOO_LARGE = (431, "invalid_request_error", "request_head_too_large")
TOO_SLOW = (408, "invalid_request_error", "request_head_timeout")
TOO_MANY = (429, "rate_limit_error", "overloaded")


NO_REQUESTS = [
    b"GARBAGE\r\n\r\n",
    b"FOO / HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: abc\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
]


@pytest.mark.parametrize("sent", NO_REQUESTS)
async def test_what_is_no_request_is_refused_in_the_shape_of_all_errors(suite_with, sent):
    async with suite_with() as suite, Raw.to(suite) as raw:
        await raw.flood(sent, 1)
        assert await raw.refusal() == BROKEN


@pytest.mark.parametrize("piece", [1, 700, 1 << 20])
async def test_a_head_is_bounded_to_the_byte_however_it_comes(suite_with, piece):
    async with suite_with(max_head_bytes=MOST) as suite:
        for size in (MOST, MOST + 1):
            async with Raw.to(suite) as raw:
                sent = head(size)
                for at in range(0, size, piece):
                    await raw.flood(sent[at : at + piece], 1)
                if size == MOST:
                    assert (await raw.answer())[0] == 200
                else:
                    assert await raw.refusal() == TOO_LARGE


GIANTS = {
    "url": (b"GET /", b"u" * (1 << 20)),
    "header": (b"GET /health HTTP/1.1\r\nX: ", b"h" * (1 << 20)),
    "header's name": (b"GET /health HTTP/1.1\r\n", b"n" * (1 << 20)),
    "headers": (b"GET /health HTTP/1.1\r\n", b"a:b\r\n" * (1 << 18)),
    "large headers": (b"GET /health HTTP/1.1\r\n", (b"a: " + b"h" * 8000 + b"\r\n") * 128),
    "header behind a request": (HEALTH + b"GET /health HTTP/1.1\r\nX: ", b"h" * (1 << 20)),
}


@pytest.mark.parametrize("giant", GIANTS)
async def test_a_giant_head_takes_no_memory_and_others_are_answered_throughout(suite, giant):
    first, rest = GIANTS[giant]
    async with Raw.to(suite) as raw, httpx.AsyncClient(base_url=suite.http) as client:
        raw.send(first)
        assert (await client.get("/health")).status_code == 200
        tracemalloc.start()
        flood = asyncio.create_task(raw.flood(rest, 16))
        if giant == "header behind a request":
            assert (await raw.answer())[0] == 200
        assert await raw.refusal() == TOO_LARGE
        assert (await client.get("/health")).status_code == 200
        assert await flood  # and is thrown away
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # One part on its way from this client, one read of it in the gateway, and what is held of a head.
    assert taken < 4 << 20
    await suite.rest()


async def test_a_client_that_sends_all_before_it_reads_sees_the_refusal(suite):
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.get("/health", headers={"x": "h" * (8 << 20)})
        assert (reply.status_code, reply.json()["error"]["code"]) == (431, "request_head_too_large")
        assert (await client.get("/health")).status_code == 200


async def test_many_small_headers_are_refused_and_a_usual_number_is_not(suite):
    async with httpx.AsyncClient(base_url=suite.http) as client:
        for count, status in ((200, 200), (300, 431)):
            reply = await client.get("/health", headers=[(f"x-{i}", "v") for i in range(count)])
            assert reply.status_code == status


@pytest.mark.parametrize("part", [b"G", b"GET /health HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\nX: y", HEALTH + b"GET /"])
async def test_a_head_that_does_not_come_to_its_end_is_refused_in_time(suite_with, part):
    async with suite_with(head_seconds=0.1) as suite, Raw.to(suite) as raw:
        raw.send(part)
        if part.startswith(HEALTH):
            assert (await raw.answer())[0] == 200
        assert await raw.refusal() == TOO_SLOW


async def test_a_head_that_comes_on_and_on_is_refused_in_time_too(suite_with):
    async with suite_with(head_seconds=0.1) as suite, Raw.to(suite) as raw:
        raw.send(b"GET /health HTTP/1.1\r\nX: ")
        answer = asyncio.create_task(raw.refusal())
        while not answer.done():
            await raw.flood(b"h", 1)
            await asyncio.sleep(0.001)
        assert await answer == TOO_SLOW


@pytest.mark.parametrize("part", [b"", HEALTH])
async def test_an_idle_connection_is_closed_in_time_before_and_after_a_request(suite_with, monkeypatch, part):
    monkeypatch.setattr(http_server, "_KEEP_ALIVE_SECONDS", 0.1)
    async with suite_with() as suite, Raw.to(suite) as raw:
        raw.send(part)
        if part == HEALTH:
            assert (await raw.answer())[0] == 200
        assert await raw.ended()


async def test_empty_lines_do_not_keep_a_connection(suite_with, monkeypatch):
    monkeypatch.setattr(http_server, "_KEEP_ALIVE_SECONDS", 0.1)
    async with suite_with() as suite, Raw.to(suite) as raw:
        ended = asyncio.create_task(raw.ended())
        while not ended.done():
            await raw.flood(b"\r\n", 1)
            await asyncio.sleep(0.001)
        with contextlib.suppress(ConnectionError):  # a line that crossed the end
            assert await ended


async def test_requests_on_one_connection_have_a_bound_each(suite_with):
    async with suite_with(max_head_bytes=MOST) as suite, Raw.to(suite) as raw:
        body = {"model": "story", "prompt": "x"}
        for _ in range(5):
            raw.send(posted("/tokenize", body, size=MOST))
            assert (await raw.answer())[0] == 200
        raw.send(b"".join(posted("/tokenize", body, size=MOST - i) + b"\r\n" for i in range(20)))
        for _ in range(20):
            assert (await raw.answer())[0] == 200


async def test_a_body_is_no_part_of_the_head_in_bytes_or_in_seconds(suite_with):
    body = json.dumps({"model": "story", "prompt": "x"}).encode() + b" " * 500_000
    async with suite_with(max_head_bytes=MOST, head_seconds=0.1) as suite, Raw.to(suite) as raw, Raw.to(suite) as clock:
        sent = posted("/tokenize", body, size=MOST)
        raw.send(sent[:-250_000])
        await suite.eventually(lambda: suite.gateway.counts()["calls"] == 1)
        clock.send(b"G")
        assert await clock.refusal() == TOO_SLOW  # so long has the body been on its way
        raw.send(sent[-250_000:])
        assert (await raw.answer())[0] == 200
        async with httpx.AsyncClient(base_url=suite.http) as client:

            async def chunks():
                for at in range(0, len(body), 100):
                    yield body[at : at + 100]

            assert (await client.post("/tokenize", content=chunks())).status_code == 200


@pytest.mark.parametrize(("behind", "refusal"), [(head(MOST * 3), TOO_LARGE), (b"G", TOO_SLOW)])
async def test_a_refusal_waits_for_the_answer_to_the_request_before(suite_with, behind, refusal):
    async with suite_with(max_head_bytes=MOST, head_seconds=0.1) as suite, Raw.to(suite) as raw, Raw.to(suite) as clock:
        suite.executors[0].gate.clear()
        raw.send(posted("/v1/completions", RUNNING), behind)
        await suite.executors[0].started.wait()
        clock.send(b"G")
        assert await clock.refusal() == TOO_SLOW
        suite.executors[0].gate.set()
        status, body = await raw.answer()
        assert status == 200
        assert body.rstrip().endswith(b"data: [DONE]\n\n\r\n0")
        assert await raw.refusal() == refusal
        await suite.rest()


@pytest.mark.parametrize("rest", [HEALTH[9:], b""])
async def test_time_in_which_the_gateway_reads_nothing_is_not_the_clients(suite_with, rest):
    async with suite_with(head_seconds=0.1) as suite, Raw.to(suite) as raw, Raw.to(suite) as clock:
        suite.executors[0].gate.clear()
        body = {"model": "story", "prompt": "x", "max_tokens": 20}
        raw.send(posted("/v1/completions", body))
        await suite.executors[0].started.wait()
        raw.send(posted("/v1/completions", body) + HEALTH[:9])
        served = suite.gateway._http._server.server_state.connections
        await suite.eventually(lambda: any(c.pipeline and c.flow.read_paused for c in served))
        raw.send(rest)
        clock.send(b"G")
        assert await clock.refusal() == TOO_SLOW
        suite.executors[0].gate.set()
        for _ in range(2):
            assert (await raw.answer())[0] == 200
        if rest:
            assert (await raw.answer())[0] == 200
        else:
            assert await raw.refusal() == TOO_SLOW


async def test_a_client_that_leaves_with_a_request_behind_another_gives_everything_back(suite_with):
    async with suite_with(sse_keepalive_seconds=0.02) as suite:
        async with Raw.to(suite) as raw:
            suite.executors[0].gate.clear()
            raw.send(posted("/v1/completions", RUNNING))
            await suite.executors[0].started.wait()
            raw.send(posted("/v1/completions", RUNNING))
            served = suite.gateway._http._server.server_state.connections
            await suite.eventually(lambda: any(c.pipeline for c in served))
            raw.writer.transport.abort()
        await suite.rest()
        assert not suite.executors[0].gate.is_set()  # nobody has told an end: it was cancelled


async def test_requests_that_wait_on_one_connection_are_bounded(suite):
    async with Raw.to(suite) as raw:
        raw.send(HEALTH * 1000)
        answered = 0
        while (answer := await raw.answer())[0] == 200:
            answered += 1
        assert answer[0] == 429
        assert 100 <= answered <= 200
        assert await raw.ended()


async def test_connections_are_bounded_and_each_that_ends_makes_room(suite_with):
    async with suite_with(max_http_connections=3) as suite, contextlib.AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(Raw.to(suite)) for _ in range(3)]
        for raw in opened:
            raw.send(HEALTH)
            assert (await raw.answer())[0] == 200
        async with Raw.to(suite) as raw:
            assert await raw.refusal() == TOO_MANY
        for raw in opened:
            raw.send(HEALTH)
            assert (await raw.answer())[0] == 200
        opened[0].writer.write_eof()
        assert await opened[0].ended()
        async with httpx.AsyncClient(base_url=suite.http) as client:
            assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("trailers", [b"x: " + b"t" * (1 << 20), b"a:b\r\n" * (1 << 18)])
async def test_trailers_are_bounded_as_heads_are(suite, trailers):
    body = b'{"model": "story", "prompt": "x"}'
    async with Raw.to(suite) as raw:
        raw.send(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        raw.send(b"%x\r\n" % len(body), body, b"\r\n0\r\n")
        await suite.eventually(lambda: suite.gateway.counts()["calls"] == 1)
        await raw.flood(trailers, 1)
        assert await raw.refusal() == BROKEN
        await suite.rest()


async def test_a_body_that_nobody_reads_has_to_end_some_time(suite, monkeypatch):
    monkeypatch.setattr(connection, "DISCARD_SECONDS", 0.1)
    async with Raw.to(suite) as raw:
        raw.send(b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        assert (await raw.answer())[0] == 200
        assert await raw.ended()


# As Java's own client asks for HTTP/2 over plain HTTP, unless it is told not to.
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\n"
WEBSOCKET = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)
PROMPT = json.dumps({"model": "story", "prompt": "x" * 50}).encode()
IN_CHUNKS = b"%x\r\n%b\r\n0\r\nX-Trailer: x\r\n\r\n" % (len(PROMPT), PROMPT)
UPGRADING = {
    "by length": (b"POST /tokenize HTTP/1.1\r\nHost: x\r\n" + H2C + b"Content-Length: %d\r\n\r\n" % len(PROMPT), PROMPT),
    "in chunks": (b"POST /tokenize HTTP/1.1\r\nHost: x\r\n" + H2C + b"Transfer-Encoding: chunked\r\n\r\n", IN_CHUNKS),
}


def warned(caplog):
    """What uvicorn has logged."""
    return [record.message for record in caplog.records if record.name.startswith("uvicorn")]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("body", UPGRADING)
async def test_a_request_that_asks_for_an_upgrade_is_answered_without_it(suite, caplog, body, later):
    first, rest = UPGRADING[body]
    async with Raw.to(suite) as raw:
        for _ in range(2):
            raw.send(first if later else first + rest)
            if later:
                await suite.eventually(lambda: suite.gateway.counts()["calls"] == 1)
                raw.send(rest)
            status, answer = await raw.answer()
            assert (status, json.loads(answer)["count"]) == (200, 50)
        raw.send(HEALTH)
        assert (await raw.answer())[0] == 200
    assert not warned(caplog)
    await suite.rest()


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
async def test_upgrades_are_ignored_among_other_requests_however_they_come(suite, caplog, piece):
    websocket = b"GET /health HTTP/1.1\r\nHost: x\r\n" + WEBSOCKET + b"\r\n"
    sent = b"".join([HEALTH, *UPGRADING["by length"], websocket, *UPGRADING["in chunks"], HEALTH])
    async with Raw.to(suite) as raw:
        raw.send(HEALTH)
        assert (await raw.answer())[0] == 200
        (served,) = suite.gateway._http._server.server_state.connections
        for at in range(0, len(sent), piece):
            served.data_received(sent[at : at + piece])
        counts = [json.loads(body).get("count") for _, body in [await raw.answer() for _ in range(5)]]
        assert counts == [None, 50, None, 50, None]
    assert not warned(caplog)


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
async def test_an_upgrade_is_ignored_on_a_connection_that_is_to_end(suite, version):
    body = b"Connection: Upgrade, close\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(PROMPT) + PROMPT
    async with Raw.to(suite) as raw:
        raw.send(b"POST /tokenize " + version + b"\r\nHost: x\r\n" + body + HEALTH)
        status, answer = await raw.answer()
        assert (status, json.loads(answer)["count"]) == (200, 50)
        assert await raw.ended()


async def test_what_asks_for_an_upgrade_is_bounded_as_all_is(suite_with):
    async with suite_with(max_head_bytes=MOST, max_body_bytes=1 << 16) as suite:
        for size in (MOST, MOST + 1):
            async with Raw.to(suite) as raw:
                raw.send(head(size - len(H2C)).replace(b"\r\n\r\n", b"\r\n" + H2C + b"\r\n"))
                if size == MOST:
                    assert (await raw.answer())[0] == 200
                else:
                    assert await raw.refusal() == TOO_LARGE
        async with Raw.to(suite) as raw:
            raw.send(UPGRADING["in chunks"][0], b"20000\r\n", b" " * 0x20000, b"\r\n0\r\n\r\n")
            assert (await raw.answer())[0] == 413
            assert await raw.ended()
        async with Raw.to(suite) as raw:
            raw.send(UPGRADING["in chunks"][0], b"0\r\n", b"a:b\r\n" * MOST)
            assert await raw.refusal() == BROKEN
        await suite.rest()


async def test_a_websocket_is_asked_for_in_vain(suite, caplog):
    async with Raw.to(suite) as raw:
        for _ in range(2):
            raw.send(b"GET / HTTP/1.1\r\nHost: x\r\n" + WEBSOCKET + b"\r\n")
            status, body = await raw.answer()
            assert (status, json.loads(body)["error"]["code"]) == (404, "not_found")
    assert not warned(caplog)


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: broken\r\nTransfer-Encoding: chunked\r\n\r\n"
NO_BODIES = {"no chunk": b"zz\r\n", "trailers without end": b"0\r\n" + b"a:b\r\n" * MOST}


def told(answer):
    """The text of an answer that was streamed to its end."""
    events = [line.removeprefix(b"data: ") for line in answer.splitlines() if line.startswith(b"data: ")]
    assert events.pop() == b"[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def refused(logs):
    """The log lines of connections that were refused."""
    return [line for line in logs if line["event"] == "connection refused"]


@pytest.mark.parametrize("body", NO_BODIES)
@pytest.mark.parametrize("comes", ["at once", "while the answer runs", "behind a head that waits"])
async def test_a_body_that_can_not_be_read_spoils_no_answer_before_it(suite_with, caplog, comes, body):
    bad = NO_BODIES[body]
    running = posted("/v1/completions", RUNNING)
    async with suite_with(max_head_bytes=MOST) as suite:
        served = suite.gateway._http._server.server_state.connections
        suite.executors[0].hold_after = 3
        with capture_logs() as logs:
            async with Raw.to(suite) as raw, Raw.to(suite) as other:
                raw.send(running + HEALTH + CHUNKED + bad if comes == "at once" else running)
                await suite.eventually(lambda: not suite.executors[0].gate.is_set())
                if comes == "while the answer runs":
                    raw.send(HEALTH + CHUNKED + bad)
                elif comes == "behind a head that waits":
                    raw.send(HEALTH + CHUNKED)
                    await suite.eventually(lambda: any(len(c.pipeline) == 2 for c in served))
                    raw.send(bad)
                if comes != "behind a head that waits":
                    await suite.eventually(lambda: refused(logs) or warned(caplog))
                suite.executors[0].gate.set()
                status, answer = await raw.answer()
                other.send(running)
                assert (status, told(answer)) == (200, told((await other.answer())[1]))
                assert (await raw.answer())[0] == 200
                assert await raw.refusal() == BROKEN
                assert "x-request-id: broken\r\n" in raw.top
                peer = "{}:{}".format(*raw.writer.get_extra_info("sockname"))
        (line,) = refused(logs)
        assert (line["peer"], line["status"], line["request_id"]) == (peer, 400, "broken")
        assert not warned(caplog)
        await suite.rest()


async def test_a_body_that_can_not_be_read_is_the_end_of_a_connection_that_has_its_answer(suite_with, caplog):
    async with suite_with(max_body_bytes=1 << 16) as suite:
        for path, sent, status in ((b"/nope", b"", 404), (b"/v1/completions", b"20000\r\n" + b" " * 0x20000, 413)):
            with capture_logs() as logs:
                async with Raw.to(suite) as raw:
                    raw.send(CHUNKED.replace(b"/v1/completions", path), sent)
                    assert (await raw.answer())[0] == status
                    raw.send(b"\r\nzz\r\n" if sent else b"zz\r\n")
                    assert await raw.ended()
            assert len(refused(logs)) == 1
        assert not warned(caplog)
        await suite.rest()


@pytest.mark.parametrize("expecting", [b"", b"Expect: 100-continue\r\n"])
@pytest.mark.parametrize("path", [b"/v1/completions", b"/tokenize", b"/health"])
async def test_a_body_that_can_not_be_read_is_answered_by_one_refusal(suite, caplog, path, expecting):
    first = CHUNKED.replace(b"/v1/completions", path).replace(b"X-", expecting + b"X-")
    with capture_logs() as logs:
        async with Raw.to(suite) as raw:
            raw.send(first + b"1\r\n{\r\nzz\r\n")
            assert await raw.refusal() == BROKEN
        async with Raw.to(suite) as raw:
            if path != b"/health":
                raw.send(first + b"1\r\n{\r\n")
                await suite.eventually(lambda: suite.gateway.counts()["calls"] == 1)
                if expecting:
                    await raw.reader.readuntil(b"100 Continue\r\n\r\n")
                raw.send(b"zz\r\n")
                assert await raw.refusal() == BROKEN
        await suite.rest()
    assert {line["log_level"] for line in logs} <= {"info", "debug"}
    assert not warned(caplog)


def test_uvicorn_still_has_what_the_bounds_stand_on():
    ours = {name for name, value in vars(connection.BoundedConnection).items() if callable(value) and not name.startswith("_")}
    assert ours <= set(vars(HttpToolsProtocol))
    used = {"_start_asgi_task", "_unset_keepalive_if_required", "timeout_keep_alive_handler"}
    assert used <= set(vars(HttpToolsProtocol))
    for attribute in (
        "connections",
        "cycle",
        "flow",
        "headers",
        "loop",
        "parser",
        "pipeline",
        "server_state",
        "timeout_keep_alive_task",
    ):
        assert attribute in HttpToolsProtocol.__init__.__code__.co_names
    for attribute in ("disconnected", "keep_alive", "message_event", "response_started", "waiting_for_100_continue"):
        assert attribute in RequestResponseCycle.__init__.__code__.co_names
