"""A scheduler's core under a clock that a test moves."""

from penstock.common.step_times import Curve, StepTimes
from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.core import Scheduler
from penstock.scheduler.model import Description, Needs


class World:
    """A scheduler with a clock that a test moves, unless it gives another, and one gateway."""

    def __init__(self, clock=None, **config):
        self.now = 0.0
        given = {"settle_seconds": 0.0, "look_ahead": 0, "lease_seconds": 1e6}
        self.core = Scheduler(SchedulerConfig(**given | config), clock or (lambda: self.now))
        self.gateway = self.core.open_gateway()
        self.ids = 0

    def join(self, name, **fields):
        given = {
            "address": "h:1",
            "model": "m",
            "context_length": 4096,
            "kv_block_size": 16,
            "kv_blocks": 1000,
            "max_batch_size": 4,
        }
        return self.core.executors.join(Description(executor_id=name, **given | fields))

    def ask(self, **needs):
        self.ids += 1
        self.core.place(self.gateway, self.ids, Needs(**{"model": "m", "prompt_tokens": 100, "max_tokens": 10} | needs))
        return self.ids

    def outcome(self, **needs):
        """What comes of a request at once; None if it waits."""
        request_id = self.ask(**needs)
        return next((o for o in self.core.step() if o.request_id == request_id), None)

    def where(self, **needs):
        return self.outcome(**needs).executor_id

    def at(self, now):
        self.now = now
        return self.core.step()


def step_times(scale):
    return StepTimes(
        prefill=Curve((16, 256), (0.02 * scale, 0.2 * scale)),
        prefill_pair_seconds=0.0,
        decode=Curve((1, 16), (0.01 * scale, 0.04 * scale)),
        decode_context=16,
        decode_token_seconds=0.0,
    )
