"""A Hub on loopback: the part of the Hugging Face Hub's HTTP API that `huggingface_hub`'s own client uses.

Repositories of models with branches, pull requests, private ones, access tokens; large files by Git LFS (basic and
multipart), small ones in the commit; downloads through a redirect, with ranges. Everything is kept in memory. Objects
are kept under their hashes, and one whose bytes do not have its hash is refused, as on the Hub.

`HubServer.faults` holds the faults to inject into the next requests, and counts those that were.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import socket
import struct
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from card_rules import metadata_errors


# What the Hub's own `.gitattributes` of a new repository sends to LFS
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".h5", ".model")
LFS_FROM_BYTES = 10_000_000


class InvalidRequest(Exception):
    """Answered with its status, and the headers by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class Cut(Exception):
    """The connection is closed without another word."""


@dataclass
class Fault:
    """What happens to the next `times` requests whose `METHOD path` matches `where`.

    `kind` is one of
    - `status`: answered with `status`; a 429 asks to be tried again in `retry_after` seconds.
    - `cut_request`, `cut_response`: the connection is reset after `at` bytes of the body.
    - `corrupt_request`: the byte at `at` of the body arrives as another one.
    - `corrupt`: the byte at `at` of the answer is another one. `truncate`: the answer ends, in good order, at `at`.
    - `stall`: after `at` bytes of the answer nothing more comes.
    - `lose_answer`: what is asked is done, and the connection is reset before the answer.
    - `call`: `action` is called when `at` bytes of the body, of request or answer, have gone over.
    """

    where: str
    kind: str
    at: int = 0
    status: int = 503
    retry_after: int | None = None
    times: int = 1
    action: Callable[[], None] | None = None
    hits: int = 0


@dataclass
class Commit:
    oid: str
    files: dict[str, tuple[str, str]]  # path to ("lfs", sha256) or ("git", sha1)
    title: str


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class User:
    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


def git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """The server. `url` is what `HF_ENDPOINT` takes; `users` maps access tokens to their owners.

    Args:
        part_bytes: files larger than this are uploaded in parts.
    """

    def __init__(self, part_bytes: int = 5_000_000):
        self.part_bytes = part_bytes
        self.users: dict[str, User] = {}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.received: Counter[str] = Counter()  # bytes of bodies by kind of request
        self.lock = threading.RLock()
        self.stopped = threading.Event()
        self.numbers = itertools.count(1)
        self.tokens: dict[str, str] = {}
        self.environment: dict[str, str] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        # Large files lie on another server than the API, as on the Hub: the client sends no token there
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def __enter__(self) -> HubServer:
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def create(self, repo_id: str, private: bool = False, repo_type: str = "model") -> Repository:
        repository = Repository(private)
        self.repositories[repo_type, repo_id] = repository
        self.commit(repository, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, title="initial commit")
        return repository

    def commit(self, repository: Repository, ref: str, new: dict[str, bytes], deleted=(), title="commit") -> str:
        """Commits files, as somebody else's client would."""
        entries = {}
        for path, data in new.items():
            entries[path] = self.store(path, data)
        return self.commit_entries(repository, ref, entries, deleted, title)

    def store(self, path: str, data: bytes) -> tuple[str, str]:
        is_large = path.endswith(LFS_SUFFIXES) or len(data) > LFS_FROM_BYTES
        oid = hashlib.sha256(data).hexdigest() if is_large else git_blob_id(data)
        self.objects[oid] = data
        return ("lfs" if is_large else "git", oid)

    def commit_entries(self, repository, ref, entries, deleted=(), title="commit") -> str:
        with self.lock:
            head = repository.refs.get(ref)
            files = dict(repository.commits[head].files) if head else {}
            for path in deleted:
                files.pop(path, None)
            files.update(entries)
            seed = f"{next(self.numbers)} {head} {sorted(files.items())} {title}"
            oid = hashlib.sha1(seed.encode()).hexdigest()
            repository.commits[oid] = Commit(oid, files, title)
            repository.refs[ref] = oid
            return oid

    def files(self, repo_id: str, ref: str = "main") -> dict[str, bytes]:
        """Contents of a repository's files by path."""
        repository = self.repositories["model", repo_id]
        return {path: self.objects[oid] for path, (_, oid) in repository.commits[repository.refs[ref]].files.items()}

    def has(self, data: bytes) -> bool:
        """Whether an object with these bytes has arrived."""
        return hashlib.sha256(data).hexdigest() in self.objects

    def inject(self, where: str, kind: str, **fields) -> Fault:
        """Adds a fault to `faults`; see `Fault`."""
        self.faults.append(Fault(where, kind, **fields))
        return self.faults[-1]

    def take_fault(self, request: str, *kinds: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.kind in kinds and fault.hits < fault.times and re.search(fault.where, request):
                    fault.hits += 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    timeout = 20
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's acknowledgement

    def log_message(self, *arguments: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do_any(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        self.request_line = f"{self.command} {url.path}"
        self.hub.requests.append(self.request_line)
        try:
            if fault := self.hub.take_fault(self.request_line, "status"):
                self.read_body()
                headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                return self.answer(fault.status, b"", headers)
            body = self.read_body()
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method:
                    parts = {name: urllib.parse.unquote(part) for name, part in match.groupdict("").items()}
                    return function(self, body, **parts)
            raise InvalidRequest(404, f"no such path: {url.path}")
        except InvalidRequest as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self.answer_json({"error": error.message}, error.status, headers)
        except Cut:
            self.reset()

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def reset(self) -> None:
        # A reset instead of an orderly end, as a lost connection gives
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        self.wfile = self.rfile = _Nothing()  # type: ignore[assignment]

    def read_body(self) -> bytes:
        if not int(self.headers.get("Content-Length") or 0) and not self.headers.get("Transfer-Encoding"):
            return b""
        fault = self.hub.take_fault(self.request_line, "cut_request", "corrupt_request", "call")
        body = bytearray()
        for piece in self.pieces():
            body += piece
            if fault is not None and len(body) >= fault.at:
                if fault.kind == "cut_request":
                    raise Cut
                if fault.kind == "corrupt_request":
                    body[fault.at % len(body)] ^= 1
                else:
                    assert fault.action is not None
                    fault.action()
                fault = None
        self.hub.received["PUT" if self.command == "PUT" else "other"] += len(body)
        return bytes(body)

    def pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline() or b"0", 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers["Content-Length"])
        while left:
            piece = self.rfile.read(min(left, 4096))
            if not piece:
                raise Cut
            left -= len(piece)
            yield piece

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        kinds = ("cut_response", "corrupt", "truncate", "stall", "lose_answer")
        fault = None
        if self.command != "HEAD":
            fault = self.hub.take_fault(self.request_line, *kinds)
            if fault is None and body and self.command == "GET":
                fault = self.hub.take_fault(self.request_line, "call")
        if fault is not None and fault.kind == "lose_answer":
            raise Cut
        if fault is not None and fault.kind == "corrupt":
            at = fault.at % len(body)
            body = body[:at] + bytes([body[at] ^ 0x10]) + body[at + 1 :]
        if fault is not None and fault.kind == "truncate":
            body = body[: fault.at % len(body)]
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = fault.at % len(body) if fault is not None and body and fault.kind != "corrupt" else len(body)
        if fault is None or fault.kind in ("corrupt", "truncate"):
            sent = len(body)
        self.wfile.write(body[:sent])
        self.wfile.flush()
        if fault is not None and fault.kind == "cut_response":
            raise Cut
        if fault is not None and fault.kind == "stall":
            self.hub.stopped.wait(5)
            raise Cut
        if fault is not None and fault.kind == "call":
            assert fault.action is not None
            fault.action()
            self.wfile.write(body[sent:])

    def answer_json(self, data: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    # Who asks

    def user(self) -> User | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise InvalidRequest(401, "Invalid credentials in Authorization header")
        return user

    def may_write(self, repo_id: str) -> bool:
        user = self.user()
        namespace = repo_id.split("/")[0]
        return user is not None and user.role == "write" and (namespace == user.name or namespace in user.orgs)

    def repository(self, repo_id: str, repo_type: str = "model", write: bool = False) -> Repository:
        found = self.hub.repositories.get((repo_type, repo_id))
        user = self.user()
        is_member = user is not None and repo_id.split("/")[0] in (user.name, *user.orgs)
        if found is None or (found.private and not is_member):
            # The Hub does not tell which of the two it is
            raise InvalidRequest(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not self.may_write(repo_id):
            raise InvalidRequest(403, "You have no write access to this repository")
        return found

    def revision(self, repository: Repository, revision: str) -> Commit:
        oid = repository.refs.get(revision) or repository.tags.get(revision) or revision
        if oid not in repository.commits:
            raise InvalidRequest(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository.commits[oid]

    # The API

    def whoami(self, body: bytes) -> None:
        user = self.user()
        if user is None:
            raise InvalidRequest(401, "Invalid username or password.")
        orgs = [{"name": name, "roleInOrg": "write"} for name in user.orgs]
        token = {"displayName": "test", "role": user.role}
        self.answer_json({"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": token}})

    def create_repo(self, body: bytes) -> None:
        fields = json.loads(body)
        user = self.user()
        namespace = fields["organization"] or (user.name if user else "")
        repo_id, repo_type = f"{namespace}/{fields['name']}", fields.get("type") or "model"
        if not self.may_write(repo_id):
            raise InvalidRequest(403, f"You don't have the rights to create a {repo_type} under this namespace")
        status = 409 if (repo_type, repo_id) in self.hub.repositories else 200
        if status == 200:
            is_private = fields.get("visibility") == "private" or bool(fields.get("private"))
            self.hub.create(repo_id, is_private, repo_type)
        self.answer_json({"url": f"{self.hub.url}/{repo_id}"}, status)

    def info(self, body: bytes, kind: str, repo_id: str, revision: str = "main") -> None:
        repository = self.repository(repo_id, kind)
        commit = self.revision(repository, revision)
        siblings = [self.entry(path, *stored)[1] for path, stored in sorted(commit.files.items())]
        self.answer_json(
            {"id": repo_id, "sha": commit.oid, "private": repository.private, "siblings": siblings, "tags": []}
        )

    def entry(self, path: str, kind: str, oid: str) -> tuple[dict, dict]:
        size = len(self.hub.objects[oid])
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
        tree = {"type": "file", "path": path, "size": size, "oid": oid if kind == "git" else git_blob_id(pointer)}
        sibling = {"rfilename": path, "size": size, "blobId": tree["oid"]}
        if kind == "lfs":
            tree["lfs"] = {"oid": oid, "size": size, "pointerSize": len(pointer)}
            sibling["lfs"] = {"sha256": oid, "size": size, "pointerSize": len(pointer)}
        return tree, sibling

    def tree(self, body: bytes, repo_id: str, revision: str) -> None:
        commit = self.revision(self.repository(repo_id), revision)
        self.answer_json([self.entry(path, *stored)[0] for path, stored in sorted(commit.files.items())])

    def paths_info(self, body: bytes, repo_id: str, revision: str) -> None:
        commit = self.revision(self.repository(repo_id), revision)
        paths = urllib.parse.parse_qs(body.decode()).get("paths", [])
        self.answer_json([self.entry(path, *commit.files[path])[0] for path in paths if path in commit.files])

    def refs(self, body: bytes, repo_id: str) -> None:
        repository = self.repository(repo_id)

        def listed(refs: dict[str, str], prefix: str) -> list[dict]:
            return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in refs.items()]

        branches = {name: oid for name, oid in repository.refs.items() if not name.startswith("refs/pr/")}
        pull_requests = {name: oid for name, oid in repository.refs.items() if name.startswith("refs/pr/")}
        self.answer_json(
            {
                "branches": listed(branches, "refs/heads/"),
                "converts": [],
                "tags": listed(repository.tags, "refs/tags/"),
                "pullRequests": listed(pull_requests, ""),
            }
        )

    def branch(self, body: bytes, repo_id: str, name: str) -> None:
        repository = self.repository(repo_id, write=True)
        if name in repository.refs:
            raise InvalidRequest(409, "Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint") or "main"
        repository.refs[name] = self.revision(repository, start).oid
        self.answer_json({})

    def auth_check(self, body: bytes, repo_id: str, write: str = "") -> None:
        self.repository(repo_id, write=bool(write))
        self.answer_json({})

    def validate_yaml(self, body: bytes) -> None:
        fields = json.loads(body)
        errors = metadata_errors(fields["content"]) if fields["repoType"] == "model" else []
        if errors is None:
            return self.answer_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.answer_json(answer, 400 if errors else 200)

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, write=not self.query.get("create_pr"))
        commit = self.revision(repository, revision)
        answer = []
        for file in json.loads(body)["files"]:
            is_large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_FROM_BYTES
            stored = commit.files.get(file["path"])
            answer.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large else "regular",
                    "shouldIgnore": False,
                    "oid": stored[1] if stored else None,
                }
            )
        self.answer_json({"files": answer})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        self.repository(repo_id)
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                upload: dict = {"href": f"{self.hub.storage_url}/lfs/basic/{oid}"}
                if size > self.hub.part_bytes:
                    count = -(-size // self.hub.part_bytes)
                    header = {f"{i + 1}": f"{self.hub.storage_url}/lfs/part/{oid}/{i + 1}" for i in range(count)}
                    upload = {
                        "href": f"{self.hub.url}/lfs/complete/{oid}",
                        "header": {"chunk_size": str(self.hub.part_bytes), **header},
                    }
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify/{repo_id}"}}
            objects.append(entry)
        self.answer_json({"objects": objects})

    def keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise InvalidRequest(422, f"the object's bytes do not have the hash {oid}")
        self.hub.objects[oid] = data

    def lfs_basic(self, body: bytes, oid: str) -> None:
        self.keep(oid, body)
        self.answer(200)

    def lfs_part(self, body: bytes, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = body
        self.answer(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def lfs_complete(self, body: bytes, oid: str) -> None:
        numbers = sorted(part["partNumber"] for part in json.loads(body)["parts"])
        self.keep(oid, b"".join(self.hub.parts[oid, number] for number in numbers))
        self.answer_json({})

    def lfs_verify(self, body: bytes, repo_id: str) -> None:
        fields = json.loads(body)
        if len(self.hub.objects.get(fields["oid"], b"")) != fields["size"]:
            raise InvalidRequest(404, "no such object")
        self.answer_json({})

    def make_commit(self, body: bytes, repo_id: str, revision: str) -> None:
        create_pr = bool(self.query.get("create_pr"))
        repository = self.repository(repo_id, write=not create_pr)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if revision not in repository.refs:
            raise InvalidRequest(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if header.get("parentCommit") not in (None, repository.refs[revision]):
            raise InvalidRequest(412, "A commit has happened since. Please refresh and try again.")
        entries: dict[str, tuple[str, str]] = {}
        deleted = []
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                data = base64.b64decode(value["content"])
                self.hub.objects[git_blob_id(data)] = data
                entries[value["path"]] = ("git", git_blob_id(data))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise InvalidRequest(400, f"{value['path']}: its LFS object was not uploaded")
                entries[value["path"]] = ("lfs", value["oid"])
            elif line["key"] == "deletedFile":
                if value["path"] not in repository.commits[repository.refs[revision]].files:
                    raise InvalidRequest(404, "A file with this name doesn't exist", "EntryNotFound")
                deleted.append(value["path"])
            else:
                raise InvalidRequest(400, f"unknown operation {line['key']}")
        answer = {}
        if create_pr:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            repository.refs[f"refs/pr/{number}"] = repository.refs[revision]
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        oid = self.hub.commit_entries(repository, revision, entries, deleted, header["summary"])
        self.answer_json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid, **answer})

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        commit = self.revision(self.repository(repo_id), revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer(404, b"", headers)
        kind, oid = commit.files[path]
        data = self.hub.objects[oid]
        headers |= {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if kind == "lfs":
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
            return self.answer(302, b"", {**headers, "Location": f"{self.hub.storage_url}/cdn/{oid}"})
        self.content(data, headers)

    def cdn(self, body: bytes, oid: str) -> None:
        self.content(self.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def content(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self.answer(200, data, headers)
        start = int(wanted[1])
        stop = min(int(wanted[2]) + 1, len(data)) if wanted[2] else len(data)
        if start >= len(data):
            return self.answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
        self.answer(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


class _Nothing:
    """Stands for the files of a connection that was reset."""

    closed = True

    def __getattr__(self, name: str) -> Callable:
        return lambda *arguments: b""


ID = r"(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", f"/api/(?P<kind>model|dataset|space)s/{ID}", _Handler.info),
    ("GET", f"/api/(?P<kind>model|dataset|space)s/{ID}/revision/{REVISION}", _Handler.info),
    ("GET", f"/api/models/{ID}/tree/{REVISION}", _Handler.tree),
    ("POST", f"/api/models/{ID}/paths-info/{REVISION}", _Handler.paths_info),
    ("GET", f"/api/models/{ID}/refs", _Handler.refs),
    ("POST", f"/api/models/{ID}/branch/(?P<name>[^/]+)", _Handler.branch),
    ("GET", f"/api/models/{ID}/auth-check(?P<write>/write)?", _Handler.auth_check),
    ("POST", f"/api/models/{ID}/preupload/{REVISION}", _Handler.preupload),
    ("POST", f"/api/models/{ID}/commit/{REVISION}", _Handler.make_commit),
    ("POST", f"/{ID}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/basic/(?P<oid>[0-9a-f]{64})", _Handler.lfs_basic),
    ("PUT", "/lfs/part/(?P<oid>[0-9a-f]{64})/(?P<number>[0-9]+)", _Handler.lfs_part),
    ("POST", "/lfs/complete/(?P<oid>[0-9a-f]{64})", _Handler.lfs_complete),
    ("POST", f"/lfs/verify/{ID}", _Handler.lfs_verify),
    ("GET", "/cdn/(?P<oid>[0-9a-f]{64})", _Handler.cdn),
    ("GET HEAD", f"/{ID}/resolve/{REVISION}/(?P<path>.+)", _Handler.resolve),
]
