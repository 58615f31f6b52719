"""Text tasks whose answers can be verified: a prompt, a checker, a domain. For language models of any size.

Generated here, small enough for a model of a million parameters (an answer has at most 16 characters):

    math    7+5-3+6=                      =15        or worked out: 12,9=15
    logic   a>d d>e a>b b>c: a to c?      a>b>c      or from the goal backwards: c<b<a      (x>y: if x then y)
    code    3 more than 2 times x:        x=3+2*x    or step by step: x*=2;x+=3             (run and tested)

Each has two ways of answering that are both right. Text written by people is like that: most of it uses the shorter or
more usual way, and which way a model can walk without a slip is another matter. Targets, like the text that the shipped
base was pretrained on, are written in either way, so they do not say which one is better for a model; a reward does.

`UNSEEN` tasks need these skills in other or combined forms and are in no training. `dispatch` asks which kind a
request is (`svf.adapt.CLASSIFY`). Parts are disjoint by construction: a hash of the problem says which it belongs to.
"""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from svf.adapt import CLASSIFY

Part = Literal["train", "selection", "test"]
PARTS: tuple[Part, ...] = ("train", "selection", "test")
DEFAULT_N = {"train": 4096, "selection": 512, "test": 1024}
LONGEST = 16
"""Characters of the longest right answer that a generated task asks for."""

# ----------------------------------------------------------------------------------------------------------------------
# Samples


@dataclass(frozen=True)
class Program:
    """Judges a completion by running it: `program(completion)` must end well, and print `output` where that is given.

    A program that is no Python is wrong without being run.
    """

    program: Callable[[str], str]
    output: str | None = None


@dataclass(frozen=True)
class Sample:
    """A request whose answer can be verified."""

    prompt: str
    domain: str
    target: str
    """A right answer."""
    judge: Callable[[str], bool] | Program

    def check(self, completion: str) -> bool:
        """Whether an answer is right. Of many, use `check`: their programs run side by side."""
        return check([self], [completion])[0]

    @property
    def runs_code(self) -> bool:
        return isinstance(self.judge, Program)


def check(samples: Sequence[Sample], completions: Sequence[str], sandbox=None) -> list[bool]:
    """Which completions are right.

    Args:
        samples: one for every completion.
        completions: without the prompt and the end token.
        sandbox: where programs run, a `svf.sandbox.Sandbox`; one is made where it is needed and not given.

    Raises:
        RuntimeError: where a program has to be run and the system cannot isolate it.
    """
    right = [False] * len(samples)
    programs: dict[int, str] = {}
    for i, (sample, completion) in enumerate(zip(samples, completions, strict=True)):
        if not sample.runs_code:
            right[i] = sample.judge(completion)
        elif is_python(program := sample.judge.program(completion)):
            programs[i] = program
    if programs:
        if sandbox is None:
            from svf.sandbox import Sandbox

            sandbox = Sandbox()
        for i, result in zip(programs, sandbox.run(list(programs.values())), strict=True):
            output = samples[i].judge.output
            right[i] = result.ok and output in (None, result.output.strip())
    return right


def is_python(program: str) -> bool:
    try:
        compile(program, "completion", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError):
        return False
    return True


def part_of(problem: str) -> Part:
    """train (70 %), selection (10 %) or test (20 %) by the problem alone."""
    return {7: "selection", 8: "test", 9: "test"}.get(zlib.crc32(problem.encode()) % 10, "train")


# ----------------------------------------------------------------------------------------------------------------------
# Generators: each makes (problem, sample) from random numbers; the problem is what the parts are told apart by

USUAL = 0.65
"""Share of answers that are written in the usual way."""


def _total(numbers: list[int], signs: list[str]) -> list[int]:
    """Running totals."""
    totals = numbers[:1]
    for sign, number in zip(signs, numbers[1:], strict=True):
        totals.append(totals[-1] + (number if sign == "+" else -number))
    return totals


@dataclass(frozen=True)
class Number:
    """The number after the last equals sign, or all there is, is the right one."""

    value: int

    def __call__(self, completion: str) -> bool:
        answer = completion.rpartition("=")[2].strip()
        return re.fullmatch(r"[+-]?\d+", answer, re.ASCII) is not None and int(answer) == self.value


def _numbers(rng: random.Random, n: int) -> tuple[str, Sample]:
    while True:
        numbers = [rng.randint(1, 9) for _ in range(n)]
        signs = [rng.choice("+-") for _ in range(n - 1)]
        totals = _total(numbers, signs)
        if min(totals) >= 0:
            break
    prompt = "".join(f"{sign}{number}" for sign, number in zip(["", *signs], numbers, strict=True)) + "="
    between = "" if rng.random() < USUAL else ",".join(map(str, totals[1:-1]))
    return prompt, Sample(prompt, "math", f"{between}={totals[-1]}", Number(totals[-1]))


def _math(rng: random.Random) -> tuple[str, Sample]:
    return _numbers(rng, rng.choices((2, 3, 4), (1, 3, 6))[0])


def _longer(rng: random.Random) -> tuple[str, Sample]:
    """Sums of one number more than in any training."""
    return _numbers(rng, 5)


@dataclass(frozen=True)
class Proof:
    """A chain of rules from `start` to `goal`, forwards (a>b>c) or backwards (c<b<a)."""

    rules: frozenset[tuple[str, str]]
    start: str
    goal: str

    def __call__(self, completion: str) -> bool:
        answer = completion.strip()
        chain = answer.split(">") if ">" in answer else answer.split("<")[::-1]
        return (
            len(chain) > 1
            and (chain[0], chain[-1]) == (self.start, self.goal)
            and all(step in self.rules for step in pairwise(chain))
        )


def _proof(rng: random.Random, names: str, domain: str) -> tuple[str, Sample]:
    """From the start several chains of equal length lead away, one of them to the goal: forwards, the first step has
    to be chosen with the end in view; backwards, there is never a choice."""
    chains, length = rng.choice(((1, 2), (1, 3), (2, 2), (2, 2), (2, 3), (3, 2)))
    start, *rest = rng.sample(names, 1 + chains * length)
    paths = [[start, *rest[i * length : (i + 1) * length]] for i in range(chains)]
    rules = [step for path in paths for step in pairwise(path)]
    rng.shuffle(rules)
    path = paths[0]
    question = f"{start} to {path[-1]}?"
    prompt = f"{' '.join(f'{a}>{b}' for a, b in rules)}: {question}"
    target = ">".join(path) if rng.random() < USUAL else "<".join(path[::-1])
    problem = f"{sorted(rules)} {question}"
    return problem, Sample(prompt, domain, target, Proof(frozenset(rules), start, path[-1]))


def _logic(rng: random.Random) -> tuple[str, Sample]:
    return _proof(rng, "abcdefgh", "logic")


def _digits(rng: random.Random) -> tuple[str, Sample]:
    """Proofs about numbers instead of letters."""
    return _proof(rng, "0123456789", "digits")


INPUTS = (-7, 0, 1, 4, 25)
"""What a program is tested with. Two different lines meet in one point at most."""


@dataclass(frozen=True)
class Line:
    """The program that tests a line of Python which changes x."""

    def __call__(self, completion: str) -> str:
        return f"for x in {INPUTS}:\n    scope = {{'x': x}}\n    exec({completion!r}, scope)\n    print(scope['x'])\n"


@dataclass(frozen=True)
class Operation:
    """`number` more than, less than or times something."""

    kind: Literal["more than", "less than", "times"]
    number: int

    def __call__(self, x: int) -> int:
        return {"more than": x + self.number, "less than": x - self.number, "times": x * self.number}[self.kind]

    @property
    def sign(self) -> str:
        return {"more than": "+", "less than": "-", "times": "*"}[self.kind]


def _operations(rng: random.Random, n: int) -> list[Operation]:
    """Innermost first; no two of the same kind follow each other."""
    kinds = []
    while len(kinds) < n:
        kind = rng.choice(("more than", "less than", "times"))
        if kind not in kinds[-1:]:
            kinds.append(kind)
    return [Operation(kind, rng.randint(2, 9) if kind == "times" else rng.randint(1, 9)) for kind in kinds]


def _phrase(operations: list[Operation], inner: str) -> str:
    """The last operation is said first, as English does: 3 more than 2 times x."""
    return " ".join([f"{o.number} {o.kind}" for o in reversed(operations)] + [inner])


def _expression(operations: list[Operation], inner: str) -> str:
    """In the same order: 3+2*x."""
    text = inner
    for i, operation in enumerate(operations):
        if operation.kind == "times" and i > 0 and operations[i - 1].kind != "times":
            text = f"({text})"
        sign = {"more than": "+", "less than": "", "times": "*"}[operation.kind]
        text = f"-{operation.number}+{text}" if operation.kind == "less than" else f"{operation.number}{sign}{text}"
    return text


def _values(operations: list[Operation]) -> str:
    """What the program prints for the test inputs."""
    results = []
    for x in INPUTS:
        for operation in operations:
            x = operation(x)
        results.append(str(x))
    return "\n".join(results)


def _code(rng: random.Random) -> tuple[str, Sample]:
    operations = _operations(rng, rng.choices((1, 2, 3), (1, 4, 5))[0])
    prompt = _phrase(operations, "x:")
    steps = ";".join(f"x{o.sign}={o.number}" for o in operations)
    target = steps if rng.random() < USUAL else f"x={_expression(operations, 'x')}"
    return prompt, Sample(prompt, "code", target, Program(Line(), _values(operations)))


def _constants(rng: random.Random) -> tuple[str, Sample]:
    """Programs with a sum in the place of a number: code with a little math."""
    first, second = _operations(rng, 2)
    while first.kind == "times":
        first, second = _operations(rng, 2)
    a, b = first.number, rng.randint(1, 9)
    operations = [Operation(first.kind, a + b), second]
    rng.shuffle(operations)
    prompt = _phrase(operations, "x:").replace(f"{a + b} {first.kind}", f"{a}+{b} {first.kind}", 1)
    target = ";".join(f"x{o.sign}={o.number}" for o in operations)
    return prompt, Sample(prompt, "constants", target, Program(Line(), _values(operations)))


def _words(rng: random.Random) -> tuple[str, Sample]:
    """Sums said in the words of programs: math read as code is."""
    value = 100
    while not 0 <= value < 100:
        operations = _operations(rng, 2)
        value = start = rng.randint(1, 20)
        for operation in operations:
            value = operation(value)
    prompt = _phrase(operations, f"{start}=")
    return prompt, Sample(prompt, "words", f"={value}", Number(value))


WORDS = [
    "cat",
    "dog",
    "sun",
    "red",
    "big",
    "hat",
    "pen",
    "cup",
    "map",
    "bus",
    "fish",
    "bird",
    "tree",
    "milk",
    "rain",
    "snow",
    "lamp",
    "door",
    "hand",
    "road",
]


@dataclass(frozen=True)
class Text:
    """The answer is this text, but for spaces around it."""

    text: str

    def __call__(self, completion: str) -> bool:
        return completion.strip() == self.text


def _other(rng: random.Random) -> tuple[str, Sample]:
    """What is neither math nor code nor logic: say some words again. In the base's pretraining alone."""
    words = " ".join(rng.sample(WORDS, rng.randint(1, 3)))
    prompt = f"say {words}:"
    return prompt, Sample(prompt, "other", words, Text(words))


def _dispatch(rng: random.Random) -> tuple[str, Sample]:
    """Which kind of request is it?"""
    label = rng.choice((*DOMAINS, "other"))
    problem, sample = GENERATORS[label](rng)
    prompt = CLASSIFY.format(labels=", ".join((*DOMAINS, "other")), prompt=sample.prompt)
    return problem, Sample(prompt, "dispatch", f" {label}", Text(label))


DOMAINS = ("math", "code", "logic")
"""What experts are trained for."""
UNSEEN = ("longer", "digits", "constants", "words")
"""What they are tried on; part of no training."""
GENERATORS = {
    "math": _math, "code": _code, "logic": _logic, "other": _other, "dispatch": _dispatch,
    "longer": _longer, "digits": _digits, "constants": _constants, "words": _words,
}  # fmt: skip


def make(domain: str, part: Part, seed: int, position: int) -> Sample:
    """The sample at a place of a domain's endless stream.

    Raises:
        ValueError: for an unknown domain or part.
    """
    if domain not in GENERATORS:
        raise ValueError(f"there is no generated domain {domain!r}; there are {', '.join(GENERATORS)}")
    if part not in PARTS:
        raise ValueError(f"there is no part {part!r}; there are {', '.join(PARTS)}")
    rng = random.Random(f"{domain} {part} {seed} {position}")
    while True:
        problem, sample = GENERATORS[domain](rng)
        if part_of(problem) == part:
            return sample


def samples(domain: str, part: Part, n: int | None = None, seed: int = 0) -> list[Sample]:
    """`n` samples with different prompts; if not given, 4,096 of train, 512 of selection, 1,024 of test, or all there
    are.

    Raises:
        ValueError: for an unknown domain or part, or where there are not `n`.
    """
    wanted = DEFAULT_N.get(part, 0) if n is None else n
    found: dict[str, Sample] = {}
    for position in range(1000 + 50 * wanted):
        if len(found) == wanted:
            break
        sample = make(domain, part, seed, position)
        found.setdefault(sample.prompt, sample)
    if n is not None and len(found) < n:
        raise ValueError(f"there are not {n} different {domain} samples in {part}, but {len(found)}")
    return list(found.values())
