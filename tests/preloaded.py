"""A Python that has imported what takes seconds, and forks itself for each program that a test runs (door.py starts it).

    python preloaded.py MODULE...

Its standard input is a socket. Each message asks for one program: {"program": ["-m", module], ["-c", script] or [file],
"arguments", "env", "cwd"} as JSON, with the descriptors of its stdout and stderr. Answered are its process id and, once it has
ended, what waitpid says. It has one thread and uses nothing of what it imports, so a fork begins as a new Python would after
those imports. So it imports nothing of ours, and nothing of which a test chooses at import time what it becomes.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import sys
from importlib import import_module
from types import ModuleType


def serve(asked: socket.socket) -> dict:
    """Fork for each message until the other end is closed. Returns, in the forked child only, what it has to become."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, 1 << 20, 2)
        if not message:
            # Nothing is left to be done, and taking down all that was imported takes seconds.
            os._exit(0)
        child = os.fork()
        if not child:
            # Nothing to read, as for a program that a test starts.
            asked.close()
            for descriptor, number in zip((os.open(os.devnull, os.O_RDONLY), *descriptors), (0, 1, 2), strict=True):
                os.dup2(descriptor, number)
                if descriptor > 2:
                    os.close(descriptor)
            return json.loads(message)
        for descriptor in descriptors:
            os.close(descriptor)
        asked.send(str(child).encode())
        asked.send(str(os.waitpid(child, 0)[1]).encode())


def become(program: list[str], arguments: list[str], env: dict[str, str], cwd: str) -> None:
    """Be `python -m module`, `python -c script` or `python file`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # At its end it would look through all that was imported, and so copy it, for garbage: 2 s.
    atexit.register(gc.freeze)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[0] = cwd
    how, what = program[0], program[-1]
    sys.argv = [how, *arguments]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)
    else:
        sys.path[0] = os.path.dirname(what)
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    # Ctrl-C is for the programs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in sys.argv[1:]:
        import_module(name)
    tasks = len(os.listdir("/proc/self/task"))
    if tasks != 1:
        sys.exit(f"{tasks} threads after importing {sys.argv[1:]}: a fork would have one of them")
    become(**serve(socket.socket(fileno=os.dup(0))))
