"""[image] Word problems in GSM8K's form, made from templates: what DATA_SOURCE=builtin trains on.

They are for rehearsals, where no hub can be reached and a tiny model must learn something within seconds: short
texts, one or two steps, whole numbers below about 200. A result on them says nothing about GSM8K.
"""

from collections.abc import Callable
from random import Random

from bridge.errors import UsageError

TRAIN_ROWS = 512
TEST_ROWS = 64
SEED = 0
# The smallest template has thousands of problems, so this many misses in a row mean that it is used up.
PATIENCE = 1000

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Finn", "Grace", "Hana", "Ken", "Lily", "Mika", "Tom")
THINGS = ("apples", "books", "cards", "coins", "cookies", "eggs", "marbles", "pencils", "shells", "stamps")

# What a template makes: a question, the lines that work it out, and the result.
Problem = tuple[str, list[str], int]


def step(left: int, sign: str, right: int) -> tuple[int, str]:
    """Work out one step: its result and its text with GSM8K's calculator annotation, e.g. "3+4=<<3+4=7>>7"."""
    if sign == "/" and left % right:
        raise ValueError(f"{left}/{right} is not a whole number")
    result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
    return result, f"{left}{sign}{right}=<<{left}{sign}{right}={result}>>{result}"


def gets_more(random: Random) -> Problem:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    had, more = random.randint(2, 30), random.randint(2, 20)
    total, text = step(had, "+", more)
    question = f"{name} has {had} {thing} and gets {more} more. How many {thing} does {name} have now?"
    return question, [f"{name} has {text} {thing}."], total


def gives_away(random: Random) -> Problem:
    (name, friend), thing = random.sample(NAMES, 2), random.choice(THINGS)
    given, left = random.randint(2, 20), random.randint(2, 20)
    left, text = step(given + left, "-", given)
    question = f"{name} has {given + left} {thing} and gives {given} to {friend}. How many {thing} does {name} have left?"
    return question, [f"{name} has {text} {thing} left."], left


def boxes(random: Random) -> Problem:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    count, size, loose = random.randint(2, 9), random.randint(2, 12), random.randint(2, 9)
    packed, first = step(count, "*", size)
    total, second = step(packed, "+", loose)
    question = f"{name} has {count} boxes of {size} {thing} and {loose} loose {thing}. How many {thing} does {name} have in all?"
    return question, [f"The boxes hold {first} {thing}.", f"In all {name} has {second} {thing}."], total


def shares(random: Random) -> Problem:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    friends, each = random.randint(2, 9), random.randint(2, 12)
    each, text = step(friends * each, "/", friends)
    question = f"{name} shares {friends * each} {thing} equally among {friends} friends. How many {thing} does each friend get?"
    return question, [f"Each friend gets {text} {thing}."], each


def change(random: Random) -> Problem:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    count, price, rest = random.randint(2, 9), random.randint(2, 9), random.randint(2, 20)
    cost, first = step(count, "*", price)
    rest, second = step(cost + rest, "-", cost)
    question = f"{name} has ${cost + rest} and buys {count} {thing} for ${price} each. How many dollars does {name} have left?"
    return question, [f"The {thing} cost ${first}.", f"{name} has ${second} left."], rest


def reading(random: Random) -> Problem:
    name = random.choice(NAMES)
    pages, days, rest = random.randint(2, 12), random.randint(2, 9), random.randint(2, 40)
    read, first = step(pages, "*", days)
    rest, second = step(read + rest, "-", read)
    question = f"{name} reads {pages} pages a day of a book of {read + rest} pages. How many pages are left after {days} days?"
    return question, [f"{name} reads {first} pages.", f"There are {second} pages left."], rest


def wages(random: Random) -> Problem:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    hours, pay = random.randint(2, 9), random.randint(5, 12)
    earned, first = step(hours, "*", pay)
    spent = random.randint(2, earned - 2)
    rest, second = step(earned, "-", spent)
    question = (f"{name} works {hours} hours for ${pay} an hour and spends ${spent} on {thing}. "
                f"How many dollars does {name} have left?")
    return question, [f"{name} earns ${first}.", f"{name} has ${second} left."], rest


def seats(random: Random) -> Problem:
    name = random.choice(NAMES)
    rows, chairs = random.randint(2, 12), random.randint(3, 12)
    total, first = step(rows, "*", chairs)
    taken = random.randint(2, total - 2)
    free, second = step(total, "-", taken)
    question = f"{name} sets up {rows} rows of {chairs} chairs. {taken} chairs are taken. How many chairs are free?"
    return question, [f"There are {first} chairs.", f"{second} chairs are free."], free


TEMPLATES: tuple[Callable[[Random], Problem], ...] = (gets_more, gives_away, boxes, shares, change, reading, wages, seats)


def problems(train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS, seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """Make the rows {"question", "answer"} of both splits; the same arguments give the same rows on every machine.

    No question occurs twice, neither within a split nor across them. The templates take turns, so both splits hold
    each of them. The test rows do not depend on `train_rows`: runs with less training stay comparable.

    Raises:
        UsageError: if more rows are asked for than there are different problems.
    """
    random = Random(seed)
    asked: set[str] = set()

    def row(index: int) -> dict[str, str]:
        template = TEMPLATES[index % len(TEMPLATES)]
        for _ in range(PATIENCE):
            question, steps, result = template(random)
            if question not in asked:
                asked.add(question)
                return {"question": question, "answer": "\n".join([*steps, f"#### {result}"])}
        raise UsageError(f"There are not {train_rows + test_rows} different builtin problems: ended after {len(asked)}. "
                         "Ask for fewer rows.")

    test = [row(index) for index in range(test_rows)]
    return {"train": [row(index) for index in range(train_rows)], "test": test}
