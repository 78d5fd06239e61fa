"""[image] GSM8K as parquet files that verl reads: WORK_DIR/data/gsm8k/{train,test}.parquet.   bridge data

The rows are those of verl 0.5.0's examples/data_preprocess/gsm8k.py, which its wheel does not hold.
"""

import codecs
import json
import os
import re
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pyarrow import Table, parquet

from bridge.errors import UsageError, exit_status, naming, nearest, refuse
from bridge.plan import Plan
from bridge.runs import record
from bridge.settings import Settings
from bridge.standins.word_problems import problems

SPLITS = ("train", "test")
# Also the name by which verl chooses its scorer, so it stays the same for every source.
GSM8K = "openai/gsm8k"
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
# What verl extracts; it takes the first match.
MARKED = re.compile(r"#### (-?[0-9.,]+)")
NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)")
FORM = '{"question": "...", "answer": "... #### NUMBER"}'
SHOWN = 20

Rows = list[dict[str, str]]
# What a row is called before its number, and the rows with their numbers.
Numbered = tuple[str, list[tuple[int, Any]]]


def plan(settings: Settings, env: Mapping[str, str]) -> Plan:
    """Check the source and say what to run. A UsageError for one that cannot be, and where data of another source are."""
    source, folder = checked_source(settings.data_source), settings.data_dir
    existing = [file for file in (folder / f"{split}.parquet" for split in SPLITS) if file.exists()]
    made_from = recorded_source(folder)
    if existing and made_from != source:
        raise UsageError(f"{folder} holds data " + (f"made with DATA_SOURCE={made_from}" if made_from else
                                                    "that `make data` did not make, or did not finish")
                         + f"; DATA_SOURCE={source} would replace them. Keep them and go on (`make model`), or move {folder} "
                           "away, or use another WORK_DIR.")
    notes = ["DATA_SOURCE=builtin: made-up problems for rehearsals, not GSM8K."] if source == "builtin" else []
    return Plan([sys.executable, "-m", "bridge.stages.data", source, str(folder)], {}, folder, keep_log=False, notes=notes)


def recorded_source(folder: Path) -> str | None:
    """The source that the data in a folder were made from, as their record says; None if there is none."""
    recorded = record.read(folder)
    command = recorded["attempts"][-1]["command"] if recorded else []
    # python -m MODULE SOURCE: an older version had another name for the module.
    return command[command.index("-m") + 2] if "-m" in command[:-2] else None


def checked_source(source: str) -> str:
    """Either hub, builtin or the absolute path of a folder with train.jsonl and test.jsonl; anything else is a UsageError."""
    if source in ("hub", "builtin"):
        return source
    folder = Path(os.path.abspath(os.path.expanduser(source)))
    if not folder.is_dir():
        raise UsageError(f"DATA_SOURCE={source!r} is neither hub ({GSM8K}), nor builtin (made-up problems), nor a folder that "
                         f"exists (with train.jsonl and test.jsonl).{nearest(source.lower(), ['hub', 'builtin'])}")
    faults = []
    for file in (folder / f"{split}.jsonl" for split in SPLITS):
        if not file.is_file():
            other = " Its parquet files are not read." if any(folder.glob("*.parquet")) else ""
            faults.append(f"DATA_SOURCE={source!r} lacks the file {file}. A line of it is {FORM}.{other}")
        elif not os.access(file, os.R_OK):
            faults.append(f"{file} cannot be read: you lack the permission.")
    refuse(faults)
    return str(folder)


def ground_truth(answer: str) -> str:
    """Return what verl extracts from an answer and compares with the model's, without commas.

    A ValueError gives the reason if the answer's last line is not `#### NUMBER`, or not what verl would take.
    """
    last = answer.strip().rsplit("\n", 1)[-1].strip()
    if not (marked := MARKED.fullmatch(last)):
        raise ValueError(f"the answer's last line is not '#### NUMBER' but {reprlib.repr(last)}")
    if MARKED.search(answer).group(1) != marked.group(1):
        raise ValueError("the answer has another '#### NUMBER' before its last line, and verl takes the first")
    number = marked.group(1).replace(",", "")
    if not NUMBER.fullmatch(number):
        raise ValueError(f"{reprlib.repr(marked.group(1))} after '####' is not a number")
    return number


def checked_row(row: object) -> dict[str, str]:
    """The question and the answer of a row, or of a line of JSON; further keys are left out.

    A ValueError gives the reason if the row is not in GSM8K's form.
    """
    try:
        row = json.loads(row.decode()) if isinstance(row, bytes) else row
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from error
    except RecursionError as error:
        raise ValueError("not a row (nested too deeply)") from error
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but of type {type(row).__name__}")
    for key in ("question", "answer"):
        if key not in row:
            raise ValueError(f"has no {key!r}")
        if not isinstance(row[key], str):
            raise ValueError(f"its {key!r} is not a text but of type {type(row[key]).__name__}")
        if not row[key].strip():
            raise ValueError(f"its {key!r} is empty")
        # JSON may escape half of one (\ud83d), which no file in UTF-8 can hold.
        if half := re.search(r"[\ud800-\udfff]", row[key]):
            raise ValueError(f"its {key!r} holds half a character (character {half.start() + 1})")
    ground_truth(row["answer"])
    return {"question": row["question"], "answer": row["answer"]}


def from_folder(folder: Path) -> dict[str, Rows]:
    """Read and check both files of a folder. Blank lines are no rows."""
    splits = {}
    for split in SPLITS:
        file = folder / f"{split}.jsonl"
        # Bytes, because lines of text would also end at U+2028, which JSON may hold within a string.
        lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
        splits[split] = f"{file}, line", [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return checked_splits(splits)


def from_hub() -> dict[str, Rows]:
    """Fetch GSM8K from the Hugging Face Hub (or take it from its cache) and check it. A UsageError if it cannot be had."""
    # Here, because the other sources need neither and start a second sooner without.
    import datasets
    import requests

    try:
        found = datasets.load_dataset(GSM8K, "main")
    # datasets 4.1.0: ConnectionError without a network or offline, FileNotFoundError where the hub (or a proxy in its
    # place) answers with an error or has no such data set, requests' own for a refused token or a broken download.
    except (ConnectionError, FileNotFoundError, requests.exceptions.RequestException) as error:
        raise UsageError(
            f"{GSM8K} cannot be had from the Hugging Face Hub: {type(error).__name__}: {str(error).splitlines()[0]}",
            "Either fetch it on a machine with internet (`make data` there; the same WORK_DIR, or copy its data folder), or give "
            "a folder with train.jsonl and test.jsonl (DATA_SOURCE=folder), or rehearse with made-up problems "
            "(DATA_SOURCE=builtin).") from error
    return checked_splits({split: (f"{GSM8K} {split}, row", list(enumerate(found[split], start=1))) for split in SPLITS})


def checked_splits(splits: Mapping[str, Numbered]) -> dict[str, Rows]:
    """The rows of each split, checked. A UsageError shows the first faults and counts the others."""
    found, faults = {split: [] for split in splits}, []
    for split, (place, rows) in splits.items():
        for number, row in rows:
            try:
                found[split].append(checked_row(row))
            except ValueError as error:
                faults.append(f"{place} {number}: {error}")
        if not rows:
            faults.append(f"{place.rpartition(',')[0]} has no rows.")
    more = len(faults) - SHOWN
    if faults:
        raise UsageError(*faults[:SHOWN], *([f"... and {more} more bad row{'s' if more > 1 else ''}."] if more > 0 else []),
                         f"Nothing was written. Each line must be {FORM}; mend or remove the lines named.")
    return found


def table(split: str, rows: Rows) -> Table:
    """Rows in the schema that `datasets` gives verl's script: fields within a struct are in alphabetical order."""
    return Table.from_pylist([{
        "data_source": GSM8K,
        "prompt": [{"content": f"{row['question']} {INSTRUCTION}", "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": ground_truth(row["answer"]), "style": "rule"},
        "extra_info": {"answer": row["answer"], "index": index, "question": row["question"], "split": split},
    } for index, row in enumerate(rows)])


def write(splits: dict[str, Rows], folder: Path) -> dict[str, Path]:
    """Write one parquet file a split, all or none: after a failure the folder is as it was. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: folder / f"{split}.parquet" for split in splits}
    with TemporaryDirectory(prefix=".new-", dir=folder) as name:
        new, old = Path(name, "new"), Path(name, "old")
        new.mkdir()
        old.mkdir()
        for split, rows in splits.items():
            with naming(files[split]):
                parquet.write_table(table(split, rows), new / split)
        try:
            for split, file in files.items():
                if file.exists():
                    os.replace(file, old / split)
                os.replace(new / split, file)
        except (OSError, KeyboardInterrupt):
            # A new train file beside an old test file could share questions.
            for split, file in files.items():
                if (old / split).exists():
                    os.replace(old / split, file)
                elif not (new / split).exists():
                    file.unlink()
            raise
    return files


def main(arguments: list[str] | None = None) -> None:
    """What the stage runs: hub, builtin or a folder of train.jsonl and test.jsonl; and the folder of both parquet files."""
    source, output = sys.argv[1:] if arguments is None else arguments
    source = checked_source(source)
    if source == "hub":
        splits, origin = from_hub(), f"{GSM8K} on the hub"
    elif source == "builtin":
        splits, origin = problems(), "builtin problems"
    else:
        splits, origin = from_folder(Path(source)), source
    for split, file in write(splits, Path(output)).items():
        print(f"{file}: {len(splits[split])} rows from {origin}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
