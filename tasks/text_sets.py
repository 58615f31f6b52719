"""Published text tasks: GSM8K, MATH, MBPP, HumanEval, ARC; from a folder of jsonl files, or the hub.

A folder `root` holds NAME/train.jsonl and NAME/test.jsonl, one problem a line with the fields it has on the hub (see
`SETS`). Without it they come through `datasets` (`pip install -e '.[text]'`), from its cache or the network.

The test part is the published test split, to the last problem. Train and selection are the published training split
without whatever the test part holds too; a hash of the problem says which of the two it is in, selection being as
large as in Transformer² (half of GSM8K and ARC, a third of MBPP). HumanEval has no training split. MBPP is the
original set (374 + 90 to train and 500 to test), not MBPP+, whose first version, split there 200/100/99, is gone.

Prompts ask for what the published ones ask for, in one form for all: a request, for models with a chat template in one
message of the user. Nothing is put into the answer's mouth, and no word in it ends it.
"""

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tasks.answers import WORD, Amount, Choice, Expression, Solution, boxed, numbers
from tasks.text import PARTS, Part, Program, Sample

Row = dict[str, Any]
Made = tuple[str, str, Callable[[str], bool] | Program]
"""Request, right answer and judge."""

PLAIN = "@@ Instruction\n{request}\n\n@@ Response\n"
"""A request to a model without a chat template."""


class TextSet(NamedTuple):
    """What is fixed of a data set."""

    hub: str
    configs: tuple[str | None, ...]
    train: tuple[str, ...]
    """Splits on the hub. The test split is called `test` everywhere."""
    selection: int
    """One in so many training problems is for selection."""
    make: Callable[[Row], Made]
    fields: str
    """Of a row, those that are used."""


def gsm8k(row: Row) -> Made:
    worked, _, answer = row["answer"].rpartition("####")
    if len(values := numbers(answer)) != 1:
        raise ValueError(f"its answer does not end with #### and a number: {row['answer'][-40:]!r}")
    worked = re.sub(r"<<.*?>>", "", worked).strip()  # notes for a calculator
    request = (
        f"Solve the problem step by step and end with the answer as a number: The answer is 5.\n\n{row['question']}"
    )
    return request, f"{worked}\nThe answer is {answer.strip()}.", Amount(values[0])


def competition_math(row: Row) -> Made:
    answer = row.get("answer") or boxed(row["solution"])
    if not answer:
        raise ValueError("there is no \\boxed answer in its solution")
    request = f"Solve the problem step by step and give the final answer in \\boxed{{}}.\n\n{row['problem']}"
    return request, row["solution"], Expression(answer)


def arc(row: Row) -> Made:
    """Options are lettered by place, whether the set calls them A to E or 1 to 4."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    letters = "ABCDEFGHIJ"[: len(texts)]
    answer = letters[labels.index(row["answerKey"])]
    options = "\n".join(f"({letter}) {text}" for letter, text in zip(letters, texts, strict=True))
    request = (
        "Answer the question by one of the options. Think step by step and end with its letter: The answer is (X).\n\n"
        f"{row['question']}\n{options}"
    )
    return request, f"The answer is ({answer}).", Choice(answer, letters)


def mbpp(row: Row) -> Made:
    tests, code = row["test_list"], row["code"].replace("\r", "").strip()
    before = "\n".join([*(row.get("test_imports") or []), row.get("test_setup_code") or ""])
    request = (
        "Write a Python function that solves the problem, in one code block.\n\n"
        f"{row.get('text') or row['prompt']}\nIt has to pass this test:\n{tests[0]}"
    )
    judge = Program(Solution(asked_for(tests, code), "\n".join(tests), before), WORD)
    return request, f"```python\n{code}\n```", judge


def asked_for(tests: list[str], code: str) -> str:
    """The function of the right answer that the tests call."""
    called = re.findall(r"\b(\w+)\s*\(", "\n".join(tests))
    return next((name for name in called if re.search(rf"^(?:def|class) {name}\b", code, re.MULTILINE)), called[0])


def humaneval(row: Row) -> Made:
    name, whole = row["entry_point"], row["prompt"] + row["canonical_solution"]
    request = f"Complete the Python function, in one code block.\n\n```python\n{row['prompt'].strip()}\n```"
    tests = f"{row['test']}\ncheck({name})"
    return request, f"```python\n{whole.strip()}\n```", Program(Solution(name, tests, row["prompt"]), WORD)


SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra"),
    "precalculus",
)
ARC = "id, question, choices (text, label) and answerKey"
MBPP = "text or prompt, code, test_list and test_setup_code"
SETS: dict[str, TextSet] = {
    "gsm8k": TextSet("openai/gsm8k", ("main",), ("train",), 2, gsm8k, "question and answer"),
    "competition_math": TextSet(
        "EleutherAI/hendrycks_math", SUBJECTS, ("train",), 2, competition_math, "problem and solution"
    ),
    "mbpp": TextSet("google-research-datasets/mbpp", ("full",), ("train", "validation"), 3, mbpp, MBPP),
    "humaneval": TextSet(
        "openai/openai_humaneval", (None,), (), 1, humaneval, "prompt, canonical_solution, test and entry_point"
    ),
    "arc_easy": TextSet("allenai/ai2_arc", ("ARC-Easy",), ("train",), 2, arc, ARC),
    "arc_challenge": TextSet("allenai/ai2_arc", ("ARC-Challenge",), ("train",), 2, arc, ARC),
}


def load(
    name: str,
    part: Part,
    n: int | None = None,
    root: Path | str = "data",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Sample]:
    """Samples of a part, in the published order; their domain is the name.

    Args:
        name: one of `SETS`.
        part: train, selection or test; disjoint.
        n: how many at most, from the beginning.
        root: the folder with NAME/train.jsonl and NAME/test.jsonl; where there is no NAME in it, the hub is asked.
        tokenizer: puts requests into its chat template, if it has one.

    Raises:
        ValueError: for an unknown name or part, a set that cannot be had, a row that is not as published.
    """
    if name not in SETS:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(SETS)}")
    if part not in PARTS:
        raise ValueError(f"there is no part {part!r}; there are {', '.join(PARTS)}")
    kind = SETS[name]
    if part != "test" and not kind.train:
        raise ValueError(f"{name} has a test part only")
    found = _made(name, "test", root)
    if part != "test":
        tested = {request for request, _, _ in found}
        found = [
            made
            for made in _made(name, "train", root)
            if made[0] not in tested and (zlib.crc32(made[0].encode()) % kind.selection == 0) == (part == "selection")
        ]
    return [Sample(as_prompt(request, tokenizer), name, target, judge) for request, target, judge in found[:n]]


def as_prompt(request: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A request as the model wants it. A chat template may begin with the mark that a tokenizer puts there too;
    `svf.rollout.encode` sees to it that there is one."""
    if tokenizer is None or not tokenizer.chat_template:
        return PLAIN.format(request=request)
    messages = [{"role": "user", "content": request}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _made(name: str, split: str, root: Path | str) -> list[Made]:
    kind, folder, made = SETS[name], Path(root).expanduser() / name, []
    rows = _from_folder(name, split, folder) if folder.is_dir() else _from_hub(name, split, folder)
    for i, row in enumerate(rows, 1):
        try:
            made.append(kind.make(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{name}, {split}, row {i}: {reason}; a row has {kind.fields}") from error
    return made


def _from_folder(name: str, split: str, folder: Path) -> list[Row]:
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        raise ValueError(f"{name}: there is no {path.absolute()}; {_remedy(name, folder)}")
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.absolute()}, line {i}, is no JSON: {error}") from error
    return rows


def _from_hub(name: str, split: str, folder: Path) -> list[Row]:
    kind = SETS[name]
    try:
        from datasets import load_dataset

        splits = kind.train if split == "train" else ("test",)
        return [row for config in kind.configs for part in splits for row in load_dataset(kind.hub, config, split=part)]
    except ImportError:
        reason = "which takes pip install -e '.[text]'"
    except Exception as error:  # no network, no such set, a damaged cache: each raises others of its own
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    raise ValueError(f"{name} is neither on the disk nor to be had from the hub ({reason}); {_remedy(name, folder)}")


def _remedy(name: str, folder: Path) -> str:
    files = "train.jsonl and test.jsonl" if SETS[name].train else "test.jsonl"
    return f"put {files} into {folder.absolute()}, one problem a line with {SETS[name].fields}"
