"""Whether an answer in free text is the right one: amounts, choices, mathematical expressions, programs.

For what people's data sets ask. An answer is read to its end, unless the model goes on to write a next request of
its own; nothing is guessed where there is none. Expressions are compared by a small evaluator, never by `eval`.
"""

import cmath
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

NEXT = re.compile(r"^[ \t]*(?:@@|###) *Instruction", re.MULTILINE)
"""Where a model that does not end its answer begins another request in the form of the prompts (`tasks.text_sets`).
The word alone, in the middle of an answer, is part of it."""


def answer_of(completion: str) -> str:
    return NEXT.split(completion, maxsplit=1)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Amounts

NUMBER = re.compile(
    r"""
    (?<![A-Za-z_.\d])
    (?P<sign> (?<![\w)\]}]) [-\u2212] )?
    (?: \\? [$€£] \s? )? (?P<inner> (?<=[$€£]) [-\u2212] )?
    (?: (?P<whole> \d+ ) \s+ (?= \d+ / \d ) )?                              # 3 1/2
    (?P<digits> \d{1,3} (?: , \d{3} )+ (?! \d ) | \d+ )? (?P<decimals> \. \d+ )?
    (?: [ ]? / [ ]? (?P<under> \d+ ) (?! [ ]? [\d/] ) )?
    """,
    re.VERBOSE,
)
LONGEST = 1000
"""Characters of a number: what is longer answers nothing, and takes long to read."""
REASON = re.compile(r"\s(?:since|because|as|where|when|if)\s")
"""What stands behind it is no part of the answer."""
MARK = re.compile(r"\#\#\#\#|\banswer\s+is\b|\banswer\s*:", re.IGNORECASE)


def numbers(text: str) -> list[Fraction]:
    """All numbers in a text, with their signs; 1,234 is one number, and so are 3 1/2 and -$0.50."""
    text = re.sub(r"\{,\}|\\[!,;]", lambda m: "," if m[0] == "{,}" else "", text)
    found = []
    for match in NUMBER.finditer(text):
        digits, decimals, under = match["digits"], match["decimals"], match["under"]
        if not (digits or decimals) or len(match[0]) > LONGEST or (under and not int(under)):
            continue
        value = Fraction((digits or "0").replace(",", "") + (decimals or "")) / int(under or 1) + int(
            match["whole"] or 0
        )
        found.append(-value if match["sign"] or match["inner"] else value)
    return found


def amount(completion: str) -> Fraction | None:
    """The number an answer ends with: in its last box, else behind its last "answer is" or ####, else its last."""
    text = answer_of(completion)
    if (inside := boxed(text)) is not None:
        return (numbers(inside) or [None])[-1]
    *_, said = MARK.split(text)
    if said != text:
        sentence = re.split(r"\n\s*\S|[.!?]\s", said.strip(), maxsplit=1)[0]
        if behind := numbers(REASON.split(sentence, maxsplit=1)[0].rpartition("=")[2]):
            return behind[0]
    return (numbers(text) or [None])[-1]


@dataclass(frozen=True)
class Amount:
    """The answer is this number, whatever it is written like and counted in."""

    value: Fraction

    def __call__(self, completion: str) -> bool:
        return amount(completion) == self.value


# ----------------------------------------------------------------------------------------------------------------------
# Choices


@dataclass(frozen=True)
class Choice:
    """The answer is this letter, one of `letters`: (C), or C behind "answer is", or C alone."""

    letter: str
    letters: str

    def __call__(self, completion: str) -> bool:
        return self.read(answer_of(completion)) == self.letter

    def read(self, text: str) -> str | None:
        """The letter chosen last."""
        one = rf"[\s*_:$]*(?:\\boxed\{{|\\text\{{)*\(?([{self.letters}])\b(?!['\u2019-])"
        for pattern in (
            rf"(?i:\banswer(?:\s+is|\s*:)(?:\s+(?:option|choice))?){one}",
            rf"\\boxed\{{\W*([{self.letters}])\b",
            rf"\(([{self.letters}])\)",
        ):
            if found := re.findall(pattern, text):
                return found[-1]
        alone = re.match(rf"\W*([{self.letters}])(?:[).:]|(?:\W|$)(?!\s*[a-z]))", text.strip())
        return alone[1] if alone else None


# ----------------------------------------------------------------------------------------------------------------------
# Mathematical expressions


def boxed(text: str) -> str | None:
    r"""What the last complete \boxed{...} or \fbox{...} holds, braces within it too; of \boxed 5, the 5."""
    for start in [m.end() for m in re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])", text)][:-20:-1]:
        rest = text[start:].lstrip()
        if not rest.startswith("{"):
            if match := re.match(r"[^\s$]+", rest):
                return match[0]
            continue
        depth = 0
        for i, letter in enumerate(rest):
            if rest[i - 1 : i] != "\\":
                depth += (letter == "{") - (letter == "}")
            if depth == 0:
                return rest[1:i]
    return None


TEXT = r"\\(?:text|textbf|textit|textrm|mbox|mathrm|operatorname)\s*\{([^{}]*)\}"
SAME = [  # how the same is also written, in order
    (r"\\(?:left|right|[Bb]igg?[lr]?)(?![A-Za-z])|\\displaystyle|(?<!\\)\\[!,;: ]|\\q?quad|~|(?<!\\)\$|\\\$|[£€]", ""),
    (r"[\u2212\u2013]", "-"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:cdot|times)(?![A-Za-z])|\u00d7|\u00b7", "*"),
    (r"\\div(?![A-Za-z])|÷", "/"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°|\\?%", ""),
    (r"π", r"\\pi "),
    (r"√", r"\\sqrt "),
    (r"\\leq?(?![A-Za-z])|≤", "<="),
    (r"\\geq?(?![A-Za-z])|≥", ">="),
    (r"\\(?:infty)(?![A-Za-z])|∞", "inf"),
    (r"(?<![\d,.])(\d{1,3}(?:(?:,|\{,\})\d{3})+)(?!\d|,\d)", lambda m: re.sub(r"\D", "", m[1])),
    (r"\s*\\(?:text|mbox|mathrm)\s*\{\s*(?:and|or)\s*\}\s*|\s+(?:and|or)\s+", ","),
    (r"(?<=[\d}])\s*" + TEXT + r"(?:\s*\^\s*\{?\d\}?)?", ""),  # a unit
    (TEXT, r"\1"),
    (r"(?<=[\d})])\s+(?!sin|cos|tan|log|ln|exp|sqrt|pi)[A-Za-z]{2,}(?:\s+[A-Za-z]+)*\s*$", ""),  # a unit in words
    (r"(?<=\d)_\{?\d+\}?\s*$", ""),  # the base a number is written in
    (r"(?<![\d.^}\w])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\\frac{\2}{\3})"),  # a mixed number
    (r"[.\s]+$|^\s+", ""),
]
TOKEN = re.compile(r"\s*(\\[A-Za-z]+|\d+(?:\.\d+)?|\.\d+|inf|\*\*|[A-Za-z]|[-+*/^(){}\[\]!])")
FUNCTIONS = {
    "sqrt": cmath.sqrt, "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "arctan": cmath.atan,
    "ln": cmath.log, "log": cmath.log10, "exp": cmath.exp,
}  # fmt: skip


def plain(text: str) -> str:
    """An answer without what does not change its value: layout, units, thousands separators."""
    for pattern, by in SAME:
        text = re.sub(pattern, by, text)
    return text


class Evaluator:
    """The value of an expression, in LaTeX or as typed, for given values of its letters."""

    def __init__(self, text: str, letters: Mapping[str, complex]):
        self.letters, self.tokens, place = letters, [], 0
        while place < len(text):
            match = TOKEN.match(text, place)
            if not match:
                raise ValueError(f"no expression: {text[place:]}")
            self.tokens.append(match[1])
            place = match.end()
        self.tokens.reverse()

    def value(self) -> complex:
        result = self.sum()
        if self.tokens:
            raise ValueError(f"left over: {self.tokens}")
        return result

    def next_is(self, *tokens: str) -> bool:
        return bool(self.tokens) and self.tokens[-1] in tokens

    def take(self, token: str | None = None) -> str:
        if not self.tokens or token not in (None, self.tokens[-1]):
            raise ValueError(f"{token} expected")
        return self.tokens.pop()

    def sum(self) -> complex:
        result = self.product()
        while self.next_is("+", "-"):
            result = result + self.product() if self.take() == "+" else result - self.product()
        return result

    def product(self) -> complex:
        result = self.signed()
        while self.tokens and not self.next_is("+", "-", ")", "}", "]"):
            if self.next_is("/"):
                self.take()
                result /= self.signed()
            else:
                if self.next_is("*"):
                    self.take()
                result *= self.signed()
        return result

    def signed(self) -> complex:
        if self.next_is("+", "-"):
            return self.signed() if self.take() == "+" else 0 - self.signed()  # -x has the root's other branch
        return self.power()

    def power(self) -> complex:
        result = self.atom()
        while self.next_is("!"):
            self.take()
            if result != int(result.real) or not 0 <= result.real <= 170:
                raise ValueError("no factorial")
            result = complex(math.factorial(int(result.real)))
        if self.next_is("^", "**"):
            self.take()
            result **= self.atom() if self.tokens and self.tokens[-1][0].isdigit() else self.argument()
        return result

    def group(self, close: str) -> complex:
        result = self.sum()
        self.take(close)
        return result

    def argument(self) -> complex:
        """What a command of LaTeX takes: a group in braces, or one digit, letter or command."""
        if self.next_is("{"):
            self.take()
            return self.group("}")
        if self.next_is("-"):
            self.take()
            return 0 - self.argument()
        token = self.take()
        if token.isdigit() and len(token) > 1:
            self.tokens.append(token[1:])
            token = token[0]
        self.tokens.append(token)
        return self.atom()

    def atom(self) -> complex:
        token = self.take()
        if token in ("(", "{", "["):
            return self.group({"(": ")", "{": "}", "[": "]"}[token])
        if token == "\\frac":
            return self.argument() / self.argument()
        if token == "\\pi":
            return complex(math.pi)
        if token == "inf":
            return complex(math.inf)
        if (name := token.removeprefix("\\")) in FUNCTIONS and token != name:
            if name == "sqrt" and self.next_is("["):
                self.take()
                root = self.group("]")
                return self.argument() ** (1 / root)
            return FUNCTIONS[name](self.argument())
        if token[0].isdigit() or token[0] == ".":
            return complex(float(token))
        if token in self.letters:
            return self.letters[token]
        raise ValueError(f"unknown: {token}")


POINTS = [
    {letter: complex(0.37 + 0.61 * ((k + 3) * (i + 2) % 29) / 7) for i, letter in enumerate("abcdfghjklmnopqrstuvwxyz")}
    | {"e": complex(math.e), "i": 1j}
    for k in range(3)
]
"""Where expressions with letters are compared; e and i are the constants."""


def same_value(one: str, other: str) -> bool:
    try:
        for letters in POINTS:
            a, b = Evaluator(one, letters).value(), Evaluator(other, letters).value()
            if not (a == b or abs(a - b) <= 1e-9 * max(1e-3, abs(a), abs(b))):  # also false of NaN
                return False
    except (ValueError, ArithmeticError, RecursionError):
        return False
    return True


def split(text: str, separator: str) -> list[str]:
    """At a separator that is in no bracket."""
    parts, depth = [""], 0
    for piece in re.split(rf"({separator}|[()\[\]{{}}])", text):
        depth += (piece in ("(", "[", "{")) - (piece in (")", "]", "}"))
        if depth <= 0 and piece and re.fullmatch(separator, piece):
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def same(one: str, other: str) -> bool:
    """Whether two answers in `plain` form are the same: as text, as values, or part by part."""
    one, other = one.strip(), other.strip()
    if re.sub(r"\s", "", one) == re.sub(r"\s", "", other):
        return bool(one)
    if not one or not other:
        return False
    for sign in ("<=", ">=", "<", ">", "="):
        left, right = split(one, sign), split(other, sign)
        if max(len(left), len(right)) > 1:
            if len(left) == len(right):
                return all(map(same, left, right))
            if sign == "=" and {len(left), len(right)} == {1, 2}:  # x = 5 for 5
                long, short = (left, right) if len(left) == 2 else (right, left)
                return bool(re.fullmatch(r"[A-Za-z](?:\([A-Za-z]\))?", long[0].strip())) and same(long[1], short[0])
            return False
    if "\\pm" in one or "\\pm" in other:
        one, other = (
            f"{t.replace(chr(92) + 'pm', '+')},{t.replace(chr(92) + 'pm', '-')}" if "\\pm" in t else t
            for t in (one, other)
        )
    matrix = r"\\begin\{[pbv]?matrix\}(.*?)\\end\{[pbv]?matrix\}"
    if (left := re.fullmatch(matrix, one, re.DOTALL)) and (right := re.fullmatch(matrix, other, re.DOTALL)):
        rows = [[row.split("&") for row in re.split(r"\\\\", m[1])] for m in (left, right)]
        return [*map(len, rows[0])] == [*map(len, rows[1])] and all(
            same(a, b) for r, s in zip(*rows, strict=True) for a, b in zip(r, s, strict=True)
        )
    for separator in (r"\\cup", ","):
        left, right = split(one, separator), split(other, separator)
        if max(len(left), len(right)) > 1:
            return same_set(left, right)
    braces = r"\\\{(.*)\\\}"
    if (left := re.fullmatch(braces, one)) and (right := re.fullmatch(braces, other)):
        return same_set(split(left[1], ","), split(right[1], ","))
    brackets = r"([(\[])(.*)([)\]])"
    if (left := re.fullmatch(brackets, one)) and (right := re.fullmatch(brackets, other)):
        a, b = split(left[2], ","), split(right[2], ",")
        if max(len(a), len(b)) > 1:
            return (left[1], left[3], len(a)) == (right[1], right[3], len(b)) and all(map(same, a, b))
    return same_value(one, other)


def same_set(one: list[str], other: list[str]) -> bool:
    """The same parts in any order."""
    rest = list(other)
    for part in one:
        match = next((i for i, candidate in enumerate(rest) if same(part, candidate)), None)
        if match is None:
            return False
        del rest[match]
    return not rest


@dataclass(frozen=True)
class Expression:
    r"""The answer is equal to `target`: what is in its last \boxed{}, or behind its last "answer is"."""

    target: str

    def __call__(self, completion: str) -> bool:
        text = answer_of(completion)
        if (answer := boxed(text)) is None:
            *_, said = MARK.split(text)
            if said == text:
                return False
            answer = re.split(r"\n|\.(?:\s|$)", said.strip(" :\n"), maxsplit=1)[0]
        return len(answer) <= 1000 and same(plain(answer), plain(self.target))


# ----------------------------------------------------------------------------------------------------------------------
# Programs

WORD = secrets.token_hex(8)
"""What a tested program prints last. It differs in every process that judges, so that no model can learn it by heart.
(A program that looks for it among its own frames finds it: an answer and its tests share one process.)"""

RUN = """
import os, sys
sys.stdout = open(os.devnull, "w")
exec(compile({before!r}, "before.py", "exec"))
exec(compile({answer!r}, "answer.py", "exec"))
exec(compile({tests!r}, "tests.py", "exec"))
sys.__stdout__.write({word!r})
sys.__stdout__.flush()
"""


@dataclass(frozen=True)
class Solution:
    """Makes a program of an answer: its code block, then the tests, then the word that says they were reached.

    So an answer that ends the program before its tests is wrong, and so is one whose tests print what they like.
    """

    name: str
    """The function that is asked for."""
    tests: str
    before: str = ""
    """What the answer may build on. It may also be the beginning of the function itself, for answers that go on."""

    def __call__(self, completion: str) -> str:
        before, answer = self.before, code(answer_of(completion), self.name)
        if not defines(answer, self.name):
            before, answer = "", self.before + answer
        return RUN.format(before=before, answer=answer, tests=self.tests, word=WORD)


def defines(text: str, name: str) -> bool:
    return (
        re.search(rf"^[ \t]*(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", text, re.M)
        is not None
    )


def code(text: str, name: str) -> str:
    """The first code block that defines `name`; else the first block, or all that stands before the end of one."""
    blocks = re.findall(r"```[ \t]*(?:python|py|Python)?[ \t]*\n(.*?)(?=```|\Z)", text, re.DOTALL)
    opening = text.partition("```")[0]
    for block in (*blocks, opening):
        if defines(block, name):
            return block
    begins_with_block = not opening.strip() or re.search(r"```[ \t]*(?:python|py|Python)", text)
    return blocks[0] if blocks and begins_with_block else opening
