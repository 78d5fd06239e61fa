"""[image] Made-up word problems in GSM8K's form, from the templates of configs/word_problems.yaml, which says what for."""

import operator
import re
from collections.abc import Mapping
from random import Random
from typing import Any

import yaml

from bridge.settings import CONFIGS

TRAIN_ROWS = 512
TEST_ROWS = 64
SEED = 0
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
FORMULA = re.compile(r"\[(\w+)([-+*/])(\w+)\]")


def problem(words: Mapping[str, list], template: Mapping[str, Any], random: Random) -> dict[str, str]:
    """One problem of a kind as a row {"question", "answer"}, with GSM8K's calculator annotation: "3+4=<<3+4=7>>7"."""
    (name, friend), thing = random.sample(words["names"], 2), random.choice(words["things"])
    values = {number: random.randint(*limits) for number, limits in template["numbers"].items()}

    def filled(text: str, shown: str) -> str:
        def work_out(formula: re.Match) -> str:
            left, sign, right = values[formula[1]], formula[2], values[formula[3]]
            values["it"] = OPERATORS[sign](left, right)
            return shown.format(formula=f"{left}{sign}{right}", result=values["it"])

        return FORMULA.sub(work_out, text.format(name=name, friend=friend, thing=thing, **values))

    question = filled(template["question"], "{result}")
    steps = [filled(step, "{formula}=<<{formula}={result}>>{result}") for step in template["steps"]]
    return {"question": question, "answer": "\n".join([*steps, f"#### {values['it']}"])}


def problems() -> dict[str, list[dict[str, str]]]:
    """The rows of both splits, the same on every machine. No question occurs twice, and both splits hold each template."""
    random, rows = Random(SEED), {}
    words = yaml.safe_load((CONFIGS / "word_problems.yaml").read_text(encoding="utf-8"))
    while len(rows) < TEST_ROWS + TRAIN_ROWS:
        row = problem(words, words["templates"][len(rows) % len(words["templates"])], random)
        rows.setdefault(row["question"], row)
    made = list(rows.values())
    return {"train": made[TEST_ROWS:], "test": made[:TEST_ROWS]}
