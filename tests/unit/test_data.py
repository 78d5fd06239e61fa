"""The data stage: verl's rows to the letter, nothing written when anything is wrong."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pyarrow.parquet
import pytest
import yaml
from hub_fixture import run_program

from bridge import settings
from bridge.errors import UsageError, exit_status
from bridge.runs import record
from bridge.stages import data
from bridge.standins.word_problems import problem, problems
from door import recorded
from downloads_hub import DownloadsHub

GSM8K_DIR = Path(os.environ.get("GSM8K_DIR") or settings.ROOT.parent / "shared" / "data" / "gsm8k")
GOOD = {"question": "Two and 1,000?", "answer": "2+1000=<<2+1000=1002>>1002\n#### 1,002"}


@pytest.fixture(scope="module")
def builtin():
    return problems()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not GSM8K_DIR.is_dir():
        pytest.skip(f"the real GSM8K is not in {GSM8K_DIR} (set GSM8K_DIR)")
    output = tmp_path_factory.mktemp("real")
    data.main([str(GSM8K_DIR), str(output)])
    return output


@pytest.fixture
def source(tmp_path):
    """A folder with one good row a split."""
    folder = tmp_path / "source"
    folder.mkdir()
    for split in data.SPLITS:
        (folder / f"{split}.jsonl").write_text(json.dumps({**GOOD, "question": f"{split}?"}) + "\n", encoding="utf-8")
    return folder


def line(**changes) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def rows_of(file: Path) -> list[dict]:
    return pyarrow.parquet.read_table(file).to_pylist()


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def written_as_verl_does(rows: list[dict], split: str, file: Path) -> None:
    """Write with `datasets` and a map over the rows, as verl 0.5.0's preprocessing does."""
    import datasets

    def as_verl_has_it(row, index):
        question, answer = row.pop("question"), row.pop("answer")
        found = re.search("#### (\\-?[0-9\\.\\,]+)", answer)
        return {
            "data_source": "openai/gsm8k",
            "prompt": [
                {
                    "role": "user",
                    "content": question + " Let's think step by step and output the final answer after \"####\".",
                }
            ],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": found.group(0).split("#### ")[1].replace(",", "")},
            "extra_info": {"split": split, "index": index, "answer": answer, "question": question},
        }

    made = datasets.Dataset.from_list(rows).map(as_verl_has_it, with_indices=True, load_from_cache_file=False)
    made.to_parquet(str(file))


def assert_same_table(ours: Path, theirs: Path) -> None:
    import datasets

    our_table, their_table = pyarrow.parquet.read_table(ours), pyarrow.parquet.read_table(theirs)
    assert our_table.schema.equals(their_table.schema)
    assert our_table.equals(their_table)
    features = datasets.Features.from_arrow_schema
    assert features(our_table.schema) == features(their_table.schema)


def test_real_data_has_gsm8ks_row_counts(real):
    assert len(rows_of(real / "train.parquet")) == 7473
    assert len(rows_of(real / "test.parquet")) == 1319


def test_first_real_row_is_verls_to_the_letter(real):
    question = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
        "How many clips did Natalia sell altogether in April and May?"
    )
    row = rows_of(real / "train.parquet")[0]
    assert list(row) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert row == {
        "data_source": "openai/gsm8k",
        "prompt": [
            {
                "role": "user",
                "content": question + ' Let\'s think step by step and output the final answer after "####".',
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {
            "split": "train",
            "index": 0,
            "question": question,
            "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
            "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
        },
    }


@pytest.mark.parametrize("split", data.SPLITS)
def test_real_table_equals_what_datasets_writes_for_verl(real, tmp_path, split):
    lines = (GSM8K_DIR / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
    written_as_verl_does([json.loads(text) for text in lines if text], split, tmp_path / "verl.parquet")
    assert_same_table(real / f"{split}.parquet", tmp_path / "verl.parquet")


def test_builtin_table_equals_what_datasets_writes_for_verl(builtin, tmp_path):
    ours = data.write(builtin, tmp_path / "ours")
    for split, rows in builtin.items():
        written_as_verl_does(rows, split, tmp_path / f"{split}.parquet")
        assert_same_table(ours[split], tmp_path / f"{split}.parquet")


def test_verls_scorer_gives_every_builtin_answer_full_marks(builtin):
    from verl.utils.reward_score.gsm8k import compute_score

    for row in builtin["train"] + builtin["test"]:
        truth = data.ground_truth(row["answer"])
        assert compute_score(row["answer"], truth) == 1.0, row
        assert compute_score(row["answer"] + "1", truth) == 0.0, row


def test_verls_scorer_gives_every_real_answer_full_marks(real):
    from verl.utils.reward_score.gsm8k import compute_score

    for row in rows_of(real / "test.parquet"):
        assert compute_score(row["extra_info"]["answer"], row["reward_model"]["ground_truth"]) == 1.0, row


def test_builtin_arithmetic_is_right():
    random, made_of = Random(7), yaml.safe_load((settings.CONFIGS / "word_problems.yaml").read_text())
    for row in [problem(made_of, template, random) for template in made_of["templates"] for _ in range(400)]:
        *steps, last = row["answer"].split("\n")
        # Numbers that the text has, besides those worked out by earlier steps.
        known = {int(number) for number in re.findall(r"[0-9]+", row["question"])}
        known |= {2} if re.search("half|twice", row["question"]) else set()
        for text in steps:
            left, sign, right, result, noted, shown = re.fullmatch(
                r"[^0-9]*([0-9]+)([-+*/])([0-9]+)=<<\1\2\3=([0-9]+)>>(([0-9]+))[^0-9]*", text
            ).groups()
            left, right, result = int(left), int(right), int(result)
            expected = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[sign]
            assert result == expected and result >= 0 and noted == shown == str(result), row
            assert {left, right} <= known, row
            known.add(result)
        assert last == f"#### {result}", row


def test_builtin_problems_are_short_and_of_many_kinds(builtin):
    for rows in builtin.values():
        assert max(len(f"{row['question']} {row['answer']}".split()) for row in rows) < 50
        shapes = {re.sub(r"[0-9]+|\b[A-Z]\w+", "", row["question"].split(". ")[-1]) for row in rows}
        assert len(shapes) >= 8
    assert len(yaml.safe_load((settings.CONFIGS / "word_problems.yaml").read_text())["templates"]) >= 8


def test_builtin_problems_are_the_same_on_every_machine(builtin):
    assert problems() == builtin
    assert builtin["train"][0] == {
        "question": "Ken has 12 pencils and gets 12 more. How many pencils does Ken have now?",
        "answer": "Ken has 12+12=<<12+12=24>>24 pencils.\n#### 24",
    }
    # Python's hash seed, which differs from process to process, plays no part.
    code = "import json; from bridge.standins.word_problems import problems; print(json.dumps(problems()))"
    child = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, check=True
    )
    assert json.loads(child.stdout) == builtin


def test_builtin_parquet_files_are_the_same_bytes_every_time(tmp_path):
    for name in ("one", "two"):
        data.main(["builtin", str(tmp_path / name)])
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_no_builtin_question_occurs_twice(builtin):
    questions = [row["question"] for rows in builtin.values() for row in rows]
    assert len(set(questions)) == len(questions)


def test_what_was_made_is_said(tmp_path, capsys):
    data.main(["builtin", str(tmp_path)])
    assert [len(rows_of(tmp_path / f"{split}.parquet")) for split in data.SPLITS] == [512, 64]
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'train.parquet'}: 512 rows from builtin problems",
        f"{tmp_path / 'test.parquet'}: 64 rows from builtin problems",
    ]


def test_folder_rows_keep_their_order_and_commas_leave_only_the_truth(source, tmp_path):
    texts = [line(question=f"Number {index}?\u2028\u00e9", id=index) for index in range(30)]
    # As editors on Windows leave them: byte order mark, CRLF, blank lines at the end.
    (source / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(texts) + b"\r\n\r\n")
    data.main([str(source), str(tmp_path / "output")])
    rows = rows_of(tmp_path / "output" / "train.parquet")
    assert [row["extra_info"]["question"] for row in rows] == [f"Number {index}?\u2028\u00e9" for index in range(30)]
    assert [row["extra_info"]["index"] for row in rows] == list(range(30))
    assert rows[0]["reward_model"] == {"style": "rule", "ground_truth": "1002"}
    assert rows[0]["extra_info"]["answer"] == GOOD["answer"]


def test_line_separators_within_a_text_do_not_end_a_row(source, tmp_path):
    row = json.dumps({**GOOD, "question": "One\u2028two\x85three?"}, ensure_ascii=False)
    (source / "test.jsonl").write_text(row + "\n", encoding="utf-8")
    data.main([str(source), str(tmp_path / "output")])
    assert len(rows_of(tmp_path / "output" / "test.parquet")) == 1


@pytest.mark.parametrize("answer", ["#### 5", "a\n#### -5", "a\n#### 1,234.5  \n", "a\r\n#### .5", "#### 5\n#### 5"])
def test_answers_in_gsm8ks_form_are_taken(answer):
    found = re.search("#### (\\-?[0-9\\.\\,]+)", answer)
    assert data.ground_truth(answer) == found.group(0).split("#### ")[1].replace(",", "")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{", "not JSON in UTF-8 (Expecting property name"),
        (b'{"question": "\xff"}', "not JSON in UTF-8 ('utf-8' codec can't decode byte 0xff in position 14"),
        (b'["question"]', "not a JSON object but of type list"),
        (b"null", "not a JSON object but of type NoneType"),
        (b"[" * 100_000, "not JSON in UTF-8 (maximum recursion depth exceeded"),
        (b"1" * 5000, "4300 digits"),
        (b'{"question": "a?"}', "has no 'answer'"),
        (b'{"answer": "#### 1"}', "has no 'question'"),
        (line(question=""), "its 'question' is empty"),
        (line(question=" \n"), "its 'question' is empty"),
        (line(question=7), "its 'question' is not a text but of type int"),
        (line(answer=None), "its 'answer' is not a text but of type NoneType"),
        (line(question="\ud83d"), "its 'question' holds half a character"),
        (line(answer="It is 5."), "the answer's last line is not '#### NUMBER' but 'It is 5.'"),
        (line(answer="#### 5\nIt is 5."), "last line is not '#### NUMBER' but 'It is 5.'"),
        (line(answer="#### five"), "last line is not '#### NUMBER'"),
        (line(answer="####5"), "last line is not '#### NUMBER'"),
        (line(answer="#### $5"), "last line is not '#### NUMBER'"),
        (line(answer="#### \u0665"), "last line is not '#### NUMBER'"),
        (line(answer="#### 1.2.3"), "'1.2.3' after '####' is not a number"),
        (line(answer="#### ,"), "',' after '####' is not a number"),
        (line(answer="#### -."), "'-.' after '####' is not a number"),
        (line(answer="#### 4\n#### 5"), "verl takes the first"),
    ],
)
def test_bad_row_is_named_with_its_reason(source, tmp_path, bad, reason):
    (source / "test.jsonl").write_bytes(line() + b"\n" + bad + b"\n" + line())
    first, last = fails(source, tmp_path / "output")
    assert first.startswith(f"{source / 'test.jsonl'}, line 2: ")
    assert reason in first
    assert "Nothing was written" in last
    assert not (tmp_path / "output").exists()


def test_all_bad_rows_of_both_files_are_named_at_once(source, tmp_path):
    (source / "train.jsonl").write_bytes(b"\n".join([b"{", line(), b"7", b"", line(answer="five")]))
    (source / "test.jsonl").write_bytes(b"\n".join([line(), b"\xff", line()]))
    shown = fails(source, tmp_path / "output")
    assert [text.split(": ")[0] for text in shown[:-1]] == [
        f"{source / 'train.jsonl'}, line 1",
        f"{source / 'train.jsonl'}, line 3",
        f"{source / 'train.jsonl'}, line 5",
        f"{source / 'test.jsonl'}, line 2",
    ]


def test_a_long_list_of_bad_rows_is_cut_and_the_rest_counted(source, tmp_path):
    (source / "train.jsonl").write_bytes(b"{}\n" * 57)
    shown = fails(source, tmp_path / "output")
    assert len(shown) == 20 + 2
    assert shown[-2] == "... and 37 more bad rows."


def test_bad_rows_leave_old_files_untouched(source, tmp_path):
    output = tmp_path / "output"
    data.main(["builtin", str(output)])
    before = content(output)
    (source / "test.jsonl").write_bytes(b"{}")
    fails(source, output)
    assert content(output) == before
    assert sorted(os.listdir(output)) == ["test.parquet", "train.parquet"]


@pytest.mark.parametrize("empty", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_files_without_rows_are_refused(source, tmp_path, empty):
    for split in data.SPLITS:
        (source / f"{split}.jsonl").write_bytes(empty)
    shown = fails(source, tmp_path / "output")
    assert shown[:2] == [f"{source / 'train.jsonl'} has no rows.", f"{source / 'test.jsonl'} has no rows."]
    assert not (tmp_path / "output").exists()


def test_missing_folder_is_named_with_the_possibilities(tmp_path):
    for missing in (tmp_path / "nowhere", "./nowhere", "~/nowhere", "nowhere"):
        (text,) = fails(missing, tmp_path / "output")
        assert f"DATA_SOURCE='{missing}'" in text
        assert "hub" in text and "builtin" in text and "train.jsonl" in text


@pytest.mark.parametrize(("typo", "meant"), [("buildin", "builtin"), ("HUB", "hub"), ("built-in", "builtin")])
def test_mistyped_source_is_met_with_the_nearest(tmp_path, typo, meant):
    (text,) = fails(typo, tmp_path / "output")
    assert text.endswith(f"Did you mean {meant}?")


def test_every_file_that_a_folder_lacks_is_named(source, tmp_path):
    (source / "train.jsonl").unlink()
    (text,) = fails(source, tmp_path / "output")
    assert str(source / "train.jsonl") in text
    (source / "test.jsonl").unlink()
    assert len(fails(source, tmp_path / "output")) == 2


def test_a_folder_with_two_files_of_one_split_is_refused_beside_what_it_lacks(source, tmp_path):
    (source / "train.csv").write_bytes(b"")
    (source / "test.jsonl").unlink()
    two, lacks = fails(source, tmp_path / "output")
    assert "has train.jsonl and train.csv. Keep one of them." in two
    assert f"lacks the file {source / 'test'}.jsonl" in lacks and data.FORM in lacks


# ---- other forms, other columns

ROWS = [{"q": f"What is twice {number}?", "a": f"{number}+{number}\n#### {2 * number}", "more": None} for number in range(20)]


def written(folder: Path, suffix: str, rows: list[dict]) -> Path:
    """These rows as a file of this form, by the libraries that people write them with."""
    import pandas

    frame, file = pandas.DataFrame(rows), folder / f"mine{suffix}"
    {".jsonl": lambda: frame.to_json(file, orient="records", lines=True), ".json": lambda: frame.to_json(file, orient="records"),
     ".csv": lambda: frame.to_csv(file, index=False), ".parquet": lambda: frame.to_parquet(file)}[suffix]()
    return file


def made_of(file: Path, output: Path, *form: str) -> dict[str, list[dict]]:
    """The rows that the stage makes of it."""
    data.main([str(file), str(output), "q", "a", *(form or ("number", "0"))])
    return {split: rows_of(output / f"{split}.parquet") for split in data.SPLITS}


@pytest.mark.parametrize("suffix", data.READERS)
def test_a_file_of_every_form_is_split_by_the_seed(tmp_path, suffix):
    file = written(tmp_path, suffix, ROWS)
    made = made_of(file, tmp_path / "output")
    assert [len(made[split]) for split in data.SPLITS] == [18, 2]
    questions = {split: [row["extra_info"]["question"] for row in made[split]] for split in data.SPLITS}
    assert sorted(questions["train"] + questions["test"]) == sorted(row["q"] for row in ROWS)
    assert made["train"][0]["reward_model"]["ground_truth"] in [str(2 * number) for number in range(20)]
    assert made_of(file, tmp_path / "again") == made
    assert made_of(file, tmp_path / "other", "number", "1")["test"] != made["test"]


@pytest.mark.parametrize("suffix", data.READERS)
def test_a_number_is_an_answer(tmp_path, suffix):
    rows = [{"q": f"{value} is?", "a": value} for value in (7, -3, 1000)]
    made = made_of(written(tmp_path, suffix, rows), tmp_path / "output")
    rows = made["train"] + made["test"]
    assert {row["reward_model"]["ground_truth"] for row in rows} == {"7", "-3", "1000"}
    assert {row["extra_info"]["answer"] for row in rows} == {"#### 7", "#### -3", "#### 1000"}


@pytest.mark.parametrize(("answer", "reason"), [
    ("1e3", "the answer's last line is not '#### NUMBER' but '1e3'"), ("½", "but '½'"), ("#### ½", "but '#### ½'"),
    ("7\0", "its 'a' holds NUL (character 2)"), ("", "its 'a' is empty"), ("四十二", "but '四十二'")])
def test_a_bad_row_of_a_csv_is_named_by_its_line(tmp_path, answer, reason):
    # A quoted field may hold line ends: the line is where the row ends.
    (tmp_path / "mine.csv").write_text(f'q,a\n"two\nlines","#### 2"\nnext,"{answer}"\nlast,3\n', encoding="utf-8")
    first, *_ = fails(tmp_path / "mine.csv", tmp_path / "output")
    assert first.startswith(f"{tmp_path / 'mine.csv'}, line 4: ") and reason in first


def fails(source: object, output: Path, *more: str) -> list[str]:
    with pytest.raises(UsageError) as error:
        data.main([str(source), str(output), *(more or (("q", "a", "number", "0") if str(source).endswith(".csv") else ()))])
    return error.value.problems


def test_any_answer_is_taken_where_a_reward_judges_it(tmp_path):
    rows = [{"q": "猫は？", "a": "いいえ\nはい"}, {"q": "Huge? " * 200_000, "a": "1"}, {"q": "#### 1", "a": "#### 2 #### 3"}]
    made = made_of(written(tmp_path, ".jsonl", rows), tmp_path / "output", "text", "0")
    found = {row["extra_info"]["question"]: row for row in made["train"] + made["test"]}
    truths = {question: row["reward_model"]["ground_truth"] for question, row in found.items()}
    assert truths == {row["q"]: row["a"] for row in rows}
    assert all(row["prompt"] == [{"content": question, "role": "user"}] for question, row in found.items())
    assert {row["data_source"] for row in found.values()} == {"mine.jsonl"}


def test_what_comes_twice_is_left_out_of_training(tmp_path, capsys):
    for split, numbers in {"train": [1, 2, 1, 3, 4], "test": [3, 5, 5]}.items():
        (tmp_path / f"{split}.jsonl").write_bytes(b"\n".join(line(question=f"{number}?") for number in numbers))
    data.main([str(tmp_path), str(tmp_path / "output")])
    assert [row["extra_info"]["question"] for row in rows_of(tmp_path / "output" / "train.parquet")] == ["1?", "2?", "4?"]
    assert [row["extra_info"]["question"] for row in rows_of(tmp_path / "output" / "test.parquet")] == ["3?", "5?"]
    said = capsys.readouterr().out
    assert "2 of 5 rows of train dropped" in said and "1 of 3 rows of test dropped" in said


@pytest.mark.parametrize(("name", "content", "said"), [
    ("mine.txt", b"x", "ends in none of .jsonl, .json, .csv, .parquet"), ("mine.json", b"{}", "it is not a list of rows"),
    ("mine.json", b"[", "cannot be read as .json"), ("mine.parquet", b"x", "cannot be read as .parquet"),
    ("mine.csv", b"\xff,a\n1,2\n", "cannot be read as .csv"), ("mine.csv", b"q,a\n1,2,3\n", "line 2: not a JSON object"),
    ("mine.csv", b"q,a\n1\n", "line 2: its 'a' is not a text"), ("mine.csv", b"q,a\n1,1\n", "one row is not enough"),
    ("mine.csv", b"x,a\n1,1\n", "line 2: has no 'q'"), ("mine.csv", b"", "has no rows")])
def test_a_file_that_cannot_be_is_refused_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert said in fails(tmp_path / name, tmp_path / "output", "q", "a", "number", "0")[0]
    assert not (tmp_path / "output").exists()


def configurations(**files: dict[str, str]) -> bytes:
    """The head of a data set's README, which says what its configurations are: {split: path of its files}."""
    parts = [{"config_name": name, "data_files": [{"split": split, "path": path} for split, path in paths.items()]}
             for name, paths in files.items()]
    return f"---\nconfigs: {json.dumps(parts)}\n---\n".encode()


def sums(number: int) -> bytes:
    return b"".join(json.dumps({"q": f"{place}?", "a": str(place)}).encode() + b"\n" for place in range(number))


def parquet(*rows: dict) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file.getvalue()


# GSM8K as it lies there, and what others have published.
GSM8K_PATHS = {split: f"main/{split}-00000-of-00001.parquet" for split in data.SPLITS}
PUBLISHED = {
    data.GSM8K: {
        "README.md": configurations(main={split: f"main/{split}-*" for split in data.SPLITS}, socratic={"train": "none-*"}),
        **{path: parquet(*[{**GOOD, "question": f"{split}?"}] * 3) for split, path in GSM8K_PATHS.items()}},
    "someone/sums": {
        "README.md": configurations(small={"train": "small/*.jsonl"}, large={"train": "large.jsonl"}),
        "small/a.jsonl": sums(10), "large.jsonl": sums(20)},
    "someone/plain": {"train.jsonl": sums(30)}, "someone/gated": {"train.jsonl": sums(10)},
    "someone/tests": {"test.jsonl": sums(10)},
    "someone/bad": {"train.jsonl": line() + b"\n", "test.jsonl": line() + b"\n" + line(answer="five") + b"\n"}}
# Rows of each split.
NUMBERS = {"someone/sums:small": [9, 1], "someone/sums:large": [18, 2], "someone/plain": [27, 3]}
NO = "cannot be had from the Hugging Face Hub"
REFUSED = {
    "someone/plain": "someone/plain train, row 1: has no 'question'",
    "someone/bad": "someone/bad test, row 2: the answer's last line is not '#### NUMBER' but 'five'",
    "someone/tests": "someone/tests has no split train; it has test",
    "someone/sums": f"someone/sums {NO}: ValueError: Config name is missing",
    "someone/sums:third": f"someone/sums {NO}: ValueError: BuilderConfig 'third' not found",
    "someone/none": f"someone/none {NO}: DatasetNotFoundError: Dataset 'someone/none' doesn't exist on the Hub",
    "someone/gated": f"someone/gated {NO}: DatasetNotFoundError: Dataset 'someone/gated' is a gated dataset on the Hub"}
# One process for all, since the libraries read where the hub is when they are imported. Its arguments: SOURCE OUTPUT...
ONE_BY_ONE = """
import json, sys
from bridge.errors import exit_status
from bridge.stages import data
for arguments in json.loads(sys.argv[1]):
    print("status", exit_status(lambda: data.main(arguments)), flush=True)
    print("end", file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def fetched(tmp_path_factory) -> dict[tuple[str, ...], tuple[int, str, Path]]:
    """What the stage made of data sets of the stand-in hub: by its arguments the status, what it said, and the output."""
    folder = tmp_path_factory.mktemp("fetched")
    asked = [("hub",), *((name, "q", "a", "number", "0") for name in NUMBERS), *((name,) for name in REFUSED)]
    outputs = [folder / str(place) for place in range(len(asked))]
    with DownloadsHub(folder / "hub", {}) as hub:
        for name, files in PUBLISHED.items():
            hub.add_model(f"datasets/{name}", files, gated=name == "someone/gated")
        result = run_program("-c", ONE_BY_ONE, json.dumps([[name, str(output), *more] for (name, *more), output in zip(
            asked, outputs, strict=True)]), env={**hub.env(), "HF_HOME": str(folder / "caches")})
    assert result.returncode == 0, result.stderr
    statuses = [int(status) for status in re.findall(r"^status (\d+)$", result.stdout, re.MULTILINE)]
    return dict(zip(asked, zip(statuses, result.stderr.split("end\n")[:-1], outputs, strict=True), strict=True))


@pytest.mark.parametrize(("name", "numbers"), NUMBERS.items())
def test_another_data_set_of_the_hub_is_fetched_by_its_name(fetched, name, numbers):
    status, said, output = fetched[name, "q", "a", "number", "0"]
    assert status == 0, said
    made = [rows_of(output / f"{split}.parquet") for split in data.SPLITS]
    assert [len(rows) for rows in made] == numbers
    assert {row["extra_info"]["question"] for rows in made for row in rows} == {f"{place}?" for place in range(sum(numbers))}


@pytest.mark.parametrize("name", REFUSED)
def test_a_data_set_of_the_hub_that_cannot_be_is_refused(fetched, name):
    status, said, output = fetched[name,]
    assert status == 2 and f"bridge: {REFUSED[name]}" in said and "Traceback" not in said
    assert not output.exists()


def test_folder_may_be_relative_or_in_the_home(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("source", "./source", "../" + tmp_path.name + "/source", "~/source", str(source)):
        assert data.checked_source(name) == str(source)


def test_a_folder_called_hub_needs_a_path(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source.rename("hub")
    assert data.checked_source("hub") == "hub"
    assert data.checked_source("./hub") == str(tmp_path / "hub")


@pytest.mark.parametrize("failing", data.SPLITS)
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_new_file_never_stands_beside_an_old_one(source, tmp_path, monkeypatch, failing, old, error):
    output = tmp_path / "output"
    if old:
        data.main(["builtin", str(output)])
    before = content(output)
    replace, failed = os.replace, []

    def fail_once(new, file):
        if Path(file) == output / f"{failing}.parquet" and not failed:
            failed.append(file)
            raise error("as asked")
        replace(new, file)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(error, match="as asked"):
        data.main([str(source), str(output)])
    # And neither is cut short: a training names what is missing.
    left = content(output)
    assert sorted(os.listdir(output)) == sorted(left) and "test.parquet" not in left
    assert ("train.parquet" in left) == (old or failing == "test")
    assert (left.get("train.parquet") == before.get("train.parquet")) == (failing == "train")


def test_a_full_disk_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def full(table, file):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        data.main([str(source), str(tmp_path / "output")])
    assert os.listdir(tmp_path / "output") == []


def test_new_files_replace_old_ones(source, tmp_path):
    for _ in range(2):
        data.main([str(source), str(tmp_path / "output")])
    data.main(["builtin", str(tmp_path / "output")])
    assert len(rows_of(tmp_path / "output" / "train.parquet")) == 512
    assert sorted(os.listdir(tmp_path / "output")) == ["test.parquet", "train.parquet"]


@pytest.mark.parametrize(
    "surroundings", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_ENDPOINT": "no-url"}]
)
def test_unreachable_hub_names_the_cures(tmp_path, surroundings):
    # A process of its own, because the hub's libraries read the environment when they are imported.
    child = subprocess.run(
        [sys.executable, "-m", "bridge.stages.data", "hub", str(tmp_path / "output")],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), **surroundings},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 2
    assert "Traceback" not in child.stderr
    for word in ("openai/gsm8k", "machine with internet", "DATA_SOURCE=)", "train.jsonl", "DATA_SOURCE=builtin"):
        assert word in child.stderr
    assert not (tmp_path / "output").exists()


def test_gsm8k_of_the_hub_is_written_alike(fetched):
    status, said, output = fetched["hub",]
    assert status == 0, said
    for split in data.SPLITS:
        rows = rows_of(output / f"{split}.parquet")
        assert [row["extra_info"]["index"] for row in rows] == [0, 1, 2]
        assert {row["extra_info"]["question"] for row in rows} == {f"{split}?"}


def test_builtin_and_folder_do_not_import_datasets(source, tmp_path):
    for name in ("builtin", source):
        code = "import sys; from bridge.stages.data import main; main(sys.argv[1:]); assert 'datasets' not in sys.modules"
        subprocess.run([sys.executable, "-c", code, str(name), str(tmp_path / "output")], check=True)


def test_mistakes_end_with_status_2(source, tmp_path, monkeypatch, capsys):
    (source / "train.jsonl").write_bytes(b"{}")
    monkeypatch.setattr(sys, "argv", ["data", str(source), str(tmp_path / "output")])
    assert exit_status(data.main) == 2
    assert f"bridge: {source / 'train.jsonl'}, line 1: has no 'question'" in capsys.readouterr().err


def test_plan_runs_this_module_with_the_checked_source(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = {"WORK_DIR": str(tmp_path / "work"), "DATA_SOURCE": "source"}
    plan = data.plan(settings.read(env), env)
    folder = tmp_path / "work" / "data" / "gsm8k"
    assert plan.command == [sys.executable, "-m", "bridge.stages.data", str(source), str(folder), "question", "answer", "number",
                            "0"]
    assert plan.record_dir == folder
    assert not plan.keep_log
    assert not (tmp_path / "work").exists()
    for name in ("hub", "builtin"):
        assert data.plan(settings.read({**env, "DATA_SOURCE": name}), env).command[3] == name


def test_data_of_another_source_are_not_replaced(source, tmp_path):
    def planned(wanted: object):
        return data.plan(settings.read({"WORK_DIR": str(tmp_path / "w"), "DATA_SOURCE": str(wanted)}), {})

    (tmp_path / "w").mkdir()
    folder = planned("builtin").record_dir
    data.write(problems(), folder)
    # Put there by hand, or left by a `make data` that was killed before its record.
    with pytest.raises(UsageError, match="that `make data` did not make"):
        planned("builtin")
    record.write_json(folder / "run.json", recorded(attempts=[{"command": planned_command(source)}]), [])
    for wanted in ("builtin", "hub", tmp_path):
        (tmp_path / "train.jsonl").write_bytes(line())
        (tmp_path / "test.jsonl").write_bytes(line())
        with pytest.raises(UsageError) as caught:
            planned(wanted)
        for said in (f"{folder} holds data made with DATA_SOURCE={source}", f"DATA_SOURCE={wanted} would replace", "make model"):
            assert said in str(caught.value)
    assert planned(source).command[:5] == [sys.executable, *planned_command(source)[1:-1], str(folder)]
    for file in folder.glob("*.parquet"):
        file.unlink()
    assert planned("builtin").command


def planned_command(source: object) -> list[str]:
    """What the record of data made from this source has as its command."""
    return ["python", "-m", "bridge.stages.data", str(source), "/somewhere"]


def test_plan_refuses_an_unknown_source(tmp_path):
    env = {"WORK_DIR": str(tmp_path), "DATA_SOURCE": "buildin"}
    with pytest.raises(UsageError, match="Did you mean builtin"):
        data.plan(settings.read(env), env)
