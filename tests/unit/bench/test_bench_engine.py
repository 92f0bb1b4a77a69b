import json

import pytest

from penstock.cli.bench.engine import engine
from penstock.cli.bench.engine_target import EngineOptions, EngineTarget
from penstock.cli.bench.options import Work
from penstock.cli.bench.scenarios import Request
from penstock.common.service import StartError

FAKE = EngineOptions(backend="fake", kv_cache_gib=0.05, max_batch_tokens=512)


@pytest.fixture
def target():
    target = EngineTarget("builtin", FAKE)
    yield target
    target.close()


def test_each_request_gets_its_own_tokens_and_times(target):
    ended = []
    work = [Request([n, n + 1, n + 2], 5) for n in range(20)]
    together = target.run(work, lambda: ended.append(1))
    assert len(ended) == 20
    assert [len(t.ids) for t in together] == [5] * 20
    assert [t.ids for t in together] == [target.run([one], lambda: None)[0].ids for one in work]
    assert all(t.error is None and t.sent <= t.arrivals[0][0] <= t.ended for t in together)


def test_a_request_that_does_not_fit_is_told(target):
    fits, too_long = target.run([Request([1], 2), Request([1] * 3000, 2)], lambda: None)
    assert fits.error is None
    assert "3000 prompt tokens" in too_long.error


def test_the_command_prints_every_scenario(capsys):
    assert engine("builtin", options=FAKE, work=Work(repeats=1, as_json=True)) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["scenario"] for r in rows] == ["prefill-512", "decode-b1", "decode-b8", "decode-b32", "mixed-b16"]
    assert {(r["engine"], r["backend"], r["dtype"]) for r in rows} == {("penstock", "fake", "f32")}


def test_a_backend_that_is_none_is_refused_before_any_weight_is_read():
    with pytest.raises(StartError, match="there is no backend nonesuch"):
        EngineTarget("builtin", EngineOptions(backend="nonesuch"))
