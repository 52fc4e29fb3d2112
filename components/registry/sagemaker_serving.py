"""Serves a packed model as SageMaker asks for it: `GET /ping` and `POST /invocations` on port 8080. JSON in, JSON out.

    python -m modelmill.components.registry.sagemaker_serving     (in our image)
    python /opt/ml/model/code/sagemaker_serving.py                (in any image with what the model's flavor needs)

A copy travels with the model and imports nothing of modelmill. Requests and answers are those of `mlflow models
serve`: a forecaster takes `{"dataframe_records": [...], "params": {...}}`, a language model `{"inputs": [...],
"params": {...}}`; both answer `{"predictions": [...]}`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CONTENT_TYPE = "application/json"
LOADER = "loader.py"  # in `code/` beside the model's files: its flavor's module
_INPUTS = ("dataframe_records", "inputs")
_MOST_BYTES = 6 << 20  # of a request, as SageMaker's


class BadRequest(ValueError):
    """What was asked for makes no sense; the message says what does."""


class Served:
    """A packed model, loaded."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: the unpacked model data.
        """
        spec = importlib.util.spec_from_file_location("modelmill_loader", folder / "code" / LOADER)
        if spec is None or spec.loader is None:
            raise FileNotFoundError(f"{folder} holds no code/{LOADER}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._model = module._load_pyfunc(str(folder))
        self._lock = threading.Lock()  # torch uses all cores for one request

    def answer(self, body: bytes) -> bytes:
        """Body of the answer to the body of a request.

        Raises:
            BadRequest: the request is not what the model takes.
        """
        try:
            request = json.loads(body)
        except ValueError as error:
            raise BadRequest(f"the body is no JSON ({error})") from None
        given = [name for name in _INPUTS if isinstance(request, dict) and name in request]
        if len(given) != 1 or set(request) - {given[0], "params"}:
            raise BadRequest('give {"dataframe_records": [...]} or {"inputs": [...]}, and "params" if you like')
        params = request.get("params") or {}
        if not isinstance(request[given[0]], list) or not isinstance(params, dict):
            raise BadRequest(f"{given[0]} must be a list, and params an object")
        try:
            with self._lock:
                found = self._model.predict(request[given[0]], params)
        except (ValueError, TypeError, KeyError) as error:
            raise BadRequest(str(error)) from None
        records = found.to_dict("records") if hasattr(found, "to_dict") else found
        return json.dumps({"predictions": _plain(records)}).encode()


def _plain(value: Any) -> Any:
    """A value as JSON has it: times in ISO 8601, nothing for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "tolist"):
        value = value.tolist()
        return _plain(value) if isinstance(value, list) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Server:
    """The HTTP server; it answers pings once the model is loaded."""

    def __init__(self, folder: Path, port: int, host: str = "0.0.0.0") -> None:
        """
        Args:
            folder: the unpacked model data.
            port: to listen on; 0 takes a free one.
            host: to listen on.
        """
        handler = type("Handler", (_Handler,), {"served": Served(folder)})
        self._server = ThreadingHTTPServer((host, port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def run(self) -> None:
        """Serve until `stop`."""
        self._server.serve_forever(poll_interval=0.1)
        self._server.server_close()

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Served

    def do_GET(self) -> None:
        known = self.path == "/ping"
        self._send(200 if known else 404, {} if known else {"error": "ask for /ping"})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if length > _MOST_BYTES:
            self.close_connection = True
            self._send(413, {"error": f"the body has {length} bytes; send at most {_MOST_BYTES}"})
            return
        body = self.rfile.read(length)
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        wanted = self.headers.get("Accept", "*/*").partition(";")[0].strip().lower()
        if self.path != "/invocations":
            self._send(404, {"error": "ask for /invocations"})
        elif kind != CONTENT_TYPE:
            self._send(415, {"error": f"the content type {kind!r} is not read; send {CONTENT_TYPE}"})
        elif wanted not in (CONTENT_TYPE, "*/*", "application/*"):
            self._send(406, {"error": f"{wanted!r} is not written; accept {CONTENT_TYPE}"})
        else:
            self._invoke(body)

    def _invoke(self, body: bytes) -> None:
        try:
            self._write(200, self.served.answer(body))
        except BadRequest as error:
            self._send(400, {"error": str(error)})
        except Exception as error:
            self._send(500, {"error": f"{type(error).__name__}: {error}"})

    def _send(self, status: int, answer: dict[str, str]) -> None:
        self._write(status, json.dumps(answer).encode())

    def _write(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """A line for each request but the pings, which come every few seconds."""
        if self.path != "/ping":
            super().log_message(format, *arguments)


def main() -> int:
    """Serve the model of this container until SIGTERM."""
    folder = Path(os.environ.get("SM_MODEL_DIR", "/opt/ml/model"))
    server = Server(folder, int(os.environ.get("SAGEMAKER_BIND_TO_PORT", "8080")))
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.stop).start())
    print(f"serving {folder} on port {server.port}", flush=True)
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
