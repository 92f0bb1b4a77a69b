"""`make bench` measures an engine and a suite on the same settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_engine_and_the_suite_run_on_what_was_asked_for():
    flags = ["--backend", "fake", "--max-batch-size=4", "--no-prefix-cache", "--scenario", "decode-b8", "--repeats", "1", "--json"]
    penstock = str(Path(sys.executable).with_name("penstock"))
    done = subprocess.run(
        [ROOT / "tools/bench.sh", "builtin", *flags],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PENSTOCK": penstock},
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["engine"], one["backend"]) for one in told] == [("penstock", "fake"), ("penstock-grpc", "fake")]
