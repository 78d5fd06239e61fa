"""What several unit tests need: a small model and data to point the door at, servers to ask."""

import fcntl
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from door import bridge


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A WORK_DIR with the built-in data and the tiny model, made by the door itself. Not to be written to."""
    folder = tmp_path_factory.getbasetemp()
    # One for all of xdist's processes: their folders are beside each other.
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    work_dir, made = folder / "prepared", folder / "prepared.made"
    with open(folder / "prepared.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            work_dir.mkdir(exist_ok=True)
            for stage in ("data", "model"):
                result = bridge(stage, WORK_DIR=str(work_dir), DATA_SOURCE="builtin", MODEL="tiny")
                assert result.returncode == 0, result.stderr
            made.touch()
    return work_dir


@pytest.fixture
def env(prepared: Path, tmp_path: Path) -> dict[str, str]:
    """Settings of a rehearsal run in a WORK_DIR of its own, with that data and model."""
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(prepared / name)
    return {"WORK_DIR": str(tmp_path), "MODEL": "tiny", "PROFILE": "tiny", "GPUS": "2"}


@pytest.fixture
def server():
    """Makes servers on this machine: `server(status)` answers every request so, `server(None)` takes it and never answers."""
    made = []

    def make(status: int | None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_args) -> None: ...

        if status is None:
            listening = socket.create_server(("127.0.0.1", 0))
            made.append(listening.close)
            return f"http://127.0.0.1:{listening.getsockname()[1]}"
        answering = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=answering.serve_forever, daemon=True).start()
        made.extend((answering.shutdown, answering.server_close))
        return f"http://127.0.0.1:{answering.server_port}"

    yield make
    for end in made:
        end()


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
