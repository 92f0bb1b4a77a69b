"""What `penstock generate` and `chat` ask a server, and what they show of its answers."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fake_server import CLOSING

from penstock.cli.answers import Answering
from penstock.cli.app import app
from penstock.cli.bench.grpc_target import GrpcTarget
from penstock.cli.chat import chat
from penstock.cli.connection import Connection
from penstock.cli.generate import generate
from penstock.common.config import ConfigError
from penstock.common.service import StartError


@pytest.mark.parametrize("as_json", [False, True])
def test_a_conversation_has_the_models_own_answers(fake, monkeypatch, capsys, as_json):
    fake.script = [[{"text": "Hel"}, {"text": "lo."}, CLOSING], [{"text": "Bye."}, CLOSING]]
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nand then?\n"))
    assert chat(system="Be kind.", connection=Connection(target=fake.address), whole=as_json) == 0
    said = [[(m.role, m.content) for m in call.request.conversation.messages] for call in fake.calls]
    first = [("system", "Be kind."), ("user", "hi")]
    assert said == [first, [*first, ("assistant", "Hello."), ("user", "and then?")]]
    lines = capsys.readouterr().out.splitlines()
    assert ([json.loads(line)["text"] for line in lines] if as_json else lines) == ["Hello.", "Bye."]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_deadline_names_its_flag_and_leaves_what_came(fake, capsys, as_json):
    fake.script = [{"text": "one "}, {"text": "two"}, None]
    connection = Connection(target=fake.address, timeout=0.5)
    with pytest.raises(ConfigError, match=r"--timeout 0\.5: the answer was not whole within 0\.5 s"):
        generate("x", answering=Answering(max_tokens=9), connection=connection, whole=as_json)
    told = capsys.readouterr().out
    if as_json:
        answer = json.loads(told)
        assert (answer["text"], answer["finish"]) == ("one two", None)
        assert "Deadline Exceeded" in answer["error"]
    else:
        assert told == "one two\n"


def test_a_defect_of_the_server_is_told_with_what_its_logs_have_it_under(fake):
    fake.script = [RuntimeError("oops")]
    with pytest.raises(ConfigError, match=r"internal error.*; the services' logs have it under the request id [0-9a-f]{32}$"):
        generate("x", connection=Connection(target=fake.address))


def test_an_http_door_in_place_of_the_grpc_one_is_told_as_that():
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = f"127.0.0.1:{server.server_address[1]}"
        try:
            with pytest.raises(ConfigError, match=f"^{target}: what answers there is no gRPC door, perhaps the HTTP one; give the"):
                generate("x", connection=Connection(target=target, timeout=30))
            with pytest.raises(StartError, match="what answers there is no gRPC door"):
                GrpcTarget(target, model=None, prefix_cache=True, timeout=30)
        finally:
            server.shutdown()


def test_nobody_at_the_address_is_told_with_what_to_do():
    with pytest.raises(
        ConfigError, match=r"^127\.0\.0\.1:9: .*Connection refused.*is a model served there\? \(penstock up MODEL\)"
    ):
        generate("x", connection=Connection(target="127.0.0.1:9", timeout=30))


@pytest.mark.parametrize(
    ("piped", "asked"), [("Count\n", "Count"), ("Count\r\n", "Count"), ("Count", "Count"), ("a\n\nb \n\n", "a\n\nb \n")]
)
def test_a_piped_prompt_goes_without_the_newline_that_ends_it(fake, monkeypatch, piped, asked):
    fake.script = [CLOSING]
    monkeypatch.setattr("sys.stdin", io.StringIO(piped, newline=""))
    assert generate(connection=Connection(target=fake.address)) == 0
    assert fake.calls[0].request.prompt.text == asked


def test_help_shows_a_flag_of_one_value_as_that(capsys):
    with pytest.raises(SystemExit):
        app(["generate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--stop STR A text that ends the answer; once for each." in told
