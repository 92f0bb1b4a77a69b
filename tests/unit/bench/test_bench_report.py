"""How results are printed."""

from penstock.cli.bench.measure import Result
from penstock.cli.bench.report import Report

TIMES = {"mean": 1234.5, "p50": 1234.5, "p90": 1234.5, "p99": 98765.4}
FIELDS = {
    "engine": "penstock",
    "version": "1",
    "dtype": "f32",
    "backend": "fake",
    "scenario": "poisson",
    "seconds": 1234.567,
    "out_tok_s": 12345.6,
    "total_tok_s": 23456.7,
    "ttft_ms": TIMES,
    "itl_ms": TIMES,
    "e2e_ms": TIMES,
    "failed": 10,
    "errors": [{"error": "gone", "requests": 8}],
    "requests": 1300,
    "goodput_req_s": 16.65,
}


def test_a_pipe_gets_every_figure_whole_however_narrow_it_says_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    report = Report(as_json=False, ids=None)
    report.add(Result(FIELDS, []))
    report.finish()
    title, headings, row = capsys.readouterr().out.splitlines()
    assert title == "penstock 1, fake, f32"
    assert headings.split()[-2:] == ["failed", "good/s"]
    figures = ["1234.567", "12345.6", "23456.7", "1234.5", "98765.4", "1234.5", "98765.4", "10", "of", "1300", "16.65"]
    assert row.split() == ["poisson", *figures]
