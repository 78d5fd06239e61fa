"""[image] GSM8K, or one's own data, as parquet files for verl: WORK_DIR/data/gsm8k/{train,test}.parquet.   bridge data
Rows are those of verl 0.5.0's examples/data_preprocess/gsm8k.py, which its wheel lacks; with REWARD= texts stay as they are."""

import codecs
import csv
import json
import os
import random
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pyarrow import Table, parquet

from bridge.errors import UsageError, exit_status, naming, nearest, refuse
from bridge.pages import page
from bridge.plan import Plan
from bridge.runs import record
from bridge.settings import Settings, is_local
from bridge.standins.word_problems import problems

SPLITS = ("train", "test")
# Also the name by which verl chooses its scorer, so it stays the same for every source.
GSM8K = "openai/gsm8k"
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
# What verl extracts; it takes the first match.
MARKED = re.compile(r"#### (-?[0-9.,]+)")
NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)")
FORM = '{"question": "...", "answer": "... #### NUMBER"}'
# A data set on the hub: OWNER/NAME, and the name of one of its configurations.
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
# Share of the rows of one file that become test rows, and what they are drawn by unless SEED= says.
TEST_SHARE, SEED = 0.1, 0
Rows = list[dict[str, str]]
# What a row is called before its number, and the rows with their numbers.
Numbered = tuple[str, Iterable[tuple[int, Any]]]


def plan(settings: Settings, env: Mapping[str, str]) -> Plan:
    """Check the source and say what to run. A UsageError for one that cannot be, and where data of another source are."""
    source, folder = checked_source(settings.data_source), settings.data_dir
    made_from = recorded_source(folder)
    if made_from != source and any((folder / f"{split}.parquet").exists() for split in SPLITS):
        raise UsageError(page("other_data.txt", folder=folder, made_from=made_from, source=source))
    notes = ["DATA_SOURCE=builtin: made-up problems for rehearsals, not GSM8K."] if source == "builtin" else []
    form = "text" if settings.reward else "number"
    if is_own(source) and settings.reward:
        notes.append("REWARD judges the answers: questions and answers are taken as they are, and need no number")
    return Plan([sys.executable, "-m", "bridge.stages.data", source, str(folder), settings.question, settings.answer, form,
                 str(SEED if settings.seed is None else settings.seed)], {}, folder, keep_log=False, notes=notes)


def is_own(source: str | None) -> bool:
    """Whether data of this source are other than GSM8K or made up, so that nobody knows how long they are."""
    return source not in (None, "hub", "builtin")


def recorded_source(folder: Path) -> str | None:
    """The source that the data in a folder were made from, as their record says; None if there is none."""
    recorded = record.read(folder)
    command = recorded["attempts"][-1]["command"] if recorded else []
    # python -m MODULE SOURCE: an older version had another name for the module.
    return command[command.index("-m") + 2] if "-m" in command[:-2] else None


def checked_source(source: str) -> str:
    """hub, builtin, OWNER/NAME[:CONFIGURATION], or the absolute path of a file or a folder; a UsageError for what is none."""
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if source in ("hub", "builtin") or (HUB_NAME.fullmatch(source) and not is_local(source) and not path.exists()):
        return source
    if not path.exists():
        raise UsageError(f"DATA_SOURCE={source!r} is neither hub ({GSM8K}), nor builtin (made-up problems), nor OWNER/NAME on "
                         "the hub, nor a file or a folder that exists (with train.jsonl and test.jsonl)."
                         f"{nearest(source.lower(), ['hub', 'builtin'])}")
    source_files(path)
    return str(path)


def source_files(path: Path) -> dict[str, Path]:
    """The file of each split in a folder, or "all": the one file. A UsageError for what is missing or cannot be read."""
    kinds, faults, files = ", ".join(READERS), [], {}
    if not path.is_dir():
        files["all"] = path
        if path.suffix not in READERS:
            faults.append(f"DATA_SOURCE={path} ends in none of {kinds}.")
    for split in SPLITS if path.is_dir() else ():
        found = [file for suffix in READERS if (file := path / f"{split}{suffix}").is_file()]
        if len(found) == 1:
            files[split] = found[0]
        else:
            faults.append(page("not_one_file.txt", path=path, split=split, found=found, kinds=kinds, form=FORM))
    faults += [f"{file} cannot be read: you lack the permission." for file in files.values() if not os.access(file, os.R_OK)]
    refuse(faults)
    return files


def ground_truth(answer: str) -> str:
    """What verl extracts from an answer and compares with the model's, without commas. A ValueError says why it finds none."""
    last = answer.strip().rsplit("\n", 1)[-1].strip()
    if not (marked := MARKED.fullmatch(last)):
        raise ValueError(f"the answer's last line is not '#### NUMBER' but {reprlib.repr(last)}")
    if MARKED.search(answer).group(1) != marked.group(1):
        raise ValueError("the answer has another '#### NUMBER' before its last line, and verl takes the first")
    number = marked.group(1).replace(",", "")
    if not NUMBER.fullmatch(number):
        raise ValueError(f"{reprlib.repr(marked.group(1))} after '####' is not a number")
    return number


def checked_row(row: object, question: str, answer: str, form: str) -> dict[str, str]:
    """The question and the answer of a row, or of a line of JSON, by their keys. A ValueError says what is wrong.
    form: "number": the answer ends in `#### NUMBER`, or is a number; "text": whatever it is."""
    try:
        row = json.loads(row.decode()) if isinstance(row, bytes) else row
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8 ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but of type {type(row).__name__}")
    found = {}
    for name, key in (("question", question), ("answer", answer)):
        if key not in row:
            raise ValueError(f"has no {key!r} (it has {reprlib.repr(sorted(map(str, row)))})")
        value = row[key]
        if name == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
            value = f"{value:.15g}"
        if not isinstance(value, str):
            raise ValueError(f"its {key!r} is not a text but of type {type(value).__name__}")
        if not value.strip():
            raise ValueError(f"its {key!r} is empty")
        # JSON may escape half of one (\ud83d), which no file in UTF-8 can hold. NUL ends a text in many programs.
        if wrong := re.search(r"[\ud800-\udfff\0]", value):
            what = "NUL" if wrong[0] == "\0" else "half a character"
            raise ValueError(f"its {key!r} holds {what} (character {wrong.start() + 1})")
        found[name] = value
    if form == "number":
        if NUMBER.fullmatch(found["answer"].strip().replace(",", "")):
            found["answer"] = f"#### {found['answer'].strip()}"
        ground_truth(found["answer"])
    return found


# ---- where rows come from

def json_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers. Blank lines are no rows."""
    # Bytes, because lines of text would also end at U+2028, which JSON may hold within a string.
    lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """The elements of a list with their numbers."""
    rows = json.loads(file.read_bytes().removeprefix(codecs.BOM_UTF8))
    if not isinstance(rows, list):
        raise ValueError(f"it is not a list of rows but of type {type(rows).__name__}")
    return enumerate(rows, start=1)


def csv_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """The rows below the head, each with the number of its last line."""
    csv.field_size_limit(2**31 - 1)
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        for row in reader:
            yield reader.line_num, row if None not in row else "more fields than the head"


# By the end of a file's name: what its rows are called, and how they are read.
READERS: dict[str, tuple[str, Callable[[Path], Iterable[tuple[int, Any]]]]] = {
    ".jsonl": ("line", json_lines), ".json": ("row", json_rows), ".csv": ("line", csv_rows),
    ".parquet": ("row", lambda file: enumerate(parquet.read_table(file).to_pylist(), start=1))}


def from_files(path: Path) -> dict[str, Numbered]:
    """The rows of a file, or of both files of a folder, not looked at yet. A UsageError for a file that is damaged as a whole."""
    splits = {}
    for split, file in source_files(path).items():
        word, read = READERS[file.suffix]
        try:
            splits[split] = f"{file}, {word}", list(read(file))
        # Each library's error for what is not of its form; one of the system's has a number.
        except (ValueError, csv.Error, OSError) as error:
            if getattr(error, "errno", None):
                raise
            raise UsageError(f"{file} cannot be read as {file.suffix}: {error}. Nothing was written.") from error
    return splits


def from_hub(source: str) -> dict[str, Numbered]:
    """Fetch GSM8K, or another data set, from the Hugging Face Hub or its cache. A UsageError if it cannot be had."""
    # Here, because the other sources need neither and start a second sooner without.
    import datasets
    import requests

    name, config = (GSM8K, "main") if source == "hub" else HUB_NAME.fullmatch(source).groups()
    try:
        found = datasets.load_dataset(name, config)
    # datasets 4.1.0: ConnectionError without a network, FileNotFoundError where the hub (or a proxy) answers with an error,
    # requests' own for a refused token or a broken download, ValueError for a configuration not named or not there.
    except (ConnectionError, FileNotFoundError, ValueError, requests.exceptions.RequestException) as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise UsageError(*page("no_data_set.txt", name=name, said=said).split("\n")) from error
    if "train" not in found:
        raise UsageError(f"{name} has no split train; it has {', '.join(found)}. Save what you want as a file.")
    splits = SPLITS if "test" in found else ("train",)
    return {split if len(splits) > 1 else "all": (f"{name} {split}, row", enumerate(found[split], start=1)) for split in splits}


def checked_splits(splits: Mapping[str, Numbered], check: Callable[[object], dict[str, str]]) -> dict[str, Rows]:
    """The rows of each split, checked. A UsageError shows the first faults and counts the others."""
    found, faults = {split: [] for split in splits}, []
    for split, (place, rows) in splits.items():
        number = 0
        for number, row in rows:
            try:
                found[split].append(check(row))
            except ValueError as error:
                faults.append(f"{place} {number}: {error}")
        if not number:
            faults.append(f"{place.rpartition(',')[0]} has no rows.")
    if faults:
        raise UsageError(*page("bad_rows.txt", faults=faults, form=FORM).split("\n"))
    return found


def without_repetitions(splits: Mapping[str, Rows]) -> tuple[dict[str, Rows], list[str]]:
    """The rows less those whose question came before, and what to say of it. A test row that is trained on tests nothing."""
    seen, kept, said = set(), {}, []
    # The train rows last: of a question in both the test keeps it.
    for split, rows in reversed(splits.items()):
        kept[split] = [row for row in rows if not (row["question"] in seen or seen.add(row["question"]))]
        if dropped := len(rows) - len(kept[split]):
            said.append(f"{dropped} of {len(rows)} rows of {split} dropped: their question comes twice"
                        + (", here or in test" if split == "train" else ""))
    return {split: kept[split] for split in splits}, said


def drawn(rows: Rows, seed: int) -> dict[str, Rows]:
    """Both splits of one file, in its order. A UsageError for a single row."""
    if len(rows) < 2:
        raise UsageError("one row is not enough for a train and a test split. Use more data.")
    chosen = set(random.Random(seed).sample(range(len(rows)), max(1, round(TEST_SHARE * len(rows)))))
    return {split: [row for place, row in enumerate(rows) if (place in chosen) == (split == "test")] for split in SPLITS}


def table(split: str, rows: Rows, form: str = "number", source: str = GSM8K) -> Table:
    """Rows in the schema that `datasets` gives verl's script: fields within a struct are in alphabetical order."""
    number = form == "number"
    return Table.from_pylist([{
        "data_source": GSM8K if number else source,
        "prompt": [{"content": f"{row['question']} {INSTRUCTION}" if number else row["question"], "role": "user"}],
        "ability": "math" if number else "own",
        "reward_model": {"ground_truth": ground_truth(row["answer"]) if number else row["answer"], "style": "rule"},
        "extra_info": {"answer": row["answer"], "index": index, "question": row["question"], "split": split},
    } for index, row in enumerate(rows)])


def write(splits: dict[str, Rows], folder: Path, *form: str) -> dict[str, Path]:
    """Write one parquet file a split, each whole or not at all. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: folder / f"{split}.parquet" for split in splits}
    with TemporaryDirectory(prefix=".new-", dir=folder) as new:
        for split, rows in splits.items():
            with naming(files[split]):
                parquet.write_table(table(split, rows, *form), Path(new, split))
        # A new train file beside an old test file could share questions; beside none it is no data yet.
        files["test"].unlink(missing_ok=True)
        for split, file in files.items():
            os.replace(Path(new, split), file)
    return files


# ---- how long the rows are: verl stops at one above a limit when it comes to it

@cache
def lengths(files: tuple[Path, ...], columns: tuple[str, ...], model_dir: Path, _digest: str) -> list[list[int]]:
    """Tokens of each row's prompt and of its answer with its end, as verl counts them: [[prompt ...], [answer ...]].
    columns: of prompt (a text, or messages) and answer; "a.b": field b of struct a. _digest: of the files, which may change."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompts, answers = [], []
    for row in (row for file in files for row in parquet.read_table(file).to_pylist()):
        prompt, answer = (row[outer][inner] if inner else row[outer] for outer, _, inner in
                          (column.partition(".") for column in columns))
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        prompts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        answers.append(answer + tokenizer.eos_token)
    return [[len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] for texts in (prompts, answers)]


def length_problems(section: Mapping[str, Any], found: list[list[int]], notes: list[str]) -> list[str]:
    """Say how long the rows are (as lengths() gives them); returns what is wrong. `section`: a configuration's data."""
    strict = section["truncation"] == "error" and not section.get("filter_overlong_prompts")
    if "max_prompt_length" in section:
        # An answer is the model's own: the data's only tell how long one may have to be.
        limits = [("max_prompt_length", "prompts", found[0], strict), ("max_response_length", "answers there", found[1], False)]
    else:
        limits = [("max_length", "rows", list(map(sum, zip(*found, strict=True))), strict)]
    problems = []
    for key, what, counts, strict in limits:
        said = page("lengths.txt", key=key, what=what, counts=counts, limit=section[key], strict=strict)
        (problems if strict and max(counts) > section[key] else notes).append(said)
    return problems


def main(arguments: list[str] | None = None) -> None:
    """What the stage runs: the source, the folder of both parquet files; then the columns, the form and the seed, as in plan."""
    source, output, *more = sys.argv[1:] if arguments is None else arguments
    source, said, gsm8k = checked_source(source), [], ("question", "answer", "number")
    *columns, seed = more or (*gsm8k, str(SEED))
    if not is_own(source):
        columns = gsm8k
    if source == "builtin":
        splits = problems()
    else:
        found = from_files(Path(source)) if os.path.isabs(source) else from_hub(source)
        splits = checked_splits(found, lambda row: checked_row(row, *columns))
    if is_own(source):
        splits, said = without_repetitions(splits)
        splits = drawn(splits["all"], int(seed)) if "all" in splits else splits
    origin = {"hub": f"{GSM8K} on the hub", "builtin": "builtin problems"}.get(source, source)
    for split, file in write(splits, Path(output), columns[-1], Path(source).name).items():
        print(f"{file}: {len(splits[split])} rows from {origin}")
    for line in said:
        print(line)


if __name__ == "__main__":
    sys.exit(exit_status(main))
