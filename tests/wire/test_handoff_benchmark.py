"""The benchmark of handing KV over, which stands on the handoff's own ports, as docs/benchmarks.md names it."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/handoff.py"


def test_whole_handoffs_are_timed_beside_a_memcpy():
    command = [sys.executable, str(SCRIPT), "--mib", "8", "--rounds", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["mib"] >= 8
    for way in ("memcpy", "shared_memory", "grpc"):
        assert told[way]["gb_per_second"] > 0
