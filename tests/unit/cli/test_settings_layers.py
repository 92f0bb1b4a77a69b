"""Flags over PENSTOCK_<COMMAND>_… over PENSTOCK_… over the file over defaults; a misspelt key is named with the nearest right one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from penstock.cli.app import app, main
from penstock.common.config import ConfigError, read_file


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("PENSTOCK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")  # so that no command starts this process again


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


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("executor: {max_batch_size: abc}", "executor: max_batch_size: must be a whole number, and is abc"),
        ("executor: {max_batch_size: 1.5}", "executor: max_batch_size: must be a whole number, and is 1.5"),
        ("executor: {dtype: f99}", "executor: dtype: must be one of auto, f32, bf16, int8, int4, and is f99"),
        ("executor: {kv_cache_gib: [1]}", "executor: kv_cache_gib: must be a number, and is [1]"),
        ("executor: {kv_cache_gib: {a: 1}}", "executor: kv_cache_gib: must be no mapping"),
        ("executor: {max_batch_size: 3, max-batch-size: 5}", "line 1: max_batch_size stands there twice; leave one of them out"),
        ("executor: {max_batchsize: 1}", "executor: unknown setting max_batchsize; did you mean max_batch_size?"),
        ("prefix_cache: maybe", "prefix_cache: must be true or false, and is maybe"),
    ],
)
def test_whatever_is_wrong_in_a_file_is_told_alike(file, monkeypatch, capsys, text, why):
    path = file(text)
    monkeypatch.setattr("sys.argv", ["penstock", "executor", "--config", path])
    assert refused(capsys) == (1, f"penstock: {path}: {why}\n")
    monkeypatch.setattr(
        "sys.argv", ["penstock", "up", "builtin", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--config", path]
    )
    assert refused(capsys) == (1, f"penstock: {path}: {why}\n")


def test_a_wrong_variable_is_told_like_a_wrong_file_and_a_wrong_flag_is_a_wrong_call(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["penstock", "scheduler", "--look-ahead", "many"])
    assert refused(capsys)[0] == 2
    monkeypatch.setattr("sys.argv", ["penstock", "scheduler"])
    for value, told in (("many", "many"), ("1.5", "1.5"), ("", "empty")):
        monkeypatch.setenv("PENSTOCK_LOOK_AHEAD", value)
        assert refused(capsys) == (1, f"penstock: environment: PENSTOCK_LOOK_AHEAD: must be a whole number, and is {told}\n")


def test_a_fraction_is_no_whole_number_in_a_flag_either(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["penstock", "gateway", "--max-choices", "1.5"])
    status, why = refused(capsys)
    assert (status, "--max-choices" in why, '"1.5"' in why) == (2, True, True)
    assert parse("scheduler", "--lease-seconds", "1.5")


def test_a_file_that_is_named_by_nothing_is_told(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["penstock", "scheduler"])
    monkeypatch.setenv("PENSTOCK_CONFIG", "")
    assert refused(capsys) == (1, "penstock: --config or PENSTOCK_CONFIG is empty: name a file, or leave it away\n")


def refused(capsys):
    with pytest.raises(SystemExit) as leaving:
        main()
    out, err = capsys.readouterr()
    assert out == ""
    return leaving.value.code, err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_can_not_be_written_is_told_in_one_line(unbuffered):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "penstock.cli", "--version"],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "penstock: can not write the output: No space left on device\n")


@pytest.mark.parametrize(
    "module", ["cyclopts", "penstock.cli.cluster", "numpy.linalg"]
)  # ml_dtypes makes an ImportError of the last
def test_ctrl_c_amid_imports_is_quiet(module):
    program = f"""
import signal, sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
from penstock.cli.__main__ import main
main()
"""
    command = ["up", "builtin", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


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


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--", "--foo", "--max-tokens", "3"], "--max-tokens: stands behind --, where nothing is an option; put it before"),
        (["--", "--foo", "--max-tokens=3"], "--max-tokens: stands behind --, where nothing is an option; put it before"),
        (["--max-tokns", "3", "--", "--foo"], "Unknown option: --max-tokns. Did you mean --max-tokens?"),
    ],
)
def test_an_option_behind_the_end_of_options_is_told_as_that(arguments, why):
    command = [sys.executable, "-m", "penstock.cli", "generate", "--target", "127.0.0.1:1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"penstock: {why}\n")


def test_help_imports_no_numpy():
    code = "import sys; from penstock.cli.app import app; app(['--help'], result_action='return_value'); sys.exit('numpy' in sys.modules or 'grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_misspelt_section_is_told_with_the_right_one(tmp_path):
    (file := tmp_path / "penstock.yaml").write_text("schedulr:\n  look_ahead: 3\n")
    with pytest.raises(ConfigError, match="unknown setting schedulr; did you mean scheduler"):
        read_file(file, "up", {"scheduler", "gateway"}, {"workers", "decode"})
