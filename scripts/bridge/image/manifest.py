"""What an image was made of: written at the end of its build, read by `bridge check` and into run.json.
    python -m bridge.image.manifest COMMIT BASE FLASH_ATTN_WHEEL > /opt/bridge/manifest.json"""

import importlib.metadata
import json
import re
import subprocess
import sys
from typing import Any

from bridge.errors import sha256
from bridge.settings import ROOT

FILE = ROOT / "manifest.json"


def read() -> dict[str, Any] | None:
    """The manifest of the image that this runs in, None outside of one."""
    return json.loads(FILE.read_text()) if FILE.is_file() else None


def packages() -> dict[str, str]:
    """Name -> version of each package of this Python, by its normalized name."""
    found = {re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower(): package.version
             # Of two the one that Python finds first.
             for package in reversed(list(importlib.metadata.distributions()))}
    return dict(sorted(found.items()))


def make(commit: str, base: str, flash_attn_wheel: str) -> dict[str, Any]:
    """Recipe, lock and packages of the root file system that this runs in. Nothing of the day or the machine is in it.
    base and flash_attn_wheel are NAME@sha256:... of what the lock does not pin."""
    debian = subprocess.run(["dpkg-query", "--show", "--showformat", "${Package} ${Version}\n"], check=True,
                            capture_output=True, text=True).stdout
    return {
        "recipe_commit": commit or None,
        "base": base,
        "flash_attn_wheel": flash_attn_wheel,
        "requirements_lock_sha256": sha256(ROOT / "requirements.lock"),
        "debian": dict(sorted(line.split() for line in debian.splitlines())),
        "python": packages(),
    }


if __name__ == "__main__":
    json.dump(make(*sys.argv[1:]), sys.stdout, indent=1)
    print()
