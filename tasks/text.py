"""Text tasks whose answers can be verified: a prompt, a checker, a domain. For language models of any size.

Generated here, small enough for a model of a million parameters (an answer has at most 16 characters):

    math    7+2-5+3=                   =7         or worked out: 9,4=7
    logic   ad de ab bc: ac?           abc        or from the goal backwards: cba        (xy: if x then y)
    code    +3 of *2 of -4 of x:       x=2*x-5    or step by step: x-=4;x*=2;x+=3        (run and tested)

Each has two ways of answering that are both right. Text written by people is like that: most of it uses the shorter or
more usual way, and which way a model can walk without a slip is another matter. Targets, like the text that the shipped
base was pretrained on, are written in either way, so they do not say which one is better for a model; a reward does.

`UNSEEN` tasks need these skills in other or combined forms and are in no training. `dispatch` asks which kind a
request is (`svf.adapt.CLASSIFY`). Parts are disjoint by construction: a hash of the problem says which it belongs to.
"""

import random
import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

from torch.utils.data import Dataset

from svf.adapt import CLASSIFY
from tasks.base import Shuffled, Task

Part = Literal["train", "selection", "test"]
PARTS: tuple[Part, ...] = ("train", "selection", "test")
DEFAULT_N = {"train": 4096, "selection": 512, "test": 1024}
LONGEST = 16
"""Characters of the longest right answer that a generated task asks for."""

# ----------------------------------------------------------------------------------------------------------------------
# Samples


@dataclass(frozen=True)
class Program:
    """Judges a completion by running it. What is no Python is wrong without being run."""

    program: Callable[[str], str | None]
    """Makes the program of a completion; None where it is wrong already."""
    output: str | None = None
    """What the program has to print, besides ending well; anything if None."""


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
        elif (program := sample.judge.program(completion)) is not None and is_python(program):
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the program would do
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

LESS_USUAL = 0.3
"""Share of answers in the less usual way."""


@dataclass(frozen=True)
class Number:
    """The number after the last equals sign, or all there is, is the right one."""

    value: int

    def __call__(self, completion: str) -> bool:
        answer = completion.rpartition("=")[2].strip()
        return re.fullmatch(r"[+-]?\d+", answer, re.ASCII) is not None and int(answer) == self.value


def _totals(rng: random.Random, n: int, top: int = 9) -> list[int]:
    """Running totals up to `top`, a digit apart."""
    totals = [rng.randint(1, 9)]
    while len(totals) < n:
        totals.append(rng.choice([total for total in range(top + 1) if 0 < abs(total - totals[-1]) < 10]))
    return totals


def _sum(rng: random.Random, totals: list[int], domain: str) -> tuple[str, Sample]:
    """A sum of digits by its running totals."""
    prompt = str(totals[0]) + "".join(f"{after - before:+d}" for before, after in pairwise(totals)) + "="
    between = ",".join(map(str, totals[1:-1])) if rng.random() < LESS_USUAL else ""
    return prompt, Sample(prompt, domain, f"{between}={totals[-1]}", Number(totals[-1]))


def _math(rng: random.Random) -> tuple[str, Sample]:
    return _sum(rng, _totals(rng, rng.choices((2, 3, 4, 5, 6), (2, 1, 1, 3, 3))[0]), "math")


def _longer(rng: random.Random) -> tuple[str, Sample]:
    """Sums of one number more than in any training."""
    return _sum(rng, _totals(rng, 7), "longer")


def _larger(rng: random.Random) -> tuple[str, Sample]:
    """Sums with a running total above nine."""
    totals = [0]
    while max(totals) < 10:
        totals = _totals(rng, rng.choice((2, 3, 4)), top=15)
    return _sum(rng, totals, "larger")


@dataclass(frozen=True)
class Proof:
    """A chain of rules from `start` to `goal`, a letter each, forwards (abc) or backwards (cba)."""

    rules: frozenset[tuple[str, str]]
    start: str
    goal: str

    def __call__(self, completion: str) -> bool:
        chain = completion.strip()
        chain = chain if chain.startswith(self.start) else chain[::-1]
        return (
            len(chain) > 1
            and (chain[0], chain[-1]) == (self.start, self.goal)
            and all(step in self.rules for step in pairwise(chain))
        )


def _proof(rng: random.Random, shapes: Sequence[tuple[int, int]], domain: str) -> tuple[str, Sample]:
    """From the start several chains of equal length lead away, one of them to the goal: forwards, the first step has
    to be chosen with the end in view; backwards, there is never a choice."""
    chains, length = rng.choice(shapes)
    start, *rest = rng.sample("abcdefghij", 1 + chains * length)
    paths = [[start, *rest[i * length : (i + 1) * length]] for i in range(chains)]
    rules = [step for path in paths for step in pairwise(path)]
    rng.shuffle(rules)
    path = paths[0]
    question = f"{start}{path[-1]}?"
    prompt = f"{' '.join(a + b for a, b in rules)}: {question}"
    target = "".join(path[::-1] if rng.random() < LESS_USUAL else path)
    problem = f"{sorted(rules)} {question}"
    return problem, Sample(prompt, domain, target, Proof(frozenset(rules), start, path[-1]))


def _logic(rng: random.Random) -> tuple[str, Sample]:
    return _proof(rng, ((1, 2), (2, 2), (2, 3), (3, 2), (3, 3)), "logic")


def _wider(rng: random.Random) -> tuple[str, Sample]:
    """Proofs among more chains than in any training."""
    return _proof(rng, ((4, 2),), "wider")


def _commas(rng: random.Random) -> tuple[str, Sample]:
    """Proofs written otherwise."""
    problem, sample = _logic(rng)
    rules, question = sample.prompt.split(": ")
    return problem, replace(sample, prompt=f"{rules.replace(' ', ',')}: {question}", domain="commas")


INPUTS = (-7, 0, 1, 4, 25)
"""What a program is tested with. Two different lines meet in one point at most."""


@dataclass(frozen=True)
class Line:
    """The program that tests a line of Python which changes x."""

    def __call__(self, completion: str) -> str | None:
        if not is_python(completion):
            return None
        return f"for x in {INPUTS}:\n    scope = {{'x': x}}\n    exec({completion!r}, scope)\n    print(scope['x'])\n"


class Operation(NamedTuple):
    """What is done to a number: +3, -3 or *3."""

    sign: str
    number: int

    def __call__(self, x: int) -> int:
        return {"+": x + self.number, "-": x - self.number, "*": x * self.number}[self.sign]


def _operations(rng: random.Random, n: int) -> list[Operation]:
    """Innermost first; no two of the same sign follow each other."""
    signs: list[str] = []
    while len(signs) < n:
        if (sign := rng.choice("+-*")) not in signs[-1:]:
            signs.append(sign)
    return [Operation(sign, rng.randint(2 if sign == "*" else 1, 9)) for sign in signs]


def _phrase(operations: list[Operation], inner: str) -> str:
    """The last operation is said first: +3 of *2 of -4 of x."""
    return " of ".join([f"{o.sign}{o.number}" for o in reversed(operations)] + [inner])


def _simplified(operations: list[Operation]) -> str:
    """The same in one go: x=2*x-5."""
    offset = _after(operations, 0)
    slope = _after(operations, 1) - offset
    return "x=" + (f"{slope}*x" if slope > 1 else "x") + (f"{offset:+d}" if offset else "")


def _steps(operations: list[Operation]) -> str:
    return ";".join(f"x{o.sign}={o.number}" for o in operations)


def _after(operations: list[Operation], x: int) -> int:
    for operation in operations:
        x = operation(x)
    return x


def _values(operations: list[Operation]) -> str:
    """What the program prints for the test inputs."""
    return "\n".join(str(_after(operations, x)) for x in INPUTS)


def _code(rng: random.Random) -> tuple[str, Sample]:
    operations = _operations(rng, rng.choices((1, 2, 3), (2, 10, 8))[0])
    prompt = _phrase(operations, "x:")
    large = abs(_after(operations, 0)) > 12  # than which numbers most people do not simplify
    in_steps = rng.random() < (1 - LESS_USUAL if large else LESS_USUAL)
    target = _steps(operations) if in_steps else _simplified(operations)
    return prompt, Sample(prompt, "code", target, Program(Line(), _values(operations)))


def _constants(rng: random.Random) -> tuple[str, Sample]:
    """Programs with a sum in the place of a number: code with a little math."""
    first, second = _operations(rng, 2)
    while first.sign == "*":
        first, second = _operations(rng, 2)
    a, b = first.number, rng.randint(1, 9)
    operations = [Operation(first.sign, a + b), second]
    rng.shuffle(operations)
    prompt = _phrase(operations, "x:").replace(f"{first.sign}{a + b} ", f"{first.sign}({a}+{b}) ", 1)
    target = _steps(operations)
    return prompt, Sample(prompt, "constants", target, Program(Line(), _values(operations)))


def _words(rng: random.Random) -> tuple[str, Sample]:
    """Sums said in the words of programs: math read as code is."""
    value = 100
    while not 0 <= value < 100:
        operations = _operations(rng, 2)
        start = rng.randint(1, 20)
        value = _after(operations, start)
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
UNSEEN = ("longer", "larger", "wider", "commas", "constants", "words")
"""What they are tried on; part of no training."""
GENERATORS = {
    "math": _math, "code": _code, "logic": _logic, "other": _other, "dispatch": _dispatch,
    "longer": _longer, "larger": _larger, "wider": _wider, "commas": _commas, "constants": _constants, "words": _words,
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
    for position in range(1000 + 10 * wanted):
        if len(found) == wanted:
            break
        sample = make(domain, part, seed, position)
        found.setdefault(sample.prompt, sample)
    if n is not None and len(found) < n:
        raise ValueError(f"there are not {n} different {domain} samples in {part}, but {len(found)}")
    return list(found.values())


# ----------------------------------------------------------------------------------------------------------------------
# Data


class Batch(NamedTuple):
    """As a loader gives it."""

    samples: list[Sample]


class Stream(Dataset):
    """Endless training samples: domains take turns, each by its share; none depends on what the others are."""

    def __init__(self, turns: list[str], draw: dict[str, Callable[[int], Sample]]):
        self.turns, self.draw = turns, draw
        self.nth = [self.turns[:i].count(domain) for i, domain in enumerate(self.turns)]

    def __getitem__(self, position: int) -> Sample:
        round_, turn = divmod(position, len(self.turns))
        domain = self.turns[turn]
        return self.draw[domain](round_ * self.turns.count(domain) + self.nth[turn])


class TextTask(Task):
    """Requests with answers that can be verified.

    Args:
        domain: what to learn: a name or several, generated or of a published set (`tasks.text_sets`).
        shares: how many samples of each domain there are for one of another; one of each if not given.
        others: domains that are tested besides, to see what was forgotten.
        root: folder of published sets, NAME/train.jsonl and NAME/test.jsonl; of those it lacks the hub is asked.
        n_val: requests of a domain's selection part, which choose the best checkpoint; 512 generated or all published
            ones if not given.
        n_test: requests of a domain's test part; likewise 1,024, or all.
        batch_size: requests of a step, per process, for every domain (and share of it).
        eval_batch_size: requests of a step in validation and test.
        num_workers: processes that make training samples; 0 makes them in the main process.
        allow_code_execution: whether what the model writes may be run, in a sandbox. The domain code needs it.
    """

    in_ticks = False

    def __init__(
        self,
        domain: str | list[str] = "math",
        shares: list[int] | None = None,
        others: list[str] | None = None,
        root: str = "data",
        n_val: int | None = None,
        n_test: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        allow_code_execution: bool = False,
    ):
        self.domains = [domain] if isinstance(domain, str) else list(domain)
        self.others = [name for name in others or [] if name not in self.domains]
        shares = shares or [1] * len(self.domains)
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ValueError(f"data.domain={domain}: give a name, or several different ones")
        if len(shares) != len(self.domains) or min(shares) < 1:
            raise ValueError(f"data.shares={shares}: give a whole number above 0 for each of {', '.join(self.domains)}")
        self.turns = [
            name for turn in range(max(shares)) for name, n in zip(self.domains, shares, strict=True) if turn < n
        ]
        super().__init__(batch_size * len(self.turns), eval_batch_size, num_workers)
        self.at_least(batch_size=(batch_size, 1))
        self.at_least(**{name: (n, 1) for name, n in (("n_val", n_val), ("n_test", n_test)) if n is not None})
        self.n, self.root = {"val": n_val, "test": n_test}, root
        self.tokenizer = None
        """Of the model: requests of published sets are put into its chat template."""
        self.examples: dict[str, list[Sample]] = {}
        """Some of every domain."""
        self.sandbox = None
        for name in (*self.domains, *self.others):
            part = "train" if name in self.domains and self.trains(name) else "test"
            self.examples[name] = self.samples(name, part, 8)
            if any(sample.runs_code for sample in self.examples[name]) and self.sandbox is None:
                self.sandbox = self._sandbox(name, allow_code_execution)

    def samples(self, domain: str, part: Part, n: int | None = None) -> list[Sample]:
        """Of a generated domain or a published set."""
        from tasks import text_sets

        if domain in GENERATORS:
            return samples(domain, part, n)
        if domain not in text_sets.SETS:
            raise ValueError(f"there is no domain {domain!r}; there are {', '.join((*GENERATORS, *text_sets.SETS))}")
        return text_sets.load(domain, part, n, self.root, self.tokenizer)

    @staticmethod
    def trains(domain: str) -> bool:
        """Whether it has more than a test part."""
        from tasks import text_sets

        return domain not in text_sets.SETS or bool(text_sets.SETS[domain].train)

    @staticmethod
    def _sandbox(domain: str, allowed: bool):
        if not allowed:
            raise ValueError(
                f"data.domain={domain} is judged by running what the model writes: allow it, in a sandbox, with "
                "data.allow_code_execution=true"
            )
        from svf.sandbox import Sandbox

        try:
            return Sandbox()
        except RuntimeError as error:
            problem = str(error)
        raise ValueError(f"data.domain={domain} needs a sandbox: {problem}")  # outside, so that it has no other cause

    def dataset(self, split: str) -> Dataset | list[Sample]:
        if split == "train":
            return Stream(self.turns, {domain: self._stream(domain) for domain in self.domains})
        part = "selection" if split == "val" else "test"
        domains = self.domains if split == "val" else self.domains + self.others
        return [sample for domain in domains for sample in self.samples(domain, part, self.n[split])]

    def _stream(self, domain: str) -> Callable[[int], Sample]:
        if domain in GENERATORS:
            return lambda position: make(domain, "train", self.seed, position)
        found = self.samples(domain, "train")
        order = Shuffled(len(found), self.seed)
        return lambda position: found[order(position)]

    def check(self, samples: Sequence[Sample], completions: Sequence[str]) -> list[bool]:
        """Which completions are right."""
        return check(samples, completions, self.sandbox)

    def count(self, batch: Batch) -> int:
        return sum(sample.domain in self.domains for sample in batch.samples)

    @staticmethod
    def collate(samples: list[Sample]) -> Batch:
        return Batch(samples)

    def transfer_batch_to_device(self, batch: Batch, device, dataloader_idx: int) -> Batch:
        return batch

    def describe(self) -> str:
        besides = f"; tested besides: {', '.join(self.others)}" if self.others else ""
        return (
            f"requests of {', '.join(self.domains)}, judged{' (programs in a sandbox)' * bool(self.sandbox)}{besides}"
        )
