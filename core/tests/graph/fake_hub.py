"""A model hub on this machine with the few routes that a download takes: a repository's commit, its files, and each
file, a large one after a redirect; as huggingface_hub's file_download.py and hf_api.py expect them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".gguf")


@dataclass
class Repo:
    """`revisions` are folders by the names that they may be asked for; what is in `gated` needs a token."""

    revisions: dict[str, Path]
    token: str | None = None

    def commit(self, revision: str) -> str | None:
        """40 hex digits, None for an unknown revision."""
        ids = {name: hashlib.sha1(name.encode()).hexdigest() for name in self.revisions}
        return next((sha for name, sha in ids.items() if revision in (name, sha)), None)

    def file(self, commit: str, path: str) -> Path:
        folder = next(folder for name, folder in self.revisions.items() if self.commit(name) == commit)
        return folder / path


@dataclass
class Hub:
    """`breaks`: how many bytes of a file are sent, each time that it is asked for, before the connection is lost."""

    url: str
    storage: str  # where large files are, another address as the real one's
    repos: dict[str, Repo] = field(default_factory=dict)
    breaks: dict[str, list[int]] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range

    def sent(self, name: str) -> list[str | None]:
        """The ranges of a file that were asked for, None for all of it."""
        return [r for method, path, r in self.asked if method == "GET" and path.startswith("/lfs/") and name in path]


@contextmanager
def running() -> Iterator[Hub]:
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _Handler) for _ in range(2)]
    hub = Hub(*(f"http://127.0.0.1:{server.server_port}" for server in servers))
    threads = [Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.daemon_threads = True
        server.hub = hub  # type: ignore[attr-defined]
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers["Range"]))
        match path.strip("/").split("/"):
            case ["api", "models", owner, name, "revision" | "tree" as what, revision]:
                repo, prefix = hub.repos.get(f"{owner}/{name}"), ""
            case [owner, name, "resolve" as what, revision, *rest]:
                repo, prefix = hub.repos.get(f"{owner}/{name}"), "/".join(rest)
            case ["lfs", owner, name, commit, *rest]:
                return self._file(hub, hub.repos[f"{owner}/{name}"].file(commit, "/".join(rest)))
            case _:
                return self._error(404, "", "no such route")
        if repo is None:
            return self._error(401, "RepoNotFound", "Invalid username or password.")
        sha = repo.commit(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        folder = repo.file(sha, "")
        if what == "revision":
            return self._json({"id": f"{owner}/{name}", "sha": sha, "siblings": []})
        if what == "tree":
            return self._json([_entry(folder, p) for p in sorted(folder.rglob("*")) if p.is_file()])
        if repo.token is not None and self.headers["Authorization"] != f"Bearer {repo.token}":
            code = 403 if self.headers["Authorization"] else 401
            return self._error(code, "GatedRepo", f"Access to model {owner}/{name} is restricted.")
        file = folder / prefix
        if not file.is_file():
            return self._error(404, "EntryNotFound", "Entry not found")
        if file.name.endswith(LARGE):
            to = f"/lfs/{owner}/{name}/{sha}/{prefix}"
            linked = {"X-Linked-Etag": f'"{_sha256(file)}"', "X-Linked-Size": str(file.stat().st_size)}
            return self._reply(302, b"", {"Location": hub.storage + to, "X-Repo-Commit": sha, **linked})
        data = file.read_bytes()
        self._reply(200, data, {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": sha})

    def _file(self, hub: Hub, file: Path) -> None:
        data, asked = file.read_bytes(), self.headers["Range"]
        first, _, last = asked.removeprefix("bytes=").partition("-") if asked else ("0", "", "")
        start, stop = int(first), min(len(data), int(last) + 1 if last else len(data))
        more = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"} if asked else {}
        left = hub.breaks.get(file.name)
        self._reply(206 if asked else 200, data[start:stop], more, left.pop(0) if left else None)

    def _json(self, value: Any) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        self._reply(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _reply(self, status: int, body: bytes, headers: dict[str, str], most: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:most])
        if most is not None:
            self.close_connection = True


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    entry = {"type": "file", "path": str(path.relative_to(folder)), "size": len(data), "oid": _blob(data)}
    if path.name.endswith(LARGE):
        entry["lfs"] = {"oid": _sha256(path), "size": len(data), "pointerSize": 134}
    return entry


def _blob(data: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
