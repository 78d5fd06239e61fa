"""A stand-in for the Hugging Face Hub's server, for tests, where no hub can be reached.

It is a fake, and the only fake part: clients talk to it over HTTP with the real `huggingface_hub` (HF_ENDPOINT), which
asks and transfers as it would with the real hub. It answers what a first upload to a new repository asks: one account that may
do everything, LFS in one piece, and a commit; the tests add rights, histories, parts and downloads. It does not offer
Xet. The status codes and X-Error-Code headers are those that huggingface_hub 0.34 looks at.

    with StandInHub(folder, "hf_alice") as hub:
        subprocess.run(command, env={**os.environ, **hub.env("hf_alice")})
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

# The hub keeps these outside git; so does it with anything larger than 10 MB.
LFS_NAMES = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|model)")
LFS_SIZE = 10_000_000
ID, REVISION = r"([^/]+/[^/]+)", r"([^/]+)"


@dataclass
class Refusal(Exception):
    """An answer other than 200."""

    status: int
    message: str
    code: str | None = None


class Handler(BaseHTTPRequestHandler):
    """One request: find its route, check the rights, answer."""

    protocol_version = "HTTP/1.1"
    routes = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("GET", rf"/api/models/{ID}(?:/revision/{REVISION})?", "model_info"),
        ("GET", rf"/api/models/{ID}/tree/{REVISION}", "tree"),
        ("POST", rf"/api/models/{ID}/preupload/{REVISION}", "preupload"),
        ("POST", rf"/api/models/{ID}/commit/{REVISION}", "commit"),
        ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/objects/([0-9a-f]{64})", "upload"),
    ]

    def log_message(self, *_arguments) -> None:
        """What a test prints is not of this."""

    def answer(self, status: int, body: object = None, headers: Mapping[str, str] | None = None) -> None:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        # Whatever the answer will be: what is left of it would be taken for the next request.
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            for method, pattern, route in self.routes:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split("|"):
                    # Like the hub's signed links, those to an object ask for no token.
                    if not path.startswith("/objects/"):
                        self.authorize()
                    return getattr(self, route)(*match.groups())
            raise Refusal(404, f"The stand-in hub knows no {self.command} {path}")
        except Refusal as refusal:
            code = {"X-Error-Code": refusal.code} if refusal.code else {}
            self.answer(refusal.status, {"error": refusal.message}, {"X-Error-Message": refusal.message, **code})

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def authorize(self) -> None:
        """Refuse who may not ask this."""
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            raise Refusal(401, "Invalid credentials in Authorization header")

    def whoami(self) -> None:
        self.answer(200, {"type": "user", "name": "rehearsal", "orgs": []})

    def validate_yaml(self) -> None:
        # Of a card's front matter; the hub has rules of its own beyond those of YAML.
        self.answer(200, {"errors": [], "warnings": []})

    def model_info(self, repo_id: str, revision: str | None) -> None:
        if repo_id not in self.server.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        self.answer(200, {"id": repo_id, "private": True})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        self.server.repositories[repo_id] = {}
        self.answer(200, {"url": f"{self.server.url}/{repo_id}", "name": repo_id})

    def tree(self, repo_id: str, revision: str) -> None:
        # What was there before: nothing.
        self.answer(200, [])

    def preupload(self, repo_id: str, revision: str) -> None:
        self.answer(200, {"files": [{"path": file["path"], "shouldIgnore": False, "oid": None, "uploadMode": "lfs" if is_lfs(
            file["path"], file["size"]) else "regular"} for file in json.loads(self.body)["files"]]})

    def lfs_batch(self, repo_id: str) -> None:
        self.answer(200, {"transfer": "basic", "objects": [
            {**asked, "actions": {"upload": {"href": f"{self.server.url}/objects/{asked['oid']}"}}}
            for asked in json.loads(self.body)["objects"]]})

    def upload(self, sha256: str) -> None:
        if self.server.store(self.body) != sha256:
            raise Refusal(400, "The bytes are not those announced")
        self.answer(200, None, {"ETag": f'"{sha256}"'})

    def commit(self, repo_id: str, revision: str) -> None:
        for operation in map(json.loads, self.body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                self.server.repositories[repo_id][value["path"]] = self.server.store(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                self.server.repositories[repo_id][value["path"]] = value["oid"]
        identity = hashlib.sha1(self.body).hexdigest()
        self.answer(200, {"success": True, "commitOid": identity, "commitUrl": f"{self.server.url}/{repo_id}/commit/{identity}"})


class StandInHub(ThreadingHTTPServer):
    """The server; runs in a thread of its own between __enter__ and __exit__.

    Args:
        folder: where the bytes of files are stored, each under its sha256.
        token: with which everything may be done.

    Attributes:
        repositories: by OWNER/NAME, path of a file -> sha256 of its bytes.
    """

    # Of a subclass that answers more.
    handler = Handler
    daemon_threads = True

    def __init__(self, folder: Path, token: str):
        super().__init__(("127.0.0.1", 0), self.handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.objects = Path(folder) / "objects"
        self.objects.mkdir(parents=True, exist_ok=True)
        self.token, self.repositories = token, {}

    def __enter__(self) -> "StandInHub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_exception) -> None:
        self.shutdown()
        self.server_close()

    def env(self, token: str | None = None) -> dict[str, str]:
        """What a client process needs in its environment to talk to this hub (a proxy could not reach it)."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
                **({"HF_TOKEN": token} if token else {})}

    def store(self, data: bytes) -> str:
        """Store the bytes of a file; return their sha256."""
        digest = hashlib.sha256(data).hexdigest()
        (self.objects / digest).write_bytes(data)
        return digest


def is_lfs(path: str, size: int) -> bool:
    """Whether the hub keeps a file outside git."""
    return size > LFS_SIZE or bool(LFS_NAMES.fullmatch(path))
