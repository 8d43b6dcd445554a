"""A small stand-in for Google Cloud Storage on loopback: what of its JSON API gcsfs uses, objects in memory, no credentials.

Written after https://cloud.google.com/storage/docs/json_api; no emulator that pip installs is kept up.
"""

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_GET(self) -> None:
        kind, bucket, name, asked = self._asked()
        if bucket not in self.server.buckets:
            return self._answer(404, {"error": {"code": 404, "message": f"bucket {bucket}"}})
        objects = self.server.buckets[bucket]
        if name is None and kind == "bucket":
            return self._answer(200, {"kind": "storage#bucket", "name": bucket, "storageClass": "STANDARD"})
        if name is None:
            return self._answer(200, _listed(bucket, objects, asked.get("prefix", ""), asked.get("delimiter")))
        if name not in objects:
            return self._answer(404, {"error": {"code": 404, "message": name}})
        if asked.get("alt") == "media":
            return self._answer(200, objects[name])
        self._answer(200, _described(bucket, name, objects[name]))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        _, bucket, name, asked = self._asked()
        objects = self.server.buckets.get(bucket)
        if objects is None:
            return self._answer(404, {"error": {"code": 404, "message": f"bucket {bucket}"}})
        if asked.get("uploadType") == "multipart":
            about, content = _parts(body, self.headers["Content-Type"])
            objects[about["name"]] = content
            return self._answer(200, _described(bucket, about["name"], content))
        source, _, target = (name or "").partition("/rewriteTo/b/")
        other, _, new = target.partition("/o/")
        if source not in objects:
            return self._answer(404, {"error": {"code": 404, "message": source}})
        self.server.buckets[other][new] = objects[source]
        self._answer(200, {"kind": "storage#rewriteResponse", "done": True, "resource": _described(other, new, objects[source])})

    def do_DELETE(self) -> None:
        _, bucket, name, _ = self._asked()
        found = self.server.buckets.get(bucket, {}).pop(name or "", None)
        self._answer(404 if found is None else 204, {"error": {"code": 404, "message": name}} if found is None else b"")

    def _asked(self) -> tuple[str, str, str | None, dict[str, str]]:
        """(bucket or objects, bucket, object, options)."""
        parts = urlsplit(self.path)
        rest = parts.path.split("/storage/v1/b/", 1)[-1]
        bucket, found, name = rest.partition("/o")
        asked = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return "objects" if found else "bucket", unquote(bucket), unquote(name[1:]) if len(name) > 1 else None, asked

    def _answer(self, status: int, content: Any) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        self.server.log.append(f"{self.command} {self.path}")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, buckets: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets = buckets
        self.log: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients are killed in tests
            super().handle_error(request, client_address)


def _described(bucket: str, name: str, content: bytes) -> dict[str, Any]:
    digest = base64.b64encode(hashlib.md5(content).digest()).decode()
    return {
        "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(content)), "md5Hash": digest, "generation": "1",
        "contentType": "application/octet-stream", "timeCreated": "2026-01-01T00:00:00Z", "updated": "2026-01-01T00:00:00Z",
    }  # fmt: skip


def _listed(bucket: str, objects: dict[str, bytes], prefix: str, delimiter: str | None) -> dict[str, Any]:
    items, folders = [], set()
    for name in sorted(objects):
        if not name.startswith(prefix):
            continue
        head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
        if cut:
            folders.add(prefix + head + cut)
        else:
            items.append(_described(bucket, name, objects[name]))
    return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}


def _parts(body: bytes, content_type: str) -> tuple[dict[str, Any], bytes]:
    """What an upload says of itself, and its content."""
    mark = b"--" + content_type.split("boundary=", 1)[1].strip('"').encode()
    _, first, second = body[: body.rindex(mark)].split(mark, 2)
    about = json.loads(first.split(b"\n\n", 1)[1])
    return about, second.split(b"\n\n", 1)[1][:-1]


@contextmanager
def google(bucket: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """A server with one bucket: its address, and the objects in it."""
    server = _Server({bucket: {}})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.buckets[bucket]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
