"""Google Cloud Storage on this machine, as much of it as gcsfs, ArrayRecord and TensorStore use."""

import json
import re
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

PATH = re.compile(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?")
PAGE = 3  # names in an answer to a listing, instead of 1,000


class Request(NamedTuple):
    """A request that was answered."""

    method: str
    name: str
    range: str | None


class FakeGcs(ThreadingHTTPServer):
    """A server with one bucket, `bucket`; `refused` objects are answered with that status."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.times: dict[str, str] = {}
        self.generations: dict[str, int] = {}
        self._lock = threading.Lock()
        self.requests: list[Request] = []
        self.refused: dict[str, int] = {}
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What sends gcsfs, ArrayRecord and TensorStore here, without credentials."""
        address = f"http://127.0.0.1:{self.server_port}"
        here = {"STORAGE_EMULATOR_HOST": address, "CLOUD_STORAGE_EMULATOR_ENDPOINT": address}
        here |= {"TENSORSTORE_GCS_HTTP_URL": address, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any"}
        return {**here, "GOOGLE_APPLICATION_CREDENTIALS": "/none", "NO_GCE_CHECK": "true"}

    def write(self, name: str, content: bytes, if_generation: str | None = None) -> Any:
        """Makes an object, or makes it anew, and returns what there is to say about it; None if it
        is not of the generation that it must be of (0: there is none)."""
        with self._lock:
            found = self.generations[name] if name in self.objects else 0
            if if_generation not in (None, str(found)):
                return None
            self.times[name] = datetime.now(UTC).isoformat()[:23] + "Z"
            self.objects[name], self.generations[name] = content, time.time_ns()
            return self.describe(name)

    def describe(self, name: str) -> Any:
        """The metadata of an object."""
        size, generation = len(self.objects[name]), str(self.generations[name])
        updated = self.times[name]
        return {"name": name, "size": size, "updated": updated, "generation": generation}

    def list(self, prefix: str = "", delimiter: str = "", pageToken: str = "", **_: str) -> Any:
        """A page of the objects whose names begin with `prefix`, or of the folders they are in."""
        found: dict[str, bool] = {}
        for name in sorted(name for name in self.objects if name.startswith(prefix)):
            first, cut, _rest = name.removeprefix(prefix).partition(delimiter or "\0")
            found[prefix + first + cut] = bool(cut)
        left = [name for name in found if name > pageToken]
        items = [self.describe(name) for name in left[:PAGE] if not found[name]]
        prefixes = [name for name in left[:PAGE] if found[name]]
        page: Any = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
        return {**page, "nextPageToken": left[PAGE - 1]} if len(left) > PAGE else page

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up when they have what they need, even within an answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is two packets; it would wait 40 ms between them
    server: FakeGcs  # type: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url, gcs = urlsplit(self.path), self.server
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if query.get("uploadType") == "multipart":  # an object after its name
            head, content = body.split(b"\n\n", 2)[1:]
            body = content.removesuffix(b"\n--==0==--")
            query["name"], query["sent"] = json.loads(head.partition(b"\n")[0])["name"], "1"
        match = PATH.fullmatch(url.path)
        bucket, name = match.groups("") if match else ("", "")
        name, _, target = name.partition("/moveTo/o/")
        name = unquote(query.get("name", name))
        is_there = bucket == "bucket" and (name in gcs.objects or not name or "name" in query)
        if not is_there or name in gcs.refused:
            self._answer(gcs.refused.get(name, 404), name)
        elif target:
            self._answer(200, name, gcs.write(unquote(target), gcs.objects.pop(name)))
        elif "sent" in query or query.get("uploadType") == "media":
            made = gcs.write(name, body, query.get("ifGenerationMatch"))
            self._answer(200 if made else 412, name, made or b"")
        elif "name" in query:  # only its name; the content comes next, to this address
            self._answer(200, name, Location=f"http://{self.headers['Host']}{self.path}&sent=1")
        elif self.command == "DELETE":
            self._answer(204, name, gcs.objects.pop(name)[:0])
        elif query.get("alt") == "media":
            content = gcs.objects[name]
            first, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
            start = int(first) if first else max(0, len(content) - int(last))
            piece = content[start : int(last) + 1 if first and last else None]
            place = f"bytes {start}-{start + len(piece) - 1}/{len(content)}"
            generation = {"x-goog-generation": str(gcs.generations[name])}
            self._answer(206, name, piece, **{"Content-Range": place}, **generation)
        else:
            self._answer(200, name, gcs.describe(name) if name else gcs.list(**query))

    do_POST = do_DELETE = do_GET

    def _answer(self, status: int, name: str, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.server.requests.append(Request(self.command, name, self.headers.get("Range")))
        self.send_response(status)
        headers["Content-Length"] = str(len(body))
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""
