"""One benchmark from its options to its printed results."""

from __future__ import annotations

from collections.abc import Callable

from penstock.cli.bench.measure import closed_loop, open_loop, warm
from penstock.cli.bench.options import Work
from penstock.cli.bench.report import Report, progress
from penstock.cli.bench.target import Target

__all__ = ["measure"]


def measure(work: Work, connect: Callable[[], Target]) -> int:
    """Run all of the work on a target, which is made once the options are known to be right.

    Returns:
        the exit status: 1 where every request of an open loop failed.

    Raises:
        ConfigError: an option is wrong.
        StartError: the target can not be reached, or a request of a scenario failed.
    """
    scenarios, load = work.scenarios(), work.poisson()
    target = connect()
    try:
        report = Report(as_json=work.as_json, ids=work.ids)
        vocabulary = target.description.vocabulary
        total = sum(s.requests for s in scenarios) * work.repeats + (len(load.work(work.seed, vocabulary)) if load else 0)
        with progress(total) as finished:
            warm(target)
            for scenario in scenarios:
                report.add(closed_loop(target, scenario, work.repeats, finished))
            if load is not None:
                report.add(open_loop(target, load, work.slo(), work.seed, finished))
        report.finish()
        return 1 if report.in_vain else 0
    finally:
        target.close()
