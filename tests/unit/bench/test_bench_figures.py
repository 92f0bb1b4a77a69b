import json

import pytest

from penstock.cli.bench.measure import closed_loop, failures, open_loop
from penstock.cli.bench.options import Work
from penstock.cli.bench.scenarios import Poisson, Scenario
from penstock.cli.bench.session import measure
from penstock.cli.bench.target import Description
from penstock.cli.bench.timeline import Slo, Timeline, latencies, meets
from penstock.common.service import StartError

SMALL = Scenario("small", 2, 4, 3)


class ScriptedTarget:
    """Answers every request after `seconds`, of which each run takes the next; requests of the numbers in `failing` fail."""

    description = Description("scripted", "1", "f32", "none", 768)

    def __init__(self, seconds, failing=()):
        self.seconds = iter(seconds)
        self.failing = failing
        self.closed = False
        self.runs = 0

    def run(self, requests, finished):
        took = next(self.seconds)
        self.runs += 1
        timelines = []
        for number, request in enumerate(requests):
            step = took / request.new_tokens
            timeline = Timeline(sent=request.at, ended=request.at + took)
            for k in range(request.new_tokens):
                timeline.bear(request.at + step * (k + 1), (self.runs * 1000 + number,))
            if number in self.failing:
                timeline.error = "UNAVAILABLE: gone"
            timelines.append(timeline)
            finished()
        return timelines

    def close(self):
        self.closed = True


class AnswersOnlyTheWarmUp(ScriptedTarget):
    def __init__(self, failing):
        super().__init__([0.1, 0.5])
        self.wanted = failing

    def run(self, requests, finished):
        self.failing = self.wanted if self.runs else ()
        return super().run(requests, finished)


def test_the_quickest_of_the_repeats_is_told_and_the_ids_of_the_first():
    finished = []
    result = closed_loop(ScriptedTarget([0.6, 0.3, 0.9]), SMALL, 3, lambda: finished.append(1))
    assert result.fields["seconds"] == 0.3
    assert result.fields["out_tok_s"] == 20.0
    assert result.fields["total_tok_s"] == pytest.approx(2 * 7 / 0.3, abs=0.1)
    assert result.fields["ttft_ms"]["p50"] == 100
    assert result.fields["itl_ms"] == {"mean": 100, "p50": 100, "p90": 100, "p99": 100}
    assert result.ids == [[1000] * 3, [1001] * 3]
    assert len(finished) == 6


def test_a_scenario_with_a_failed_request_gives_no_figure():
    with pytest.raises(StartError, match="1 of 2 requests failed; the first: UNAVAILABLE: gone"):
        closed_loop(ScriptedTarget([0.5], failing={1}), SMALL, 1, lambda: None)


def test_an_open_loop_counts_only_answers_in_time():
    load = Poisson(rate=10, duration=10, prompt_tokens=8, new_tokens=4, spread=0)
    requests = len(load.work(0, 768))
    good = open_loop(ScriptedTarget([1.0], failing={0, 1}), load, Slo(ttft=0.3, itl=0.3), 0, lambda: None).fields
    assert good["requests"] == requests
    assert good["failed"] == 2
    assert good["errors"] == [{"error": "UNAVAILABLE: gone", "requests": 2}]
    assert good["goodput_req_s"] == pytest.approx((requests - 2) / good["seconds"], abs=0.01)
    late = open_loop(ScriptedTarget([1.0]), load, Slo(ttft=0.2, itl=0.3), 0, lambda: None).fields
    assert late["goodput_req_s"] == 0
    assert late["ttft_ms"]["p99"] == pytest.approx(250)


def test_an_open_loop_without_requests_says_so():
    load = Poisson(rate=0.001, duration=0.001, prompt_tokens=8, new_tokens=4, spread=0)
    with pytest.raises(StartError, match="--rate"):
        open_loop(ScriptedTarget([1.0]), load, Slo(1, 1), 0, lambda: None)


def test_tokens_of_one_message_share_its_wait():
    timeline = Timeline(sent=0.0, ended=2.0)
    timeline.bear(1.0, (1,))
    timeline.bear(2.0, (2, 3))
    assert timeline.gaps() == [0.5, 0.5]
    assert timeline.ids == [1, 2, 3]


def test_a_single_token_has_no_gap_and_can_still_be_good():
    timeline = Timeline(sent=0.0, ended=1.0)
    timeline.bear(1.0, (1,))
    assert meets(timeline, Slo(ttft=1.0, itl=0.0))
    assert latencies([timeline])["itl_ms"] is None


def test_nothing_that_came_is_never_good():
    assert not meets(Timeline(), Slo(ttft=9, itl=9))
    assert latencies([Timeline()])["ttft_ms"] is None


def test_json_lines_and_ids(capsys, tmp_path):
    target = ScriptedTarget([0.1, 0.4, 0.2])
    ids = tmp_path / "ids.json"
    measure(Work(scenario=("decode-b1", "decode-b8"), repeats=1, as_json=True, ids=ids), lambda: target)
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [r["scenario"] for r in rows] == ["decode-b1", "decode-b8"]
    assert {"engine", "version", "dtype", "scenario", "seconds", "out_tok_s", "total_tok_s"} <= rows[0].keys()
    assert [r["seconds"] for r in rows] == [0.4, 0.2]  # the first run warmed up
    assert not err  # no bar where stderr is no terminal
    assert {name: len(answers) for name, answers in json.loads(ids.read_text()).items()} == {"decode-b1": 1, "decode-b8": 8}
    assert target.closed


def test_a_table_for_people(capsys):
    measure(Work(rate=5.0, duration=3.0), lambda: ScriptedTarget([0.1, 0.5]))
    out = capsys.readouterr().out
    assert "scripted 1, none, f32" in out
    assert "poisson" in out
    assert "0 of " in out


def timelines(errors):
    return [Timeline(error=error) for error in errors]


def test_errors_that_differ_in_figures_alone_are_counted_together():
    errors = [None, "at most 2048; these are 5000", "gone", "at most 2048; these are 6001", "late", "other", "gone", "more"]
    assert failures(timelines(errors)) == [
        {"error": "at most 2048; these are 5000", "requests": 2},
        {"error": "gone", "requests": 2},
        {"error": "late", "requests": 1},
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_work_of_which_nothing_was_answered_is_told_and_fails(capsys, as_json):
    work = Work(rate=5.0, duration=3.0, as_json=as_json)
    requests = len(work.poisson().work(0, 768))
    failed = (range(requests), range(requests - 1))
    statuses = [measure(work, lambda failing=failing: AnswersOnlyTheWarmUp(failing)) for failing in failed]
    assert statuses == [1, 0]
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"penstock: {requests} of {requests} requests failed",
        f"penstock: {requests} of them: UNAVAILABLE: gone",
        f"penstock: {requests - 1} of {requests} requests failed",
        f"penstock: {requests - 1} of them: UNAVAILABLE: gone",
    ]
    if as_json:
        told = [json.loads(line)["errors"] for line in out.splitlines()]
        assert told == [[{"error": "UNAVAILABLE: gone", "requests": len(failing)}] for failing in failed]


def test_the_target_is_closed_when_a_run_fails(capsys):
    target = ScriptedTarget([0.1, 0.1], failing={0})
    with pytest.raises(StartError):
        measure(Work(scenario=("decode-b1",)), lambda: target)
    assert target.closed
