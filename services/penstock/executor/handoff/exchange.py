"""Assembly of an executor's handoffs: the peers that it knows, the streams both ways, and what runs over them."""

from __future__ import annotations

import math

from penstock.backends.contract import KvSpec
from penstock.common.channel import MAX_MESSAGE_BYTES
from penstock.common.service import StartError
from penstock.executor.config import ExecutorConfig
from penstock.executor.engine import Engine
from penstock.executor.handoff.geometry import Geometry
from penstock.executor.handoff.handoffs import Handoffs, Settings
from penstock.executor.handoff.identity import Identity
from penstock.executor.handoff.link import Links
from penstock.executor.handoff.peers import Peers
from penstock.executor.handoff.servicer import Door
from penstock.executor.handoff.ticket import Transport
from penstock.executor.handoff.transports.negotiation import Transports

__all__ = ["Exchange", "settings_of"]

_MIB = 1 << 20


def settings_of(config: ExecutorConfig) -> Settings:
    """How handoffs run.

    Raises:
        StartError: a setting can not be; names it.
    """
    lease, push, window = config.handoff_lease_seconds, config.handoff_push_mib * _MIB, config.handoff_window_mib * _MIB
    if not 0.1 <= lease <= 3600:
        raise StartError(f"handoff_lease_seconds: must be from 0.1 to 3600, and is {lease:g}")
    if not 0 < push <= MAX_MESSAGE_BYTES // 2:
        most = MAX_MESSAGE_BYTES // 2 // _MIB
        raise StartError(f"handoff_push_mib: must be more than 0 and at most {most}, and is {config.handoff_push_mib:g}")
    if not push <= window < math.inf:
        least = f"at least handoff_push_mib, {config.handoff_push_mib:g}"
        raise StartError(f"handoff_window_mib: must be a number of {least}, and is {config.handoff_window_mib:g}")
    return Settings(lease, int(push), int(window), tuple(map(Transport, config.handoff_transports)))


class Exchange:
    """Of one executor, in its event loop. The engine tells `handoffs`; streams come in by `door`."""

    def __init__(
        self,
        identity: Identity,
        engine: Engine,
        kv: KvSpec,
        vocabulary_size: int,
        settings: Settings,
    ) -> None:
        geometry, transports = Geometry(kv, vocabulary_size), Transports(settings.transports)
        self.peers = Peers()
        self._links = Links(identity, geometry, self.peers, transports, settings.lease_seconds / 2)
        self.handoffs = Handoffs(identity.executor_id, engine.handoff, geometry, settings, self._links.dial)
        self.door = Door(identity, geometry, self.peers, transports, self.handoffs)
        engine.handoff.events = self.handoffs

    async def close(self) -> None:
        """End all streams; what runs over them fails by its lease, if the engine has not ended it before."""
        await self._links.close()
        self.handoffs.close()
