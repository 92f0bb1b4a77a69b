"""Flags over PENSTOCK_<COMMAND>_… over PENSTOCK_… over the file over defaults; a misspelt key is named with the nearest right one."""

import subprocess
import sys

import pytest
from cyclopts import CycloptsError

from penstock.cli.app import app
from penstock.common.config import ConfigError, read_file


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    import os

    for name in [name for name in os.environ if name.startswith("PENSTOCK_")]:
        monkeypatch.delenv(name)


def parse(*tokens):
    _, bound, _ = app.parse_args(list(tokens), exit_on_error=False, print_error=False)
    return bound.arguments.get("settings")


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_each_layer_lies_over_the_next(monkeypatch, file):
    path = file("max_queued_requests: 2\nlook-ahead: 3\nprefill_weight: 4\nlease_seconds: 5\n")
    monkeypatch.setenv("PENSTOCK_LOOK_AHEAD", "30")
    monkeypatch.setenv("PENSTOCK_PREFILL_WEIGHT", "40")
    monkeypatch.setenv("PENSTOCK_LEASE_SECONDS", "50")
    monkeypatch.setenv("PENSTOCK_SCHEDULER_PREFILL_WEIGHT", "400")
    monkeypatch.setenv("PENSTOCK_SCHEDULER_LEASE_SECONDS", "500")
    settings = parse("scheduler", "--config", path, "--lease-seconds", "5000")
    assert settings.max_queued_requests == 2
    assert settings.look_ahead == 30
    assert settings.prefill_weight == 400
    assert settings.lease_seconds == 5000
    assert settings.listen == "127.0.0.1:8012"


def test_another_commands_variables_do_not_count(monkeypatch):
    monkeypatch.setenv("PENSTOCK_TOKENIZER_LISTEN", "127.0.0.1:1")
    assert parse("scheduler", "--look-ahead", "1").listen == "127.0.0.1:8012"


def test_the_file_can_be_named_by_the_environment(monkeypatch, file):
    monkeypatch.setenv("PENSTOCK_CONFIG", file("look_ahead: 9"))
    assert parse("scheduler").look_ahead == 9


def test_lists_in_the_environment_stand_between_commas(monkeypatch):
    monkeypatch.setenv("PENSTOCK_TOKENIZER_MODELS", "a=/a,b=/b")
    assert parse("tokenizer").models == ("a=/a", "b=/b")


def test_one_file_holds_a_section_for_each_service(file):
    path = file("workers: 2\nscheduler: {look_ahead: 7}\ntokenizer: {template_workers: 3}\n")
    assert parse("scheduler", "--config", path).look_ahead == 7
    assert parse("tokenizer", "--config", path).template_workers == 3
    assert parse("up", "builtin", "--config", path).workers == 2


def test_a_setting_named_like_a_command_is_read(file):
    path = file("gateway: {scheduler: a:1, tokenizer: b:2}\nexecutor: {scheduler: c:3}\ntokenizer: {models: [m=/m, n=/n]}\n")
    gateway = parse("gateway", "--config", path)
    assert (gateway.scheduler, gateway.tokenizer) == ("a:1", "b:2")
    assert parse("executor", "--config", path).scheduler == "c:3"
    assert parse("tokenizer", "--config", path).models == ("m=/m", "n=/n")


@pytest.mark.parametrize(
    ("tokens", "near"),
    [(["scheduler", "--look-ahaed", "1"], "--look-ahead"), (["up", "builtin", "--max-batchsize", "1"], "--max-batch-size")],
)
def test_a_misspelt_flag_names_the_nearest(tokens, near):
    with pytest.raises(CycloptsError, match=f"Did you mean {near}"):
        parse(*tokens)


def test_a_misspelt_variable_names_the_nearest(monkeypatch):
    monkeypatch.setenv("PENSTOCK_SCHEDULER_LOOK_AHAED", "1")
    with pytest.raises(
        ConfigError, match="nothing reads PENSTOCK_SCHEDULER_LOOK_AHAED; did you mean PENSTOCK_SCHEDULER_LOOK_AHEAD"
    ):
        parse("scheduler")


@pytest.mark.parametrize("name", ["PENSTOCK_GATEWAY_SERVICE_HOST", "PENSTOCK_GATEWAY_PORT_8001_TCP_ADDR", "PENSTOCK_GATEWAY_PORT"])
def test_what_kubernetes_sets_for_a_service_is_no_setting(monkeypatch, name):
    monkeypatch.setenv(name, "10.0.0.1")
    assert parse("scheduler", "--look-ahead", "1").look_ahead == 1


@pytest.mark.parametrize("text", ["look_ahaed: 1", "scheduler: {look_ahaed: 1}"])
def test_a_misspelt_key_in_the_file_names_the_nearest(file, text):
    with pytest.raises(ConfigError, match="unknown setting look_ahaed; did you mean look_ahead"):
        parse("scheduler", "--config", file(text))


@pytest.mark.parametrize(
    ("text", "why"),
    [("[1, 2]", "must be a mapping"), ("a: [", "not YAML"), ("scheduler: 3", "scheduler: must be a mapping")],
)
def test_a_file_that_is_no_mapping_is_told(file, text, why):
    with pytest.raises(ConfigError, match=why):
        parse("scheduler", "--config", file(text))


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        parse("scheduler", "--config", str(tmp_path / "none.yaml"))


def test_a_wrong_value_names_its_key_and_its_file(file):
    path = file("look_ahead: many")
    with pytest.raises(CycloptsError, match=r"(?s)look_ahead.*settings\.yaml.*many"):
        parse("scheduler", "--config", path)


@pytest.mark.parametrize("command", ["gateway", "tokenizer", "scheduler", "executor", "up", "scale", "role"])
def test_help_tells_every_option_with_its_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    with pytest.raises(SystemExit) as leaving:
        app([command, "--help"])
    assert leaving.value.code == 0
    told = "".join(capsys.readouterr().out.split())
    arguments = app[command].assemble_argument_collection(parse_docstring=True)
    shown = [argument for argument in arguments if argument.show and argument.name.startswith("--")]
    assert shown
    for argument in shown:
        assert argument.name in told
        assert argument.parameter.help, f"{argument.name} is not described"
        default = argument.field_info.default
        if default not in {argument.field_info.empty, None, ""}:
            assert f"[default:{default}]".replace(" ", "") in told.replace("│", ""), argument.name


def test_a_refusal_is_one_line_on_stderr():
    done = subprocess.run(
        [sys.executable, "-m", "penstock.cli", "up", "builtin", "--prefill", "0", "--workers", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    why = "--prefill, --decode, --workers: must be from 1 to 64 executors together, and are 0"
    assert done.stderr == f"penstock: {why}\n"


def test_help_imports_no_numpy():
    code = "import sys; from penstock.cli.app import app; app(['--help'], result_action='return_value'); sys.exit('numpy' in sys.modules or 'grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_misspelt_section_is_told_with_the_right_one(tmp_path):
    (file := tmp_path / "penstock.yaml").write_text("schedulr:\n  look_ahead: 3\n")
    with pytest.raises(ConfigError, match="unknown setting schedulr; did you mean scheduler"):
        read_file(file, "up", {"scheduler", "gateway"}, {"workers", "decode"})
