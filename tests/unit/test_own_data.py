"""Data and a reward of one's own in the stages that train and judge: what is looked at before the start, and a whole run."""

import json
import math
import os
from pathlib import Path

import pytest

from bridge.errors import UsageError
from bridge.runs import metrics, record
from bridge.stages import eval as evaluation
from bridge.stages import reward
from door import TRAINER, asked, bridge

GOOD = "def digits(data_source, solution_str, ground_truth, extra_info):\n    return sum(map(str.isdigit, solution_str)) / 100\n"


def own_data(work_dir: Path, questions: list[str], **env: str) -> dict[str, str]:
    """A WORK_DIR with a model and data of a csv, whose answers no number ends; returns the settings for it."""
    work_dir.mkdir(exist_ok=True)
    (work_dir / "mine.csv").write_text("ask,say\n" + "".join(f"{text},yes {place}\n" for place, text in enumerate(questions)))
    (work_dir / "judge.py").write_text(GOOD)
    env = {"WORK_DIR": str(work_dir), "MODEL": "tiny", "PROFILE": "tiny", "GPUS": "2", "DATA_SOURCE": str(work_dir / "mine.csv"),
           "QUESTION": "ask", "ANSWER": "say", "REWARD": f"{work_dir / 'judge.py'}:digits", **env}
    for stage in ("data", "model"):
        result = bridge(stage, **env)
        assert result.returncode == 0, result.stderr
    return env


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> dict[str, str]:
    return own_data(tmp_path_factory.mktemp("mine") / "work", [f"Question {number}?" for number in range(100)])


def test_a_dry_run_says_how_long_the_rows_are_and_what_the_reward_gives(mine):
    result = asked("ppo", "--dry-run", **mine)
    assert result.returncode == 0, result.stderr
    assert "prompts: 23 to 24 tokens, data.max_prompt_length=384" in result.stderr
    assert "answers there: 4 to 5 tokens, data.max_response_length=48" in result.stderr
    # Of "yes 3" and "yes 33".
    assert "REWARD=judge.py:digits gives the first 10 rows their own answers: 0.0" in result.stderr
    assert "custom_reward_function.path=" in result.stdout and mine["REWARD"].partition(":")[0] in result.stdout
    assert "rows: 27 to 29 tokens, data.max_length=256" in asked("sft", "--dry-run", **mine).stderr


def test_answers_without_numbers_need_a_reward(mine):
    result = asked("ppo", "--dry-run", **{**mine, "REWARD": ""})
    assert result.returncode == 2 and "Say what judges them: REWARD=FILE.py:FUNCTION." in result.stderr
    assert asked("sft", "--dry-run", **{**mine, "REWARD": ""}).returncode == 0


def test_rows_longer_than_a_limit_are_refused_with_the_limit_that_fits(mine, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "models").symlink_to(Path(mine["WORK_DIR"], "models"))
    env = own_data(tmp_path / "work", [*(f"Question {number}?" for number in range(99)), "long " * 300 + "?"])
    for stage, key in (("sft", "max_length"), ("ppo", "max_prompt_length")):
        more = ["data.truncation=error"]
        result = asked(stage, "--dry-run", *more, **env)
        assert result.returncode == 2 and "verl stops at the 1 of 100 that are longer" in result.stderr
        fits = result.stderr.partition(f"Use data.{key}=")[2].partition(",")[0]
        result = asked(stage, "--dry-run", f"data.{key}={fits}", *more, **env)
        assert result.returncode == 0, result.stderr
    # One less does not.
    assert asked(stage, "--dry-run", f"data.{key}={int(fits) - 1}", *more, **env).returncode == 2
    # Cut off, as the small profiles have it: said, since an answer's end may be what is cut.
    assert "1 of 100 are longer; data.max_length=" in asked("sft", "--dry-run", **env).stderr


@pytest.mark.parametrize(("program", "said"), [
    (GOOD.replace("digits", "other"), "the file has no function digits"),
    ("digits = 3\n", "the file has no function digits"),
    ("def digits(:\n", "cannot be loaded: SyntaxError"),
    ("import no_such_module\n", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module' (line 1)"),
    ("def digits(**row):\n    return 1 / 0\n", "their own answers): ZeroDivisionError: division by zero (line 2)"),
    ("def digits(solution_str, **row):\n    return 1 / len(solution_str)\n", "empty ones): ZeroDivisionError"),
    ("def digits(**row):\n    return 'good'\n", "it returned 'good'. A finite number is wanted"),
    ("def digits(**row):\n    return float('nan')\n", "it returned nan"),
    ("def digits(**row):\n    return {'points': 1}\n", "it returned {'points': 1}"),
    ("def digits(answer):\n    return 1\n", "TypeError"),
    ("import os\ndef digits(**row):\n    os._exit(3)\n", "ended its process (3)"),
])
def test_a_reward_that_does_not_do_is_refused_with_its_place(mine, tmp_path, program, said):
    (tmp_path / "judge.py").write_text(program)
    result = asked("ppo", "--dry-run", **{**mine, "REWARD": f"{tmp_path / 'judge.py'}:digits"})
    assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr
    assert str(tmp_path / "judge.py") in result.stderr


def test_a_reward_that_takes_too_long_is_refused(mine, tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text("import time\ndef digits(**row):\n    time.sleep(100)\n")
    monkeypatch.setattr(reward, "PATIENCE", 3)
    with pytest.raises(UsageError, match=r"takes longer than 3 s for 10 rows"):
        reward.tried(tmp_path / "judge.py", "digits", "", "{}", Path(mine["WORK_DIR"], "data/gsm8k/train.parquet"))


def test_numbers_of_every_kind_are_rewards():
    import numpy
    row = {"data_source": "mine", "reward_model": {"ground_truth": "1"}, "extra_info": {}}
    for given in (1, 0.5, True, numpy.float32(0.5), {"score": 1, "more": "x"}):
        assert reward.score(lambda given=given, **_row: given, row, "") == (given["score"] if isinstance(given, dict) else given)


# What both loaders of the reward make of a file: the trial before the start, and verl's, called as its reward manager does.
BOTH_LOADERS = """
import json, sys
from pathlib import Path
import numpy, torch
from transformers import AutoTokenizer
from verl import DataProto
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.workers.reward_manager.naive import NaiveRewardManager
from bridge.errors import UsageError
from bridge.stages import reward

file, tokenizer = Path(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2])
kwargs, row = json.loads(sys.argv[3]), json.loads(sys.argv[4])
answer = torch.tensor([tokenizer.encode("so: 7")])
config = {"custom_reward_function": {"path": str(file), "name": "judge", "reward_kwargs": kwargs}}
batch = DataProto.from_dict(
    {"prompts": answer, "responses": answer, "attention_mask": torch.ones(1, 2 * answer.shape[1], dtype=torch.int64)},
    {name: numpy.array([row[name]], dtype=object) for name in ("data_source", "reward_model", "extra_info")})

def of_verl():
    return NaiveRewardManager(tokenizer, 0, get_custom_reward_fn(config))(batch)[0, -1].item()

seen = []
for load in (lambda: reward.score(reward.load(file, "judge"), row, "so: 7", **kwargs), of_verl):
    try:
        seen.append([load(), open(f"{file}.said").read()])
    except (UsageError, AttributeError, RuntimeError, FileNotFoundError) as error:
        seen.append(["refused", type(error).__name__])
print(json.dumps(seen))
"""
# It says what it was called with, too.
ALL = """import json
def judge(data_source, solution_str, ground_truth, extra_info=None, **more):
    open(__file__ + ".said", "w").write(json.dumps([data_source, solution_str, ground_truth, extra_info, more]))
    return float(solution_str[-1]) + len(more)
"""


@pytest.mark.parametrize(("program", "kwargs", "seen"), [
    (ALL, {}, [["mine", "so: 7", "8", {"index": 3, "num_turns": None}, {}], 7]),
    (ALL, {"most": 2}, [["mine", "so: 7", "8", {"index": 3, "num_turns": None}, {"most": 2}], 8]),
    (ALL, {"extra_info": 5, "ground_truth": "9"}, [["mine", "so: 7", "9", 5, {}], 7]),
    (ALL.replace("return", "return {'more': 1, 'score': ").rstrip() + "}\n", {},
     [["mine", "so: 7", "8", {"index": 3, "num_turns": None}, {}], 7]),
    (ALL.replace("def judge", "class Judge:\n  def __call__").replace("(data", "(self, data") + "judge = Judge()\n", {},
     [["mine", "so: 7", "8", {"index": 3, "num_turns": None}, {}], 7]),
    # The file is a module to whom looks for it, by verl's name.
    ("import sys\n" + ALL + "assert sys.modules[__name__].judge is judge and __name__ == 'custom_module'\n", {},
     [["mine", "so: 7", "8", {"index": 3, "num_turns": None}, {}], 7]),
    (ALL.replace("judge", "other"), {}, "AttributeError"), ("def judge(:\n", {}, "RuntimeError"),
    ("import no_such_module\n", {}, "RuntimeError"), (None, {}, "FileNotFoundError"),
])
def test_the_trial_loads_and_calls_the_reward_as_verl_does(mine, tmp_path, program, kwargs, seen):
    if program:
        (tmp_path / "judge.py").write_text(program)
    row = {"data_source": "mine", "reward_model": {"ground_truth": "8"}, "extra_info": {"index": 3}}
    result = TRAINER.run("-c", BOTH_LOADERS, str(tmp_path / "judge.py"), f"{mine['WORK_DIR']}/models/tiny", json.dumps(kwargs),
                         json.dumps(row), env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    ours, verls = json.loads(result.stdout.strip().splitlines()[-1])
    if isinstance(seen, str):
        assert ours == ["refused", "UsageError"] and verls == ["refused", seen]
    else:
        assert [json.loads(ours[1]), ours[0]] == seen and verls == ours


@pytest.mark.parametrize(("value", "said"), [("judge.py", "FILE.py:F"), ("judge:f", "FILE.py:F"), (":f", "FILE.py:F")])
def test_a_reward_that_is_not_named_so_is_refused(mine, value, said):
    result = asked("ppo", "--dry-run", **{**mine, "REWARD": value})
    assert result.returncode == 2 and f"REWARD={value!r} is not of the form {said}" in result.stderr


def test_scores_other_than_0_and_1_have_an_interval_of_their_own():
    low, high = evaluation.interval([0.2, 0.4, 0.9, 0.5])
    # By hand: mean 0.5, standard error 0.1472, t of three degrees of freedom 3.182.
    assert (low, high) == pytest.approx((0.5 - 3.182 * 0.1472, 0.5 + 3.182 * 0.1472), abs=1e-3)
    assert evaluation.interval([0.3])[1] == math.inf


@pytest.mark.long
def test_ppo_and_eval_are_judged_by_the_reward(mine):
    # By GRPO, so that this runs on two ranks, too.
    mine = {**mine, "ALGO": "grpo"}
    result = bridge("ppo", "trainer.total_training_steps=1", **mine, timeout=600)
    assert result.returncode == 0, result.stderr
    folder = Path(mine["WORK_DIR"], "runs/default")
    (row,) = metrics.read(folder / "ppo" / "metrics.jsonl")
    # A random model writes some digits, and verl's own scorer would give 0 or 1 or refuse the data.
    assert 0 < row["critic/score/mean"] < 0.48
    assert row["critic/advantages/min"] < 0 < row["critic/advantages/max"] and "critic/vf_loss" not in row
    recorded = record.read(folder / "ppo")
    judge = Path(mine["REWARD"].partition(":")[0])
    assert recorded["inputs"]["code"] == {"custom_reward_function.path": record.sha256(judge)}
    # By the reward of the run, whether it is named again or not.
    result = bridge("eval", **{**mine, "LIMIT": "4", "STAGE": "base", "REWARD": ""}, timeout=600)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in (folder / "eval" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4
    for answer in answers:
        assert answer["score"] == pytest.approx(sum(map(str.isdigit, answer["response"])) / 100)
    # One that has changed is another run's.
    judge.write_text(GOOD.replace("100", "50"))
    result = bridge("ppo", "trainer.total_training_steps=1", **mine)
    assert result.returncode == 2 and "code.custom_reward_function.path" in result.stderr
