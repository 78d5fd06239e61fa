"""[image] A reward of one's own, REWARD=FILE.py:FUNCTION (verl's custom_reward_function): tried before PPO (docs/own_data.md).
FUNCTION(data_source, solution_str, ground_truth, extra_info) returns a number, or a dict of which "score" is one."""

import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from importlib import util
from numbers import Real
from pathlib import Path
from typing import Any

from pyarrow import parquet

from bridge.errors import UsageError, exit_status

# How many rows it is tried on, and the seconds that they may take: a step of the tutorial has 256.
ROWS, PATIENCE = 10, 60


@cache
def tried(file: Path, name: str, digest: str, options: str, data: Path) -> str:
    """Try the function in a process of its own, and return what there is to say of it. A UsageError if it does not do.
    A file of another digest is tried anew; options: further arguments of the function (verl's reward_kwargs), as JSON."""
    command = [sys.executable, "-m", "bridge.stages.reward", str(file), name, options, str(data)]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise UsageError(f"REWARD={file}:{name} takes longer than {PATIENCE} s for {ROWS} rows, and a step has hundreds. Make it "
                         "faster, or let it give up.") from None
    # What the user's program prints comes before.
    said = (result.stderr if result.returncode else result.stdout).strip().rpartition("\n")[2]
    if result.returncode:
        raise UsageError(said.removeprefix("bridge: ") or f"REWARD={file}:{name} ended its process ({result.returncode}).")
    return said


def load(file: Path, name: str) -> Callable[..., Any]:
    """The function, as verl loads it. A UsageError if the file cannot be run, or has none of that name."""
    if not file.is_file():
        raise UsageError(f"REWARD: there is no file {file}.")
    spec = util.spec_from_file_location("custom_module", file)
    module = sys.modules["custom_module"] = util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    # It is the user's program: whatever it raises is said.
    except Exception as error:
        raise UsageError(f"REWARD={file} cannot be loaded: {brief(error, file)}") from error
    if not callable(function := getattr(module, name, None)):
        raise UsageError(f"REWARD={file}:{name}: the file has no function {name}.")
    return function


def brief(error: Exception, file: Path) -> str:
    """An error of the user's program, with its place there."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


def score(function: Callable[..., Any], row: Mapping[str, Any], answer: str, **options: Any) -> float:
    """What the function gives a row's answer, called as verl calls it. A ValueError for what is no number."""
    given = function(**{"data_source": row["data_source"], "solution_str": answer, "ground_truth": row["reward_model"][
        "ground_truth"], "extra_info": {**row["extra_info"], "num_turns": None}, **options})
    value = given.get("score") if isinstance(given, dict) else given
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"it returned {given!r}. A finite number is wanted, or a dict with one as 'score'")
    return float(value)


def main() -> None:
    """What tried() runs: the file, the function, further arguments as JSON, and the data."""
    file, name, options, data = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
    rows = next(parquet.ParquetFile(data).iter_batches(ROWS)).to_pylist()
    function, given, started = load(file, name), {"their own answers": [], "empty ones": []}, time.monotonic()
    for kind, values in given.items():
        for number, row in enumerate(rows, 1):
            try:
                values.append(score(function, row, "" if kind == "empty ones" else row["extra_info"]["answer"], **options))
            except Exception as error:
                where = f"row {number} of {data}, {kind}"
                raise UsageError(f"REWARD={file}:{name} fails ({where}): {brief(error, file)}") from error
    each = (time.monotonic() - started) / 2 / len(rows)
    said = ", ".join(f"{kind}: {' '.join(f'{value:.3g}' for value in values)}" for kind, values in given.items())
    print(f"REWARD={file.name}:{name} gives the first {len(rows)} rows {said}; {each:.2g} s an answer")


if __name__ == "__main__":
    sys.exit(exit_status(main))
