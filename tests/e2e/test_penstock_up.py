"""`penstock up` and the client commands, as a user types them."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

PENSTOCK = [sys.executable, "-m", "penstock.cli"]


def penstock(*arguments, text=""):
    return subprocess.run([*PENSTOCK, *arguments], capture_output=True, text=True, input=text, check=False)


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    log = tmp_path_factory.mktemp("up") / "log"
    flags = ["--backend", "fake", "--workers", "2", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--served-name", "tiny"]
    with log.open("w") as stderr:
        process = subprocess.Popen([*PENSTOCK, "up", "builtin", *flags], stdout=subprocess.PIPE, stderr=stderr, text=True)
    ready = process.stdout.readline()
    assert re.fullmatch(r"ready http=127\.0\.0\.1:\d+ grpc=127\.0\.0\.1:\d+\n", ready), log.read_text()
    process.http, process.grpc = (word.split("=")[1] for word in ready.split()[1:])
    yield process
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate()
    assert process.returncode == 0, log.read_text()
    assert rest == ""
    assert psutil.wait_procs(children, timeout=30)[1] == []
    names = {told.get("process", told["service"]) for told in map(json.loads, log.read_text().splitlines())}
    assert names == {"up", "gateway", "tokenizer", "scheduler", "executor-0", "executor-1"}


def test_the_model_is_listed_with_every_executor(up):
    listed = json.loads(penstock("models", "--executors", "--json", "--target", up.grpc).stdout)
    assert [(model["name"], len(model["executors"])) for model in listed] == [("tiny", 2)]
    with urllib.request.urlopen(f"http://{up.http}/v1/models") as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["tiny"]


def test_an_answer_as_text_and_as_json_is_the_same(up):
    flags = ["Count from 1 to 3.", "--seed", "7", "--max-tokens", "12", "--target", f"grpc://{up.grpc}"]
    told = json.loads(penstock("generate", *flags, "--json").stdout)
    assert told["usage"]["completion_tokens"] == 12
    assert told["placements"][0]["backend"] == "fake"
    assert penstock("generate", *flags).stdout == told["text"] + "\n"


def test_a_conversation_line_by_line(up):
    done = penstock("chat", "--max-tokens", "3", "--seed", "1", "--json", "--target", up.grpc, text="hello\n\nand then?\n")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 2
    assert answers[1]["usage"]["prompt_tokens"] > answers[0]["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["generate", "x", "--top-p", "3"], "sampling.top_p"),
        (["generate", "x", "--max-tokens", "-1"], "stopping.max_tokens: must be a whole number from 0"),
        (["generate", "x", "--model", "other"], "other"),
        (["generate", "x", "--target", "127.0.0.1:1"], "127.0.0.1:1"),
        (["generate", "x", "--target", "http://127.0.0.1:1"], "--target"),
        (["generate", "x", "--target", "nonsense"], "--target: must be HOST:PORT"),
    ],
)
def test_a_refusal_is_one_line(up, arguments, why):
    done = penstock(*arguments, *([] if "--target" in arguments else ["--target", up.grpc]))
    assert done.returncode == 1
    assert done.stdout == ""
    assert why in done.stderr
    assert done.stderr.startswith("penstock: ")
    assert done.stderr.count("\n") == 1


def test_a_taken_port_is_told_before_the_model_is_looked_for(up):
    done = penstock("up", "no/such-model", "--http", up.http, "--grpc", "127.0.0.1:0")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"penstock: --http: can not listen on {up.http}: Address already in use\n"


def test_a_service_that_can_not_start_is_named(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("gateway: {default_deadline_seconds: -1}\n")
    flags = ["--backend", "fake", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--config", str(settings)]
    done = penstock("up", "builtin", *flags)
    assert done.returncode == 1
    assert done.stdout == ""
    told = [json.loads(line) for line in done.stderr.splitlines()]
    why = [line["why"] for line in told if (line["service"], line["event"]) == ("up", "failed")]
    assert len(why) == 1
    assert why[0].startswith("gateway can not start: ")
    assert "default_deadline_seconds is -1" in why[0]


def test_keys_that_can_not_be_read_are_told_before_anything_is_started(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("gateway: {http: '127.0.0.1:0', grpc: '127.0.0.1:0', api_keys: /none.yaml}\n")
    done = penstock("up", "builtin", "--backend", "fake", "--config", str(settings))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "penstock: api_keys: can not read /none.yaml: No such file or directory\n"


def test_each_service_has_metrics_and_those_that_a_section_names_are_where_it_puts_them(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("executor: {metrics: '127.0.0.2:0'}\n")
    flags = ["--backend", "fake", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--config", str(settings)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*PENSTOCK, "up", "builtin", *flags], stdout=subprocess.PIPE, stderr=log, text=True)
    with process:
        try:
            assert process.stdout.readline().startswith("ready ")
            told = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
            urls = {line["process"]: line["url"] for line in told if line["event"] == "metrics"}
            assert {name: urlsplit(url).hostname for name, url in urls.items()} == {
                "scheduler": "127.0.0.1",
                "tokenizer": "127.0.0.1",
                "executor": "127.0.0.2",
            }
            for url in urls.values():
                assert httpx.get(url).raise_for_status().text.startswith("# HELP")
        finally:
            process.send_signal(signal.SIGTERM)


def test_the_doors_are_where_the_gateways_section_puts_them(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("gateway: {http: '127.0.0.2:0', grpc: '127.0.0.3:0'}\n")
    command = [*PENSTOCK, "up", "builtin", "--backend", "fake", "--config", str(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert re.fullmatch(r"ready http=127\.0\.0\.2:\d+ grpc=127\.0\.0\.3:\d+\n", process.stdout.readline())
        finally:
            process.send_signal(signal.SIGTERM)
