#!/usr/bin/env python3
"""List what differs between two images in names, types, modes and contents. Runs: host, with Python 3.10 or later.

    tests/image/compare.py bridge.sif localhost/bridge:latest

A and B: a SIF, an OCI image's name, an OCI archive (*.tar) or a folder. Exit status 1 if anything differs but what MAY_DIFFER
names, 2 if an image cannot be read. An image is read by the Python inside it, so nothing is unpacked and nobody needs to be
root; of a file that only root may read the length is compared. Not compared: dates, and owners (a SIF belongs to its builder).
"""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

# Relative to the root; a folder stands for all below it.
MAY_DIFFER = (
    # Apptainer's own: its scripts, and links to them.
    ".exec", ".run", ".shell", ".singularity.d", ".test", "environment", "singularity",
    # What an engine lays its own over when it runs an image: the user who calls it, the network, the devices.
    "etc/group", "etc/hostname", "etc/hosts", "etc/mtab", "etc/passwd", "etc/resolv.conf",
    "dev", "proc", "run", "sys", "tmp",
    # Buildah takes away the empty folder on which it showed the build its inputs.
    "mnt",
)
PYTHON = "/usr/bin/python3.11"
# Without the host's folders; by default Apptainer shows some.
APPTAINER = ["exec", "--cleanenv", "--pwd", "/", "--no-mount", "home,cwd,tmp,hostfs,bind-paths"]


def entries(root):
    """Return {path: [type, mode, content]} of all below a folder; content is a hash, a link's target, or a length."""
    found = {}
    for folder, folders, files in os.walk(root):
        inside = os.path.relpath(folder, root)
        paths = {name: os.path.normpath(os.path.join(inside, name)) for name in folders + files}
        paths = {name: path for name, path in paths.items() if path not in MAY_DIFFER}
        folders[:] = [name for name in folders if name in paths]
        found.update((path, entry(os.path.join(folder, name))) for name, path in paths.items())
    return found


def entry(file):
    """Type, mode and content of one file."""
    status = os.lstat(file)
    mode = oct(stat.S_IMODE(status.st_mode))
    if stat.S_ISLNK(status.st_mode):
        # A link's own mode means nothing.
        return ["link", "", os.readlink(file)]
    if stat.S_ISDIR(status.st_mode):
        return ["folder", mode, ""]
    if not stat.S_ISREG(status.st_mode):
        return ["special file", mode, oct(status.st_mode)]
    if not os.access(file, os.R_OK):
        return ["file", mode, f"{status.st_size} bytes"]
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        for piece in iter(lambda: stream.read(1 << 20), b""):
            digest.update(piece)
    return ["file", mode, digest.hexdigest()]


def fail(problem):
    """End with what a person can mend, and exit status 2."""
    print(f"bridge: {problem}", file=sys.stderr)
    sys.exit(2)


def first_of(*tools):
    """The first of these tools that is on PATH."""
    for tool in tools:
        if shutil.which(tool):
            return tool
    fail(f"no {' or '.join(tools)} on PATH. Load its module, or install one.")


def listing(image):
    """The entries of one image. It is read by running this very file inside it, without network."""
    if os.path.isdir(image):
        return entries(image)
    container = None
    if os.path.isfile(image) and not image.endswith(".tar"):
        command = [first_of("apptainer", "singularity"), *APPTAINER, image]
    else:
        tool = first_of("buildah", "podman", "docker")
        name = "oci-archive:" + os.path.abspath(image) if image.endswith(".tar") else image
        if tool == "buildah":
            container = output(["buildah", "from", "--pull-never" if name == image else "--pull", name]).strip()
            command = ["buildah", "run", "--network", "none", container, "--"]
        elif tool == "docker" and name != image:
            fail(f"docker runs no OCI archive. docker load --input {image} names it; compare that name.")
        else:
            command = [tool, "run", "--rm", "--interactive", "--network", "none", "--entrypoint", "", name]
    try:
        with open(__file__) as source:
            return json.loads(output([*command, PYTHON, "-", "--list"], stdin=source))
    finally:
        if container:
            output(["buildah", "rm", container])


def output(command, **options):
    """What a command prints. It says on stderr what it has to say; if it fails, so does the comparison."""
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, **options)
    if result.returncode:
        fail(f"{' '.join(command)} ended with exit status {result.returncode} (see above).")
    return result.stdout


def differences(a, b):
    """Yield one line for each path that differs; of a folder that only one of them has, only the folder."""
    for path in sorted({*a, *b}):
        if path in a and path in b:
            for what, one, other in zip(("type", "mode", "content"), a[path], b[path], strict=True):
                if one != other:
                    yield f"{path}: {what} {one} in A, {other} in B"
                    break
        else:
            side = a if path in a else b
            above = os.path.dirname(path)
            if not above or (above in a and above in b):
                yield f"{path}: only in {'A' if side is a else 'B'} ({side[path][0]})"


def main(arguments):
    """Compare A and B, or print the entries of the file system that this runs in."""
    if arguments == ["--list"]:
        json.dump(entries("/"), sys.stdout)
        return 0
    if len(arguments) != 2 or not all(arguments):
        fail("compare needs two images: tests/image/compare.py bridge.sif localhost/bridge:latest")
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(listing, arguments)
    found = list(differences(a, b))
    print(*found, f"{len(a)} entries in {arguments[0]}, {len(b)} in {arguments[1]}, {len(found)} differences", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
