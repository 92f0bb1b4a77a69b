"""A Hugging Face hub on loopback: enough of its HTTP API for one repository to be looked up and downloaded."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """`files` of the repository `repo`; `refusal` is (status, X-Error-Code) for all calls; `cut` answers break off in the middle."""

    repo: str
    files: dict[str, bytes]
    refusal: tuple[int, str] | None = None
    cut: int = 0
    token: str | None = None
    downloads: list[tuple[str, int]] = field(default_factory=list)

    def __enter__(self) -> Self:
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        hub, path = self.state, unquote(urlsplit(self.path).path)
        if hub.refusal or (hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}"):
            status, code = hub.refusal or (401, "GatedRepo")
            self.reply(status, b"{}", {"X-Error-Code": code}, body=body)
        elif path in {f"/api/models/{hub.repo}", f"/api/models/{hub.repo}/revision/main"}:
            siblings = [{"rfilename": name} for name in hub.files]
            self.reply(200, json.dumps({"id": hub.repo, "sha": COMMIT, "siblings": siblings}).encode(), {}, body=body)
        elif path == f"/api/models/{hub.repo}/tree/{COMMIT}":
            tree = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in hub.files.items()]
            self.reply(200, json.dumps(tree).encode(), {}, body=body)
        elif path.startswith(prefix := f"/{hub.repo}/resolve/{COMMIT}/"):
            self.file(path.removeprefix(prefix), body=body)
        else:
            code = "RevisionNotFound" if path.startswith(f"/api/models/{hub.repo}/") else "RepoNotFound"
            self.reply(404, b"{}", {"X-Error-Code": code}, body=body)

    def file(self, name: str, *, body: bool) -> None:
        data = self.state.files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0] or 0)
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if body:
            self.state.downloads.append((name, start))
        self.reply(206 if start else 200, data[start:], headers, body=body, breakable=name.endswith(".safetensors"))

    def reply(self, status: int, data: bytes, headers: dict[str, str], *, body: bool, breakable: bool = False) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return
        if breakable and self.state.cut > 0:
            self.state.cut -= 1
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
        else:
            self.wfile.write(data)
