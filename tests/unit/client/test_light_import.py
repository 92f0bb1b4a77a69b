import subprocess
import sys

import penstock.client

BLOCKED = [
    "numpy",
    "torch",
    "openvino",
    "tokenizers",
    "transformers",
    "jinja2",
    "prometheus_client",
    "pydantic",
    "structlog",
    "uvicorn",
]


def test_the_client_needs_nothing_but_grpc():
    program = f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None
import penstock.client
penstock.client.Client("127.0.0.1:1").close()
loaded = [m for m in sys.modules if m.startswith("penstock.") and m.split(".")[1] in ("gateway", "tokenizer", "scheduler", "executor", "backends", "internal")]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_all_names_what_is_public():
    public = {name for name in vars(penstock.client) if not name.startswith("_") and name != "errors"}
    assert set(penstock.client.__all__) == public
    assert list(penstock.client.__all__) == sorted(penstock.client.__all__)
