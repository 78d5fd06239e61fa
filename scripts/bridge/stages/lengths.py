"""How many tokens the rows of one's own data have, against the limits: verl stops at a longer one when it comes to it."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pyarrow import parquet


@cache
def lengths(files: tuple[Path, ...], columns: tuple[str, ...], model_dir: Path, _digest: str) -> list[list[int]]:
    """Tokens of the prompt, and of the answer with its end, of each row, as verl counts them: [[prompt ...], [answer ...]].

    Args:
        columns: of the prompt (a text, or a list of messages) and of the answer; "a.b" is field b of the struct a.
        _digest: of the files, which may have been made anew.
    """
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


def compare(data: Mapping[str, Any], found: list[list[int]], notes: list[str]) -> list[str]:
    """Say how long the rows are; returns what is wrong. `data`: that section of a configuration."""
    prompts, answers = found
    if "max_prompt_length" not in data:
        limits = [("max_length", "rows", list(map(sum, zip(*found, strict=True))), data["truncation"] == "error")]
    else:
        # An answer is the model's own: the data's only tell how long one may have to be.
        strict = data["truncation"] == "error" and not data["filter_overlong_prompts"]
        limits = [("max_prompt_length", "prompts", prompts, strict), ("max_response_length", "answers there", answers, False)]
    problems = []
    for key, what, counts, strict in limits:
        limit, longest = data[key], max(counts)
        over = sum(count > limit for count in counts)
        said = f"{what}: {min(counts)} to {longest} tokens, data.{key}={limit}"
        if not over:
            notes.append(said)
        elif strict:
            problems.append(f"{said}: verl stops at the {over} of {len(counts)} that are longer. Use data.{key}={longest}, or "
                            "leave them out of the data.")
        else:
            notes.append(f"warning: {said}: {over} of {len(counts)} are longer; data.{key}={longest} would fit")
    return problems
