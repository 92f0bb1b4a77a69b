"""compose.yaml on a real engine: built, answered through both published doors, scaled, and a container killed under load."""

import os
import shutil
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest

from penstock.client import Client

ROOT = Path(__file__).parents[2]
HTTP, GRPC = "127.0.0.1:18000", "127.0.0.1:18001"
PROMPT = "Count from 7: 7 8 9"


def _compose() -> list[str] | None:
    """The command of Compose 2, or of 1.29; None where there is neither, or no engine to reach."""
    for command in (["docker", "compose"], ["docker-compose"], ["/usr/bin/docker-compose"]):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            break
    else:
        return None
    docker = next((d for d in ("/usr/bin/docker", "docker") if shutil.which(d)), None)
    reached = docker is not None and subprocess.run([docker, "info"], capture_output=True, check=False).returncode == 0
    return command if reached else None


COMPOSE = _compose()
pytestmark = [
    pytest.mark.docker,
    pytest.mark.skipif(COMPOSE is None, reason="needs a Docker engine and Compose"),
    pytest.mark.timeout(1800),  # images are built where they are not cached
]


class Stack:
    def __init__(self) -> None:
        self.project = f"penstock-test-{uuid.uuid4().hex[:8]}"

    def run(self, *arguments: str) -> str:
        # Every request apart: whether a handoff happens is then no matter of how busy the machine is.
        environment = {
            **os.environ,
            "PLACEMENT": "apart",
            "HTTP": HTTP,
            "GRPC": GRPC,
            "DOCKER_BUILDKIT": os.environ.get("DOCKER_BUILDKIT", "0"),
        }
        done = subprocess.run(
            [*COMPOSE, "--project-name", self.project, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def executors(self, client: Client, wanted: int) -> None:
        """Wait until so many serve."""
        _until(lambda: len(client.models()[0].executors) == wanted, f"{wanted} executors")


def _until(holds, what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if holds():
                return
        except Exception:  # noqa: BLE001  not up yet
            pass
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}")


@pytest.fixture
def stack():
    stack = Stack()
    try:
        stack.run("up", "--detach", "--build")
        yield stack
    finally:
        stack.run("down", "--volumes", "--timeout", "40")


def test_the_suite_in_containers(stack):
    with grpc.insecure_channel(GRPC) as channel:
        grpc.channel_ready_future(channel).result(180)
    services = ("gateway", "tokenizer", "scheduler", "prefill", "decode")
    assert {stack.run("exec", "-T", service, "id", "-u").strip() for service in services} == {"10001"}
    with Client(GRPC, timeout=60, retries=10) as client:
        stack.executors(client, 2)
        answer = client.generate(PROMPT, max_tokens=24, temperature=0)
        over_grpc = answer.text()
        closing = answer.closing
        assert closing.prefill_executor_id != closing.decode_executor_id
        assert closing.handoff is not None
        assert closing.handoff.kv_bytes > 0
        assert closing.handoff.transport == "shared_memory"
        reply = httpx.post(f"http://{HTTP}/v1/completions", json={"prompt": PROMPT, "max_tokens": 24, "temperature": 0}, timeout=60)
        assert over_grpc.startswith(" 10 11 12")
        assert reply.json()["choices"][0]["text"] == over_grpc

        stack.run("up", "--detach", "--scale", "decode=3")
        stack.executors(client, 4)
        containers = stack.run("ps", "--quiet", "decode").split()
        assert len(containers) == 3

        whole = client.generate(PROMPT, max_tokens=400, temperature=0, ignore_eos=True).text()
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(client.generate(PROMPT, max_tokens=400, temperature=0, ignore_eos=True).text) for _ in range(24)]
            _until(lambda: sum(e.running for e in client.models()[0].executors) > 0, "load")
            subprocess.run([shutil.which("/usr/bin/docker") or "docker", "kill", containers[0]], check=True, capture_output=True)
            assert {a.result(120) for a in answers} == {whole}
    _until(lambda: "unhealthy" not in stack.run("ps"), "health")
