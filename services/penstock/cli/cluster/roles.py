"""Roles as messages tell them."""

from __future__ import annotations

from collections.abc import Mapping

from penstock.cli.cluster.pools import Role
from penstock.internal.v1 import scheduler_pb2

__all__ = ["ROLES_OF_MESSAGES", "ROLE_MESSAGES"]

ROLE_MESSAGES: Mapping[Role, scheduler_pb2.Role.ValueType] = {
    "prefill": scheduler_pb2.ROLE_PREFILL,
    "decode": scheduler_pb2.ROLE_DECODE,
    "both": scheduler_pb2.ROLE_BOTH,
}
ROLES_OF_MESSAGES: Mapping[int, Role] = {message: role for role, message in ROLE_MESSAGES.items()}
