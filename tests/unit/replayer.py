"""Replays what a trainer did; stands in for it where the door's own file operations fail in turn (test_file_errors.py).

    python replayer.py SAVED CHECKPOINTS FIRST LAST DIARY [FAILS_AFTER]

Prints the lines that verl's SFT trainer printed (captured/sft.log) for the steps FIRST to LAST, and saves a checkpoint at each:
copied from the folder SAVED, in verl's order. Writes into DIARY that it began and that it came to its end.
"""

import re
import shutil
import sys
from pathlib import Path

LOG, FAILS = (Path(__file__).parent / "captured" / name for name in ("sft.log", "sft_fails.log"))


def save(saved: Path, checkpoints: Path, step: int) -> None:
    """Lay down a checkpoint as FSDPSFTTrainer.save_checkpoint does: the shards, data.pt, the tracker."""
    name = f"global_step_{step}"
    shutil.copytree(saved / name, checkpoints / name, ignore=shutil.ignore_patterns("data.pt"), dirs_exist_ok=True)
    shutil.copy(saved / name / "data.pt", checkpoints / name)
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    tracker.with_suffix(".txt.tmp").write_text(str(step))
    tracker.with_suffix(".txt.tmp").rename(tracker)


def write(diary: str, word: str) -> None:
    with open(diary, "a") as file:
        file.write(word + "\n")


def main() -> None:
    saved, checkpoints, first, last, diary, *fails_after = sys.argv[1:]
    write(diary, "began")
    for line in LOG.read_text().splitlines():
        found = re.search(r"step:(\d+) ", line)
        if found and int(first) <= int(found[1]) <= int(last):
            print(line, flush=True)
            save(Path(saved), Path(checkpoints), int(found[1]))
            if found[1] in fails_after:
                print(FAILS.read_text(), flush=True)
                write(diary, "failed")
                sys.exit(1)
    write(diary, "ended")


if __name__ == "__main__":
    main()
