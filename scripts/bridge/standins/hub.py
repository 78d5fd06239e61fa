"""A stand-in for the Hugging Face Hub's server, for tests and rehearsals where no hub can be reached.

It is a fake, and the only fake part: clients talk to it over HTTP with the real `huggingface_hub` (HF_ENDPOINT), which
asks and transfers as it would with the real hub. It answers the part of the protocol that the upload stage
uses: accounts, rights, LFS (in one piece or in parts) and commits; the tests add downloads. It does
not offer Xet. The status codes and X-Error-Code headers are those that huggingface_hub 0.34 looks at.

    with StandInHub(folder, tokens={"hf_alice": Account("alice")}) as hub:
        subprocess.run(command, env={**os.environ, **hub.env("hf_alice")})
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

# The hub keeps these outside git; so does it with anything larger than 10 MB.
LFS_NAMES = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|model)")
LFS_SIZE = 10_000_000
INVALID_TOKEN = "Invalid credentials in Authorization header"


@dataclass(frozen=True)
class Account:
    """Whom a token belongs to, and what it may do there."""

    name: str
    may_write: bool = True
    organisations: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit; its bytes lie in the folder of objects under their sha256."""

    sha256: str
    size: int
    lfs: bool
    git_hash: str

    @property
    def oid(self) -> str:
        """What the hub compares: the sha256 of LFS files, git's own hash of others."""
        return self.sha256 if self.lfs else self.git_hash


@dataclass
class Repository:
    """A model repository: its rights, and its commits, oldest first."""

    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    commits: list[tuple[str, dict[str, StoredFile]]] = field(default_factory=list)

    def commit(self, files: Mapping[str, StoredFile]) -> str:
        """Add a commit that consists of these files; return its id."""
        parent = self.commits[-1][0] if self.commits else ""
        listing = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        identity = hashlib.sha1(f"{parent}\n{listing}".encode()).hexdigest()
        self.commits.append((identity, dict(files)))
        return identity


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class StandInHub:
    """The server; runs in a thread of its own between __enter__ and __exit__.

    Args:
        folder: where the bytes of files are stored, each under its sha256.
        tokens: the accounts that exist, by token.
        part_size: larger files are uploaded in parts of this many bytes.

    Attributes:
        requests: (method, path) of every request so far, in order.
        repositories: by OWNER/NAME.
        transfers_allowed: how many more large files are transferred, either way, before links expire (403); a download
            that is one too many is cut in the middle first. None: all.
    """

    # Of a subclass that answers more.
    handler: type["Handler"] | None = None

    def __init__(self, folder: Path, tokens: Mapping[str, Account], part_size: int = 64_000_000):
        self.objects = Path(folder) / "objects"
        self.objects.mkdir(parents=True, exist_ok=True)
        self.tokens = dict(tokens)
        self.part_size = part_size
        self.requests: list[tuple[str, str]] = []
        self.repositories: dict[str, Repository] = {}
        self.transfers_allowed: int | None = None
        self.lock = threading.Lock()

    def __enter__(self) -> "StandInHub":
        handler = type("Handler", (self.handler or Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def env(self, token: str | None = None) -> dict[str, str]:
        """What a client process needs in its environment to talk to this hub (a proxy could not reach it)."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
                **({"HF_TOKEN": token} if token else {})}

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The bytes of every file of a model's newest commit."""
        commits = self.repositories[repo_id].commits
        return {path: (self.objects / file.sha256).read_bytes() for path, file in commits[-1][1].items()} if commits else {}

    def store(self, path: str, data: bytes) -> StoredFile:
        """Store the bytes of a file."""
        digest = hashlib.sha256(data).hexdigest()
        (self.objects / digest).write_bytes(data)
        return StoredFile(digest, len(data), is_lfs(path, len(data)), git_hash(data))

    def may_transfer(self) -> bool:
        """Count one transfer of a large file."""
        with self.lock:
            if self.transfers_allowed is None:
                return True
            self.transfers_allowed -= 1
            return self.transfers_allowed >= 0


def is_lfs(path: str, size: int) -> bool:
    """Whether the hub keeps a file outside git."""
    return size > LFS_SIZE or bool(LFS_NAMES.fullmatch(path))


def git_hash(data: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request: find its route, check the rights, answer."""

    protocol_version = "HTTP/1.1"
    hub: StandInHub
    more_routes: list[tuple[str, str, Callable]] = []

    def log_message(self, *_arguments) -> None:
        """Requests are kept in hub.requests instead of being printed."""

    def answer(self, status: int, body: object = None, headers: Mapping[str, str] | None = None) -> None:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if not headers or "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def serve(self) -> None:
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        self.unread = int(self.headers.get("Content-Length", 0))
        self.hub.requests.append((self.command, path))
        try:
            for method, pattern, route in (*ROUTES, *self.more_routes):
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split("|"):
                    route(self, *match.groups())
                    return
            raise Refusal(404, f"The stand-in hub knows no {self.command} {path}")
        except Refusal as refusal:
            # What is left of the body would be taken for the next request.
            while self.unread:
                self.read(1 << 20)
            code = {"X-Error-Code": refusal.code} if refusal.code else {}
            self.answer(refusal.status, {"error": refusal.message}, {"X-Error-Message": refusal.message, **code})

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def read(self, size: int) -> bytes:
        """Read at most so many bytes of the request's body; nothing at its end or when the client is gone."""
        piece = self.rfile.read(min(size, self.unread))
        self.unread = self.unread - len(piece) if piece else 0
        return piece

    def body(self) -> bytes:
        return self.read(self.unread)

    # ---- rights

    def account(self) -> Account | None:
        """Whose token came with the request; None without a token."""
        given = self.headers.get("Authorization")
        if given is None:
            return None
        if given.removeprefix("Bearer ") not in self.hub.tokens:
            raise Refusal(401, INVALID_TOKEN)
        return self.hub.tokens[given.removeprefix("Bearer ")]

    def readable(self, repo_id: str) -> Repository:
        """The repository, if the caller may know of it. To anyone else a private one does not exist."""
        account, repository = self.account(), self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not (account and owns(account, repo_id))):
            raise Refusal(404 if account else 401, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, repo_id: str) -> Repository:
        """The repository, if the caller may write to it."""
        repository = self.readable(repo_id)
        self.check_write(repo_id)
        return repository

    def check_write(self, repo_id: str) -> Account:
        account = self.account()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        if not account.may_write or not owns(account, repo_id):
            raise Refusal(403, f"You don't have the rights to write to {repo_id}")
        return account

    # ---- information

    def whoami(self) -> None:
        account = self.account()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        self.answer(200, {
            "type": "user", "name": account.name, "orgs": [{"name": name} for name in account.organisations],
            "auth": {"type": "access_token", "accessToken": {"role": "write" if account.may_write else "read"}},
        })

    def commit_at(self, repository: Repository, revision: str | None) -> tuple[str, dict[str, StoredFile]]:
        if not repository.commits:
            repository.commit({})
        for identity, files in reversed(repository.commits):
            if revision in (None, "main", identity):
                return identity, files
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def model_info(self, repo_id: str, revision: str | None) -> None:
        repository = self.readable(repo_id)
        identity, files = self.commit_at(repository, revision)
        self.answer(200, {
            "_id": identity[:24], "id": repo_id, "modelId": repo_id, "sha": identity, "private": repository.private,
            "gated": "manual" if repository.gated else False, "xetEnabled": False, "tags": [],
            "siblings": [{"rfilename": path, "size": file.size, "blobId": file.git_hash, **lfs_details(file, "sha256")}
                         for path, file in sorted(files.items())],
        })

    def tree(self, repo_id: str, revision: str, below: str | None) -> None:
        _, files = self.commit_at(self.readable(repo_id), revision)
        start = f"{below}/" if below else ""
        self.answer(200, [row(path, file) for path, file in sorted(files.items()) if path.startswith(start)])

    # ---- upload

    def create(self) -> None:
        asked = json.loads(self.body())
        account = self.account()
        repo_id = f"{asked.get('organization') or (account and account.name)}/{asked['name']}"
        self.check_write(repo_id)
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repositories:
            self.answer(409, {"error": "You already created this model repo", "url": url})
            return
        self.hub.repositories[repo_id] = Repository(private=bool(asked.get("private")))
        self.answer(200, {"url": url, "name": repo_id})

    def validate_yaml(self) -> None:
        self.body()
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        _, files = self.commit_at(self.writable(repo_id), revision)
        self.answer(200, {"files": [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if is_lfs(file["path"], file["size"]) else "regular",
             "oid": files[file["path"]].oid if file["path"] in files else None}
            for file in json.loads(self.body())["files"]
        ]})

    def lfs_batch(self, repo_id: str) -> None:
        self.writable(repo_id)
        answers = []
        for asked in json.loads(self.body())["objects"]:
            oid, size = asked["oid"], asked["size"]
            link = f"{self.hub.url}/objects/{oid}"
            upload = {"href": link, "header": {}}
            if size > self.hub.part_size:
                parts = -(-size // self.hub.part_size)
                upload["header"] = {"chunk_size": str(self.hub.part_size),
                                    **{str(part): f"{link}/{part}" for part in range(1, parts + 1)}}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/objects/verify"}}
            # An object that is there already gets no actions: the client skips it.
            stored = (self.hub.objects / oid).exists()
            answers.append({"oid": oid, "size": size, **({} if stored else {"actions": actions})})
        self.answer(200, {"transfer": "basic", "objects": answers})

    def upload(self, sha256: str, part: str | None) -> None:
        """Store an object or a part of one. Like the hub's signed links it asks for no token."""
        if part in (None, "1") and not self.hub.may_transfer():
            raise Refusal(403, "Request has expired")
        name = f"{sha256}.{part}" if part else sha256
        temporary = self.hub.objects / f"{name}.{threading.get_ident()}"
        digest, size = hashlib.sha256(), self.unread
        with open(temporary, "wb") as stream:
            while piece := self.read(1 << 20):
                digest.update(piece)
                stream.write(piece)
        if temporary.stat().st_size < size or (part is None and digest.hexdigest() != sha256):
            temporary.unlink()
            raise Refusal(400, "The bytes are not those announced")
        os.replace(temporary, self.hub.objects / name)
        self.answer(200, None, {"ETag": f'"{digest.hexdigest()}"'})

    def complete_parts(self, sha256: str) -> None:
        """Join the parts of an object."""
        digest, whole = hashlib.sha256(), self.hub.objects / f"{sha256}.whole"
        parts = [self.hub.objects / f"{sha256}.{part['partNumber']}" for part in json.loads(self.body())["parts"]]
        with open(whole, "wb") as stream:
            for part in parts:
                data = part.read_bytes()
                digest.update(data)
                stream.write(data)
                part.unlink()
        if digest.hexdigest() != sha256:
            whole.unlink()
            raise Refusal(400, "The parts are not the object announced")
        os.replace(whole, self.hub.objects / sha256)
        self.answer(200, {})

    def verify(self, repo_id: str) -> None:
        self.writable(repo_id)
        asked = json.loads(self.body())
        file = self.hub.objects / asked["oid"]
        if not file.exists() or file.stat().st_size != asked["size"]:
            raise Refusal(404, "The object is not there")
        self.answer(200, {})

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self.writable(repo_id)
        files = dict(self.commit_at(repository, revision)[1])
        for line in self.body().decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = self.hub.store(value["path"], base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if not (self.hub.objects / value["oid"]).exists():
                    raise Refusal(400, f"The object of {value['path']} was not uploaded")
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {value['size']}\n"
                files[value["path"]] = StoredFile(value["oid"], value["size"], True, git_hash(pointer.encode()))
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        identity = repository.commit(files)
        self.answer(200, {"success": True, "commitOid": identity,
                          "commitUrl": f"{self.hub.url}/{repo_id}/commit/{identity}"})


def owns(account: Account, repo_id: str) -> bool:
    """Whether a repository is the account's own or one of its organisations'."""
    return repo_id.split("/")[0] in (account.name, *account.organisations)


def lfs_details(file: StoredFile, key: str) -> dict:
    """What listings say of an LFS file; the name of the hash differs between them."""
    return {"lfs": {key: file.sha256, "size": file.size, "pointerSize": 134}} if file.lfs else {}


def row(path: str, file: StoredFile) -> dict:
    """A file in a listing of the tree."""
    return {"type": "file", "oid": file.git_hash, "size": file.size, "path": path, **lfs_details(file, "oid")}


ID, REVISION = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"/api/models/{ID}(?:/revision/{REVISION})?", Handler.model_info),
    ("GET", rf"/api/models/{ID}/tree/{REVISION}(?:/(.+))?", Handler.tree),
    ("POST", rf"/api/models/{ID}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/api/models/{ID}/commit/{REVISION}", Handler.commit),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/{ID}\.git/info/lfs/objects/verify", Handler.verify),
    ("PUT", r"/objects/([0-9a-f]{64})(?:/(\d+))?", Handler.upload),
    ("POST", r"/objects/([0-9a-f]{64})", Handler.complete_parts),
]
