"""The stand-in hub with models to download: gated ones, links that expire, transfers that are cut and continued.

The rehearsal only uploads (bridge.standins.hub); this half of the protocol is for the tests of the model stage.
"""

import re
import shutil
from collections.abc import Mapping
from urllib.parse import parse_qs

from bridge.standins.hub import ID, REVISION, Handler, Refusal, Repository, StandInHub, owns, row


class DownloadsHandler(Handler):
    """The routes of the upload, and those of the download."""

    def downloadable(self, repo_id: str) -> Repository:
        """The repository, if the caller may have its files: a gated one's information is public, its files are not."""
        account, repository = self.account(), self.readable(repo_id)
        if repository.gated and not (account and (account.name in repository.granted or owns(account, repo_id))):
            raise Refusal(403 if account else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
        return repository

    def auth_check(self, repo_id: str) -> None:
        self.downloadable(repo_id)
        self.answer(200, {})

    def paths_info(self, repo_id: str, revision: str) -> None:
        _, files = self.commit_at(self.readable(repo_id), revision)
        asked = parse_qs(self.body().decode()).get("paths", [])
        self.answer(200, [row(path, files[path]) for path in asked if path in files])

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.downloadable(repo_id)
        identity, files = self.commit_at(repository, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = files[path]
        headers = {"X-Repo-Commit": identity, "ETag": f'"{file.oid}"'}
        if file.lfs:
            self.answer(302, None, {**headers, "X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size),
                                    "Location": f"{self.hub.url}/objects/{file.sha256}"})
        elif self.command == "HEAD":
            self.answer(200, None, {**headers, "Content-Length": str(file.size)})
        else:
            self.answer(200, (self.hub.objects / file.sha256).read_bytes(), headers)

    def download(self, sha256: str) -> None:
        """What the hub's signed links lead to; like those it asks for no token."""
        file = self.hub.objects / sha256
        size = file.stat().st_size
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        whole = self.hub.may_transfer()
        if not whole and self.hub.transfers_allowed < -1:
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

    more_routes = [
        ("GET", rf"/api/models/{ID}/auth-check", auth_check),
        ("POST", rf"/api/models/{ID}/paths-info/{REVISION}", paths_info),
        ("GET|HEAD", r"/objects/([0-9a-f]{64})", download),
        ("GET|HEAD", rf"/{ID}/resolve/{REVISION}/(.+)", resolve),
    ]


class DownloadsHub(StandInHub):
    """The server with what others have published."""

    handler = DownloadsHandler

    def add_model(self, repo_id: str, files: Mapping[str, bytes], **rights) -> str:
        """Publish a model with these files, as if someone had uploaded it; `rights` are Repository's fields."""
        repository = self.repositories.setdefault(repo_id, Repository(**rights))
        return repository.commit({path: self.store(path, data) for path, data in files.items()})
