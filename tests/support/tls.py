"""TLS before a door, as a proxy of an operator's would stand there."""

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import threading

OPENSSL = shutil.which("openssl")


def certificate(folder):
    """A key and a certificate for localhost that nobody else has signed: the paths of both."""
    key, signed = folder / "key.pem", folder / "certificate.pem"
    words = f"{OPENSSL} req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*words.split(), "-keyout", str(key), "-out", str(signed)], check=True, capture_output=True)
    return key, signed


class TlsFront:
    """Takes connections over TLS at `address` and passes what they carry on to HOST:PORT. `close` it in the end."""

    def __init__(self, behind, key, signed, protocol):
        self._host, _, self._port = behind.rpartition(":")
        self._secret = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._secret.load_cert_chain(signed, key)
        self._secret.set_alpn_protocols([protocol])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        self.address = f"localhost:{self._server.sockets[0].getsockname()[1]}"

    def close(self):
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self):
        return await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._secret)

    async def _stop(self):
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader, writer):
        there, back = await asyncio.open_connection(self._host, int(self._port))
        await asyncio.gather(_pass_on(reader, back), _pass_on(there, writer))


async def _pass_on(reader, writer):
    with contextlib.closing(writer), contextlib.suppress(OSError):
        while part := await reader.read(1 << 16):
            writer.write(part)
            await writer.drain()
