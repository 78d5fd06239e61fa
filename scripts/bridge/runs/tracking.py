"""Whether W&B is online or offline."""

import functools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# WANDB_MODE with which nothing is sent.
NOT_SENT = ("offline", "disabled", "dryrun")


def wandb_server(env: Mapping[str, str]) -> str:
    """Address of the server that W&B sends to."""
    return env.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def go_offline(config: Mapping[str, Any], env: Mapping[str, str], own_env: dict[str, str], notes: list[str],
               dry_run: bool) -> None:
    """Let W&B be offline where it has no key, unless the user has said what it shall do, and where its server does not answer:
    it would try for 90 s, and then end one rank of all."""
    netrc, server = Path(env.get("NETRC") or Path.home() / ".netrc"), wandb_server(env)
    # `wandb login` leaves its key there.
    has_login = netrc.is_file() and server.split("//")[-1].split("/")[0] in netrc.read_text()
    if not (env.get("WANDB_API_KEY") or has_login) and env.get("WANDB_MODE") is None:
        own_env["WANDB_MODE"] = "offline"
        notes.append(f"no WANDB_API_KEY and no wandb login: metrics stay in {own_env['WANDB_DIR']} "
                     "(send them later with `wandb sync`, in `make shell`)")
    elif env.get("WANDB_MODE") in NOT_SENT or "wandb" not in config["trainer"]["logger"]:
        return
    elif dry_run:
        notes.append(f"W&B: {server} is asked at the start; if it does not answer, this run is offline")
    elif reason := connection_problem(server):
        own_env["WANDB_MODE"] = "offline"
        notes.append(f"W&B: {server} does not answer ({reason}), so this run is offline: metrics stay in {own_env['WANDB_DIR']}. "
                     "Send them later, from where it answers: `wandb sync wandb/offline-run-*` in that folder (in `make shell`)")


@functools.cache
def connection_problem(url: str, seconds: float = 5) -> str | None:
    """Why no HTTP answer, of any kind, came within so many seconds; None if one came. Asked once a process."""
    import requests

    # Of the error its kind only: its text may hold a proxy's password.
    said: list[str | None] = [f"nothing within {seconds:g} s"]

    def ask() -> None:
        try:
            requests.get(url, timeout=seconds, stream=True, allow_redirects=False).close()
            said[0] = None
        except requests.RequestException as error:
            said[0] = type(error).__name__

    # A name server that is not reached has time limits of its own, longer ones.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return said[0]
