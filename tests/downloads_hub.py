"""The stand-in hub with accounts and their rights, uploads in parts, models to download, links that expire, and faults.

standin_hub has the half of the protocol that a first upload needs, of one who may do everything.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from standin_hub import ID, REVISION, Handler, Refusal, StandInHub, is_lfs

# A data set's repository among those of models.
DATA_SET = rf"(datasets/{ID[1:-1]})"


@dataclass(frozen=True)
class Account:
    """Whom a token belongs to, and what it may do there."""

    name: str
    may_write: bool = True
    organisations: tuple[str, ...] = ()
    # Such a token is for some repositories and some rights, of which whoami does not tell here.
    fine_grained: bool = False

    @property
    def role(self) -> str:
        """What whoami calls its token's rights."""
        return "fineGrained" if self.fine_grained else "write" if self.may_write else "read"

    def owns(self, repo_id: str) -> bool:
        """Whether a repository is its own or one of its organisations'."""
        return repo_id.split("/")[0] in (self.name, *self.organisations)


@dataclass
class Fault:
    """So many requests, whose "METHOD path" is of this pattern, get this answer; status None: the connection is cut half-way."""

    request: str
    status: int | None
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    times: int = 1


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit, as listings have it."""

    path: str
    sha256: str
    size: int
    lfs: bool
    git_hash: str

    @property
    def oid(self) -> str:
        """What the hub compares: the sha256 of LFS files, git's own hash of others."""
        return self.sha256 if self.lfs else self.git_hash

    def lfs_details(self, key: str) -> dict:
        """What listings say of an LFS file; the name of the hash differs between them."""
        return {"lfs": {key: self.sha256, "size": self.size, "pointerSize": 134}} if self.lfs else {}

    def row(self) -> dict:
        """Its line in a listing of the tree."""
        return {"type": "file", "oid": self.git_hash, "size": self.size, "path": self.path, **self.lfs_details("oid")}


@dataclass
class Repository:
    """A model repository: who sees it, and its commits, oldest first, each an id and {path: sha256 of the bytes}.

    If it is gated, only those may have its files to whom access was granted.
    """

    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    commits: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def commit(self, files: Mapping[str, str]) -> str:
        """Add a commit that consists of these files; return its id."""
        parent = self.commits[-1][0] if self.commits else ""
        identity = hashlib.sha1(json.dumps([parent, sorted(files.items())]).encode()).hexdigest()
        self.commits.append((identity, dict(files)))
        return identity


class DownloadsHandler(Handler):
    """The routes of the upload by accounts of all kinds, and those of the download."""

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        if (fault := self.server.next_fault(f"{self.command} {path}")) is None:
            super().serve()
        elif fault.status is None:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(fault.status, {"error": fault.message}, fault.headers)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def account(self) -> Account | None:
        """Whose token came with the request; None without a token."""
        given = self.headers.get("Authorization")
        if given is None:
            return None
        if given.removeprefix("Bearer ") not in self.server.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server.tokens[given.removeprefix("Bearer ")]

    def authorize(self) -> None:
        """Each route asks for the rights that it needs."""

    def demand(self, repo_id: str | None = None, write: bool = False) -> None:
        """Refuse who may not ask this."""
        account = self.account()
        if account is None and (write or repo_id is None):
            raise Refusal(401, "Invalid username or password.")
        if write and not (account.may_write and account.owns(repo_id)):
            raise Refusal(403, f"You don't have the rights to write to {repo_id}")

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        """The repository, if the caller may know of it and, to `write`, change it."""
        # To anyone else a private one does not exist.
        account, repository = self.account(), self.server.repositories.get(repo_id)
        if repository is None or (repository.private and not (account and account.owns(repo_id))):
            raise Refusal(404 if account else 401, "Repository not found", "RepoNotFound")
        self.demand(repo_id, write)
        return repository

    def stored(self, path: str, sha256: str) -> StoredFile:
        file = self.server.objects / sha256
        size = file.stat().st_size
        lfs = is_lfs(path, size)
        # What git has of an LFS file is a pointer.
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        data = pointer.encode() if lfs else file.read_bytes()
        return StoredFile(path, sha256, size, lfs, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())

    def commit_at(self, repository: Repository, revision: str | None) -> tuple[str, dict[str, StoredFile]]:
        for identity, files in reversed(repository.commits):
            if revision in (None, "main", identity):
                return identity, {path: self.stored(path, sha256) for path, sha256 in sorted(files.items())}
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def model_info(self, repo_id: str, revision: str | None) -> None:
        repository = self.repository(repo_id)
        identity, files = self.commit_at(repository, revision)
        self.answer(200, {
            "_id": identity[:24], "id": repo_id, "modelId": repo_id, "sha": identity, "private": repository.private,
            "gated": False, "xetEnabled": False, "tags": [],
            "siblings": [{"rfilename": path, "size": file.size, "blobId": file.git_hash, **file.lfs_details("sha256")}
                         for path, file in files.items()],
        })

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        self.demand(repo_id, write=True)
        if repo_id in self.server.repositories:
            raise Refusal(409, "You already created this model repo")
        self.server.repositories[repo_id] = repository = Repository(private=bool(asked.get("private")))
        repository.commit({})
        self.answer(200, {"url": f"{self.server.url}/{repo_id}", "name": repo_id})

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        _, files = self.commit_at(self.repository(repo_id), revision)
        below = {path: file for path, file in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not below:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        rows = [file.row() for path, file in below.items()]
        if "recursive=true" not in urlsplit(self.path).query.lower():
            depth = folder.count("/") + 2 if folder else 1
            rows = [row for row in rows if row["path"].count("/") < depth] + [
                {"type": "directory", "oid": "", "size": 0, "path": path}
                for path in {"/".join(path.split("/")[:depth]) for path in below if path.count("/") >= depth}]
        self.answer(200, rows)

    def preupload(self, repo_id: str, revision: str) -> None:
        _, there = self.commit_at(self.repository(repo_id, write=True), None)
        self.answer(200, {"files": [
            # By oid the client sees that a file is there already, unchanged.
            {"path": file["path"], "shouldIgnore": False, "oid": there[file["path"]].oid if file["path"] in there else None,
             "uploadMode": "lfs" if is_lfs(file["path"], file["size"]) else "regular"}
            for file in json.loads(self.body)["files"]
        ]})

    def whoami(self) -> None:
        self.demand()
        account = self.account()
        self.answer(200, {
            "type": "user", "name": account.name, "orgs": [{"name": name} for name in account.organisations],
            "auth": {"type": "access_token", "accessToken": {"role": account.role}},
        })

    def lfs_batch(self, repo_id: str) -> None:
        self.repository(repo_id, write=True)
        answers = []
        for asked in json.loads(self.body)["objects"]:
            link = f"{self.server.url}/objects/{asked['oid']}"
            upload = {"href": link, "header": self.parts(link, asked["size"])}
            # An object that is there already gets no actions: the client skips it.
            stored = (self.server.objects / asked["oid"]).exists()
            answers.append({**asked, **({} if stored else {"actions": {"upload": upload}})})
        self.answer(200, {"transfer": "basic", "objects": answers})

    def parts(self, link: str, size: int) -> dict[str, str]:
        """Where the parts of a file go that is not uploaded in one piece; nothing for one that is."""
        count = -(-size // self.server.part_size)
        return {} if count == 1 else {"chunk_size": str(self.server.part_size),
                                      **{str(part): f"{link}/{part}" for part in range(1, count + 1)}}

    def upload(self, sha256: str, part: str | None = None) -> None:
        if part in (None, "1") and not self.server.may_transfer():
            raise Refusal(403, "Request has expired")
        if part is None:
            super().upload(sha256)
        else:
            (self.server.objects / f"{sha256}.{part}").write_bytes(self.body)
            self.answer(200, None, {"ETag": f'"{hashlib.sha256(self.body).hexdigest()}"'})

    def complete_parts(self, sha256: str) -> None:
        """Join the parts of an object."""
        parts = [self.server.objects / f"{sha256}.{part['partNumber']}" for part in json.loads(self.body)["parts"]]
        whole = self.server.objects / f"{sha256}.whole"
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
        if hashlib.sha256(whole.read_bytes()).hexdigest() != sha256:
            raise Refusal(400, "The parts are not the object announced")
        os.replace(whole, self.server.objects / sha256)
        for part in parts:
            part.unlink()
        self.answer(200, {})

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, write=True)
        files = dict(repository.commits[-1][1])
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = self.server.store(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if not (self.server.objects / value["oid"]).exists():
                    raise Refusal(400, f"The object of {value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        identity = repository.commit(files)
        self.answer(200, {"success": True, "commitOid": identity,
                          "commitUrl": f"{self.server.url}/{repo_id}/commit/{identity}"})

    def downloadable(self, repo_id: str) -> Repository:
        """The repository, if the caller may have its files: a gated one's information is public, its files are not."""
        account, repository = self.account(), self.repository(repo_id)
        if repository.gated and not (account and (account.name in repository.granted or account.owns(repo_id))):
            raise Refusal(403 if account else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
        return repository

    def auth_check(self, repo_id: str) -> None:
        self.downloadable(repo_id)
        self.answer(200, {})

    def paths_info(self, repo_id: str, revision: str) -> None:
        _, files = self.commit_at(self.repository(repo_id), revision)
        asked = parse_qs(self.body.decode()).get("paths", [])
        self.answer(200, [files[path].row() for path in asked if path in files])

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.downloadable(repo_id)
        identity, files = self.commit_at(repository, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = files[path]
        headers = {"X-Repo-Commit": identity, "ETag": f'"{file.oid}"'}
        if file.lfs:
            self.answer(302, None, {**headers, "X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size),
                                    "Location": f"{self.server.url}/objects/{file.sha256}"})
        elif self.command == "HEAD":
            self.answer(200, None, {**headers, "Content-Length": str(file.size)})
        else:
            self.answer(200, (self.server.objects / file.sha256).read_bytes(), headers)

    def download(self, sha256: str) -> None:
        """What the hub's signed links lead to; like those it asks for no token."""
        file = self.server.objects / sha256
        size = file.stat().st_size
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        whole = self.server.may_transfer()
        if not whole and self.server.transfers_allowed < -1:
            raise Refusal(403, "Request has expired")
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        with open(file, "rb") as stream:
            stream.seek(start)
            if whole:
                shutil.copyfileobj(stream, self.wfile)
            else:
                self.wfile.write(stream.read((size - start) // 2))
                self.close_connection = True

    routes = [
        *Handler.routes,
        ("PUT", r"/objects/([0-9a-f]{64})/(\d+)", "upload"),
        ("POST", r"/objects/([0-9a-f]{64})", "complete_parts"),
        ("GET", rf"/api/models/{ID}/auth-check", "auth_check"),
        ("POST", rf"/api/models/{ID}/paths-info/{REVISION}", "paths_info"),
        ("GET|HEAD", r"/objects/([0-9a-f]{64})", "download"),
        ("GET|HEAD", rf"/{ID}/resolve/{REVISION}/(.+)", "resolve"),
        # Data sets: what datasets.load_dataset asks.
        ("GET", rf"/api/{DATA_SET}(?:/revision/{REVISION})?", "model_info"),
        ("GET", rf"/api/{DATA_SET}/tree/{REVISION}(?:/(.+))?", "tree"),
        ("POST", rf"/api/{DATA_SET}/paths-info/{REVISION}", "paths_info"),
        ("GET|HEAD", rf"/{DATA_SET}/resolve/{REVISION}/(.+)", "resolve"),
    ]


class DownloadsHub(StandInHub):
    """The server with several accounts, and with what others have published.

    Args:
        tokens: the accounts that exist, by token.
        part_size: larger files are uploaded in parts of this many bytes.

    Attributes:
        transfers_allowed: how many more large files are transferred, either way, before links expire (403); a download
            that is one too many is cut in the middle first. None: all.
        faults: what happens instead of an answer.
    """

    handler = DownloadsHandler

    def __init__(self, folder: Path, tokens: Mapping[str, Account], part_size: int = 64_000_000):
        super().__init__(folder, "")
        self.tokens, self.part_size = dict(tokens), part_size
        self.requests: list[tuple[str, str]] = []
        self.transfers_allowed: int | None = None
        self.faults: list[Fault] = []
        self.lock = threading.Lock()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The bytes of every file of a model's newest commit."""
        commits = self.repositories[repo_id].commits
        return {path: (self.objects / sha256).read_bytes() for path, sha256 in commits[-1][1].items()} if commits else {}

    def next_fault(self, request: str) -> Fault | None:
        """The fault that this request meets; counts it."""
        with self.lock:
            fault = next((fault for fault in self.faults if fault.times and re.fullmatch(fault.request, request)), None)
            if fault:
                fault.times -= 1
            return fault

    def may_transfer(self) -> bool:
        """Count one transfer of a large file."""
        with self.lock:
            if self.transfers_allowed is None:
                return True
            self.transfers_allowed -= 1
            return self.transfers_allowed >= 0

    def add_model(self, repo_id: str, files: Mapping[str, bytes], **rights) -> str:
        """Publish a model (datasets/OWNER/NAME: a data set) with these files; `rights` are Repository's fields."""
        repository = self.repositories.setdefault(repo_id, Repository(**rights))
        return repository.commit({path: self.store(data) for path, data in files.items()})
