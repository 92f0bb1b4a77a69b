"""The suite on the built-in model: `penstock up` on free ports, one answer over gRPC, one over OpenAI's HTTP API, both streamed.

Needs what a default install has and no more. Run it as ``make demo``, or read it as a first client. Arguments are passed to
`penstock up`.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from penstock.v1 import inference_pb2, inference_pb2_grpc

PROMPT = "Count from 95: 95 96 97"
QUESTION = "What is 58 + 67?"


@contextmanager
def suite() -> Iterator[tuple[str, str]]:
    """`penstock up` on free ports: where its HTTP and its gRPC door are."""
    command = ["up", "builtin", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--log-level", "warning"]
    command += ["--log-format", "console", *sys.argv[1:]]  # for a person, wherever it goes
    print(f"$ penstock {' '.join(command)}", flush=True)
    up = subprocess.Popen([sys.executable, "-m", "penstock.cli", *command], stdout=subprocess.PIPE, text=True)
    try:
        line = up.stdout.readline() if up.stdout else ""
        if not line:
            sys.exit(up.wait() or 1)
        print(line, flush=True)
        doors = dict(word.split("=", 1) for word in line.split()[1:])
        yield doors["http"], doors["grpc"]
    finally:
        up.terminate()
        status = up.wait()
    print(f"SIGTERM: drained, exit status {status}")
    if status:
        sys.exit(status)


def over_grpc(address: str) -> None:
    """A prompt continued, through `penstock.v1.Inference`."""
    print(f"--- gRPC {address}: penstock.v1.Inference/Generate\n{PROMPT}", end="", flush=True)
    request = inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(text=PROMPT),
        sampling=inference_pb2.Sampling(temperature=0),
        stopping=inference_pb2.Stopping(max_tokens=94),
    )
    began, first = time.perf_counter(), None
    with grpc.insecure_channel(address) as channel:
        for answer in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60):
            if answer.text and first is None:
                first = time.perf_counter() - began
            print(answer.text, end="", flush=True)
            if answer.HasField("closing"):
                _tell(answer.closing, first or 0.0)


def _tell(closing: inference_pb2.Closing, first: float) -> None:
    usage = closing.usage
    print(f"\n\nusage: {usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.completion_tokens} new ones")
    stages = {
        "queue": closing.queue_time,
        "prefill": closing.prefill_time,
        "decode": closing.decode_time,
        "total": closing.total_time,
    }
    spent = ", ".join(f"{name} {span.ToNanoseconds() / 1e6:.1f} ms" for name, span in stages.items())
    print(f"time:  first text after {first * 1e3:.1f} ms; {spent}")
    for place in closing.placements:
        print(f"where: executor {place.executor_id}, {place.backend} on {place.device}")
    print()


def over_http(address: str) -> None:
    """A question answered, through `/v1/chat/completions`."""
    print(f"--- HTTP http://{address}/v1/chat/completions\n{QUESTION}\n> ", end="", flush=True)
    body = {
        "model": "builtin",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 60,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(address, timeout=60)
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != http.client.OK:
        sys.exit(f"HTTP {response.status}: {response.read().decode()}")
    for raw in response:
        event = raw.decode().removeprefix("data: ").strip()
        if not event.startswith("{"):
            continue
        chunk = json.loads(event)
        for choice in chunk["choices"]:
            print(choice["delta"].get("content") or "", end="", flush=True)
        if usage := chunk.get("usage"):
            print(f"\n\nusage: {usage['prompt_tokens']} prompt tokens, {usage['completion_tokens']} new ones")
    connection.close()
    print(f"time:  {(time.perf_counter() - began) * 1e3:.1f} ms\n")


def main() -> None:
    """Serve, ask twice, and leave."""
    with suite() as (http_door, grpc_door):
        over_grpc(grpc_door)
        over_http(http_door)


if __name__ == "__main__":
    main()
