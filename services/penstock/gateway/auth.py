"""Who a client is: API keys from a file, each of a tenant. A client never names its tenant itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import yaml

from penstock.common.errors import Unauthenticated
from penstock.common.service import StartError

__all__ = ["Keys", "load_keys"]

DEFAULT_TENANT = "default"


class Keys:
    """API keys and their tenants. Keys are held and compared as digests, so the time it takes tells nothing about them."""

    def __init__(self, tenants: Mapping[str, str] | None = None) -> None:
        self._tenants = {_digest(key): tenant for key, tenant in (tenants or {}).items()}

    def tenant(self, authorization: str | None) -> str:
        """The tenant of an ``Authorization`` header's value.

        Raises:
            Unauthenticated: keys are set up, and the value bears none of them.
        """
        if not self._tenants:
            return DEFAULT_TENANT
        scheme, _, key = (authorization or "").partition(" ")
        tenant = self._tenants.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise Unauthenticated("send a known API key as 'Authorization: Bearer KEY'")
        return tenant


def load_keys(path: str | None) -> Keys:
    """Keys from a YAML file, ``key: tenant``.

    Raises:
        StartError: the file is missing or holds something else.
    """
    if path is None:
        return Keys()
    try:
        tenants = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no YAML in UTF-8"
        raise StartError(f"api_keys: can not read {Path(path).absolute()}: {why}") from error
    if (
        not isinstance(tenants, dict)
        or not tenants
        or not all(isinstance(k, str) and isinstance(v, str) and k for k, v in tenants.items())
    ):
        raise StartError(f"api_keys: {path} has to map at least one key to its tenant, each a text")
    return Keys(tenants)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
