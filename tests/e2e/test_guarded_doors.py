"""The client commands at doors as operators publish them: with TLS before them, and keys."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
from suite import Suite
from tls import OPENSSL, TlsFront, certificate

pytestmark = pytest.mark.skipif(OPENSSL is None, reason="makes its certificate with openssl")

KEY = "sk-alice-0001"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """Targets of the two doors by scheme, and the certificate to trust."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = folder / "keys.yaml"
    keys.write_text(f"{KEY}: alice\n")
    key, signed = certificate(folder)
    with Suite("builtin", "--backend", "fake", environment={"PENSTOCK_GATEWAY_API_KEYS": str(keys)}) as suite:
        fronts = TlsFront(suite.grpc, key, signed, "h2"), TlsFront(suite.http, key, signed, "http/1.1")
        with contextlib.closing(fronts[0]), contextlib.closing(fronts[1]):
            yield {scheme: f"{scheme}://{front.address}" for scheme, front in zip(("grpcs", "https"), fronts, strict=True)}, signed


def penstock(*arguments, trusting=None):
    """A command, as whoever trusts this certificate beside nothing runs it."""
    roots = {} if trusting is None else {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(trusting), "SSL_CERT_FILE": str(trusting)}
    argv = [sys.executable, "-m", "penstock.cli", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **roots})


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_a_suite_behind_tls_that_wants_keys_is_measured(guarded, scheme):
    targets, signed = guarded
    measured = ("bench", "serve", "--target", targets[scheme], "--scenario", "decode-b1", "--repeats", "1", "--json")
    done = penstock(*measured, "--api-key", KEY, trusting=signed)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["backend"] == "fake"
    for key in ((), ("--api-key", "sk-of-nobody")):
        refused = penstock(*measured, *key, trusting=signed)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith("penstock: --api-key: ")


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_who_does_not_trust_the_certificate_asks_nothing(guarded, scheme):
    done = penstock("bench", "serve", "--target", guarded[0][scheme], "--scenario", "decode-b1", "--api-key", KEY)
    assert (done.returncode, done.stdout) == (1, "")
    assert "CERTIFICATE_VERIFY_FAILED" in done.stderr


def test_generate_chat_and_models_speak_tls(guarded):
    targets, signed = guarded
    door = ("--target", targets["grpcs"], "--api-key", KEY)
    for command in (("generate", "x", "--max-tokens", "3"), ("chat", "hi", "--max-tokens", "3"), ("models",)):
        done = penstock(*command, *door, trusting=signed)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        refused = penstock(*command, "--target", targets["grpcs"], trusting=signed)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith("penstock: --api-key: ")
