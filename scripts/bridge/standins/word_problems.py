"""[image] Word problems in GSM8K's form, made from templates: what DATA_SOURCE=builtin trains on.

They are for rehearsals, where no hub can be reached and a tiny model must learn something within seconds: short
texts, one or two steps, whole numbers below about 200. A result on them says nothing about GSM8K.
"""

import operator
import re
from random import Random

TRAIN_ROWS = 512
TEST_ROWS = 64
SEED = 0

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Finn", "Grace", "Hana", "Ken", "Lily", "Mika", "Tom")
THINGS = ("apples", "books", "cards", "coins", "cookies", "eggs", "marbles", "pencils", "shells", "stamps")

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
FORMULA = re.compile(r"\[(\w+)([-+*/])(\w+)\]")


# Kinds of problems: the question; by name, the least and the most that each number may be; the steps. In the texts {had} is a
# number and [had+more] a formula; `it` is what the formula before came to.
Template = tuple[str, dict[str, tuple[int, int]], list[str]]
TEMPLATES: tuple[Template, ...] = (
    ("{name} has {had} {thing} and gets {more} more. How many {thing} does {name} have now?",
     {"had": (2, 30), "more": (2, 20)},
     ["{name} has [had+more] {thing}."]),
    ("{name} has {had} {thing} and gives {given} to {friend}. How many {thing} does {name} have left?",
     {"had": (22, 40), "given": (2, 20)},
     ["{name} has [had-given] {thing} left."]),
    ("{name} has {count} boxes of {size} {thing} and {loose} loose {thing}. How many {thing} does {name} have in all?",
     {"count": (2, 9), "size": (2, 12), "loose": (2, 9)},
     ["The boxes hold [count*size] {thing}.", "In all {name} has [it+loose] {thing}."]),
    ("{name} shares [friends*each] {thing} equally among {friends} friends. How many {thing} does each friend get?",
     {"friends": (2, 9), "each": (2, 12)},
     ["Each friend gets [it/friends] {thing}."]),
    ("{name} has ${had} and buys {count} {thing} for ${price} each. How many dollars does {name} have left?",
     {"had": (83, 120), "count": (2, 9), "price": (2, 9)},
     ["The {thing} cost $[count*price].", "{name} has $[had-it] left."]),
    ("{name} reads {pages} pages a day of a book of {book} pages. How many pages are left after {days} days?",
     {"pages": (2, 12), "days": (2, 9), "book": (110, 150)},
     ["{name} reads [pages*days] pages.", "There are [book-it] pages left."]),
    ("{name} works {hours} hours for ${pay} an hour and spends ${spent} on {thing}. "
     "How many dollars does {name} have left?",
     {"hours": (3, 9), "pay": (5, 12), "spent": (2, 13)},
     ["{name} earns $[hours*pay].", "{name} has $[it-spent] left."]),
    ("{name} sets up {rows} rows of {chairs} chairs. {taken} chairs are taken. How many chairs are free?",
     {"rows": (4, 12), "chairs": (4, 12), "taken": (2, 14)},
     ["There are [rows*chairs] chairs.", "[it-taken] chairs are free."]),
)


def problem(template: Template, random: Random) -> dict[str, str]:
    """One problem of a kind as a row {"question", "answer"}, with GSM8K's calculator annotation: "3+4=<<3+4=7>>7"."""
    question, numbers, steps = template
    (name, friend), thing = random.sample(NAMES, 2), random.choice(THINGS)
    values = {number: random.randint(*limits) for number, limits in numbers.items()}

    def filled(text: str, shown: str) -> str:
        def work_out(formula: re.Match) -> str:
            left, sign, right = values[formula[1]], formula[2], values[formula[3]]
            values["it"] = OPERATORS[sign](left, right)
            return shown.format(formula=f"{left}{sign}{right}", result=values["it"])

        return FORMULA.sub(work_out, text.format(name=name, friend=friend, thing=thing, **values))

    question = filled(question, "{result}")
    steps = [filled(step, "{formula}=<<{formula}={result}>>{result}") for step in steps]
    return {"question": question, "answer": "\n".join([*steps, f"#### {values['it']}"])}


def problems() -> dict[str, list[dict[str, str]]]:
    """The rows of both splits, the same on every machine.

    No question occurs twice, neither within a split nor across them. The templates take turns, so both splits hold
    each of them.
    """
    random, rows = Random(SEED), {}
    while len(rows) < TEST_ROWS + TRAIN_ROWS:
        row = problem(TEMPLATES[len(rows) % len(TEMPLATES)], random)
        rows.setdefault(row["question"], row)
    made = list(rows.values())
    return {"train": made[TEST_ROWS:], "test": made[:TEST_ROWS]}
