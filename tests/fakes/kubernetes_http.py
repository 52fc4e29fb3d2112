"""The socket of the fake Kubernetes API: requests in, JSON and streams out, and connections that break."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from tests.fakes.kubernetes_objects import ApiError, Json

if TYPE_CHECKING:
    from tests.fakes.kubernetes_api import KubernetesApi


def handler(api: KubernetesApi) -> type[BaseHTTPRequestHandler]:
    """Handler class of a server whose answers `api` knows."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            api.requests.append((self.command, self.path))
            address = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(address.query).items()}
            if api.before_request is not None:
                api.before_request(self.command, self.path)
            fault = api.fault(self.command, self.path)
            if fault is not None and fault.action == "drop":
                return self._hang_up()
            if fault is not None and fault.action == "slow":
                time.sleep(fault.seconds)
            if fault is not None and isinstance(fault.action, int):
                error = ApiError(fault.action, "Scripted", "a scripted fault")
                return self._send(error.code, error.status(), {"Retry-After": str(int(fault.seconds))})
            try:
                if query.get("watch", "").lower() in ("true", "1"):
                    return self._stream(json.dumps(event) for event in api.watch(address.path, query))
                if address.path.endswith("/log"):
                    return self._stream(api.follow(address.path, query), "text/plain")
                code, item = api.answer(
                    self.command, address.path, query, body, self.headers.get("Content-Type") or ""
                )
            except ApiError as error:
                code, item = error.code, error.status()
            if fault is not None and fault.action == "lost":
                return self._hang_up()
            self._send(code, item)

        def _hang_up(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def _send(self, code: int, item: Json, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(item).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, lines: Iterator[str], kind: str = "application/json") -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with suppress(OSError):
                for line in lines:
                    data = line.encode() + b"\n"
                    self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

        def handle(self) -> None:
            with suppress(OSError, ValueError):
                super().handle()

    return Handler
