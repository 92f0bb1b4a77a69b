"""How an executor knows another one for the one that the scheduler named to it.

Each executor mints a secret at its start and tells the scheduler alone. What another executor has to show it is made from that
secret and the other's id, and the scheduler gives it to the other alone: nobody can show it what a third one would, and what one
executor is shown is good for no other.
"""

from __future__ import annotations

import hmac
import secrets

__all__ = ["mint", "proof", "proves"]

_BYTES = 32


def mint() -> bytes:
    """An executor's secret."""
    return secrets.token_bytes(_BYTES)


def proof(secret: bytes, executor_id: str) -> bytes:
    """What the executor of this id has to show to the one whose secret it is: HMAC-SHA-256."""
    return hmac.digest(secret, executor_id.encode(), "sha256")


def proves(shown: bytes, secret: bytes, executor_id: str) -> bool:
    """Whether that is what it shows, in time that does not depend on how much of it is right."""
    return hmac.compare_digest(shown, proof(secret, executor_id))
