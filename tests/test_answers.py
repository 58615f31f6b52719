"""What counts as a right answer, among it every fault of the published checkers."""

from fractions import Fraction

import pytest

from svf.sandbox import Sandbox
from tasks.answers import WORD, Amount, Choice, Expression, Solution, amount, boxed, numbers
from tasks.text import Program, Sample, check


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("He sells 1,234 of them.", 1234),  # published: 234
        ("That leaves 1,234,567", 1234567),
        ("The temperature is -5", -5),  # published: 5
        ("It is \u22127 degrees", -7),
        ("So he loses -$1,000.50", Fraction("-1000.5")),
        ("So he loses $-3", -3),
        ("= -4", -4),
        ("(-4)", -4),
        ("10 - 5", 5),
        ("between 5-10", 10),
        ("on 2024-05-06", 6),
        ("18.", 18),
        ("18.0 dollars", 18),
        (".5", Fraction(1, 2)),
        ("3 1/2", Fraction(7, 2)),
        ("3/4", Fraction(3, 4)),
        ("1{,}000", 1000),
        ("50%", 50),
        ("**42**", 42),
        ("5 apples, 6 pears", 6),
        ("1,23", 23),
        ("5/0 4", 4),
        ("as in H2O", None),
        ("no idea", None),
        ("", None),
        ("#### -1,000", -1000),
        ("The answer is 18. I looked at it 3 times.", 18),
        ("The answer is 5 + 3 = 8 apples. There were 9 before.", 8),
        ("The answer is: **$18**", 18),
        ("Answer: 12\nIt took 4 steps.", 12),
        ("The answer is 3. No, the answer is 4.", 4),
        ("The answer is not clear, I say 7", 7),
        (r"\boxed{18}, in 3 steps", 18),
        (r"The answer is \boxed{\$1{,}018}.", 1018),
        ("The answer is 7 since x = 3", 7),
        ("the final answer is 1 / 2", Fraction(1, 2)),
        ("0" * 5000, None),  # more digits than Python reads
        ("It is 3, not " + "1" * 5000, 3),
        ("Response 3 to Instruction 4 is 12", 12),  # published: stop words cut this off
        (
            "It is 18.\n\n@@ Instruction\nWhat is 5 + 6?\n\n@@ Response\n11",
            18,
        ),  # but the next request is not the answer
    ],
)
def test_amounts(text, value):
    assert amount(text) == value
    assert Amount(Fraction(99))(text) is False
    if value is not None:
        assert Amount(Fraction(value))(text) is True


def test_numbers_in_order():
    assert numbers("From -2 to 3,000 by 0.5 in 1/4 steps") == [-2, 3000, Fraction(1, 2), Fraction(1, 4)]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("the answer is (C)", "C"),
        ("Let me think. A is wrong.\nThe answer is B.", "B"),
        ("**Answer: D**", "D"),
        ("C", "C"),
        (" C) Mars", "C"),
        ("C. Mars", "C"),
        ("It is (B), because", "B"),
        ("I thought (A), but the answer is (B).", "B"),
        ("The answer is not (A), but (B)", "B"),
        ("The answer is option B", "B"),
        ("B) because A is wrong", "B"),
        ("The answer is (A). No: the answer is (D).", "D"),
        (r"The answer is \boxed{\text{D}}", "D"),
        (r"so $\boxed{C}$", "C"),
        ("the Response is clear: the answer is (C)", "C"),  # published: a stop word
        ("the answer is (C)\n\n@@ Instruction\n(A) or (B)? The answer is (B)", "C"),
        ("the answer is (F)", None),  # no such option
        ("The answer is a dog", None),
        ("A plant needs water", None),
        ("3", None),
        ("I do not know", None),  # published: a guess
        ("", None),
    ],
)
def test_choices(text, letter):
    for right in "ABCD":
        assert Choice(right, "ABCD")(text) == (right == letter)


RIGHT = [
    (r"\frac{1}{2}", r"\frac12"),
    ("0.5", r"\dfrac{1}{2}"),
    ("1/2", r"\tfrac{1}{2}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"1\frac{4}{5}", r"\frac{9}{5}"),
    (r"\sqrt{3}/2", r"\frac{\sqrt{3}}{2}"),
    (r"2\sqrt2", r"\sqrt{8}"),
    (r"\sqrt[3]{27}", "3"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\frac{x+2}{7}", "(x+2)/7"),
    ("x = 5", "5"),
    ("2x+1", "y=1+2x"),
    (r"5\text{ cm}^2", "5"),
    ("5 square units", "5"),
    (r"90^\circ", "90"),
    (r"50\%", "50"),
    (r"\$1,234.00", "1234"),
    ("10{,}000", "10,000"),
    ("3.0", "3"),
    ("2^10", "2^{10}"),
    ("5!", "120"),
    ("(1,2)", r"\left( 1, \frac{4}{2} \right)"),
    ("2, 1", "1,2"),
    (r"2 \text{ and } 3", "2,3"),
    (r"\{3,2,1\}", r"\{1,2,3\}"),
    (r"1 \pm \sqrt{2}", r"1-\sqrt{2}, 1+\sqrt{2}"),
    ("[0,1)", "[0, 1)"),
    (r"(3,\infty) \cup (-\infty, 2)", r"(-\infty,2)\cup(3,\infty)"),
    (r"x\le 3", r"x \leq 3"),
    (r"\begin{pmatrix} 2/4 \\ 2 \end{pmatrix}", r"\begin{pmatrix}\frac12\\2\end{pmatrix}"),
    (r"\text{Evelyn}", "Evelyn"),
    ("1010", "1010_2"),
    ("i", r"\sqrt{-1}"),
    (r"e^{i\pi}", "-1"),
    ("-2^2", "-4"),
]
WRONG = [
    ("3", "-3"),
    ("0.333", r"\frac13"),
    ("(2,1)", "(1,2)"),
    ("(0,1)", "[0,1)"),
    ("1,2,2", "1,2"),
    ("1", "1,1"),
    ("x", "y"),
    (r"12\%", "0.12"),
    ("3 sin x", "3"),
    ("x>3", "x<3"),
    ("", "5"),
    ("9^9^9^9", "5"),
    ("0/0", "0/0 + 1"),
    (r"\frac", "5"),
    ("(" * 20000, "5"),
    ("__import__('os').getpid()", "5"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
]


@pytest.mark.parametrize(("answer", "target"), RIGHT + [(b, a) for a, b in RIGHT])
def test_expressions_that_are_the_same(answer, target):
    assert Expression(target)(f"We find $x$, so it is $\\boxed{{{answer}}}$. Done in 7 steps.")


@pytest.mark.parametrize(("answer", "target"), WRONG)
def test_expressions_that_are_not(answer, target):
    assert not Expression(target)(f"\\boxed{{{answer}}}")


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{\frac{\sqrt{3}}{2}} and more}", r"\frac{\sqrt{3}}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed 7$", "7"),
        (r"\fbox{x}", "x"),
        ("none", None),
        (r"\boxed{" * 10000, None),
    ],
)
def test_boxes(text, inside):
    assert boxed(text) == inside


def test_an_answer_without_a_box():
    assert Expression("0.75")("The answer is $\\frac{3}{4}$.\nIt was easy.")
    assert not Expression("0.75")("3/4")
    assert Expression("5")("\\boxed{5}\n@@ Instruction\n\\boxed{6}") and not Expression("6")(
        "\\boxed{5}\n@@ Instruction\n\\boxed{6}"
    )


SQUARE = Sample("", "code", "", Program(Solution("f", "assert f(2) == 4\nassert f(3) == 9"), WORD))
BEFORE = "import math\ndef sq(x):\n    return x * x\n\ndef f(x):\n    '''Square.'''\n"
BODY = Sample("", "code", "", Program(Solution("f", "def check(c):\n    assert c(2) == 4\ncheck(f)", BEFORE), WORD))
PROGRAMS = [
    (SQUARE, "```python\ndef f(x):\n    return x*x\n```", True),
    (SQUARE, "def f(x):\n    return x*x", True),
    (SQUARE, "def f(x):\n    return x*x\n```\nUse it so:\n```python\nf(2)\n```", True),
    (SQUARE, "Sure!\n```py\ndef f(x):\n    return x**2\n```\n```python\nprint(f(3))\n```", True),
    (SQUARE, "```\ndef f(x):\n    # Response to the Instruction\n    return x*x\n```", True),
    (SQUARE, "f = lambda x: x*x", True),
    (SQUARE, "from __future__ import annotations\ndef f(x: Unknown):\n    return x*x", True),
    (SQUARE, "def f(x):\n    print('noise', flush=True)\n    return x*x", True),
    (SQUARE, "def f(x):\n    return x*x\n@@ Instruction\nNow cubes.", True),
    (SQUARE, "def f(x):\n    return 4", False),
    (SQUARE, "def f(x)::", False),
    (SQUARE, "def g(x):\n    return x*x", False),
    (SQUARE, "", False),
    (SQUARE, "import os\nos._exit(0)", False),  # ends well, without having been tested
    (SQUARE, "import sys\nsys.exit(0)", False),
    (SQUARE, "raise SystemExit", False),
    (SQUARE, "def f(x):\n    exit(0)", False),
    (BODY, "    return sq(x)\n", True),
    (BODY, "    return sq(x)\n```\nThis squares.", True),
    (BODY, "```python\ndef f(x):\n    return sq(x)\n```", True),
    (BODY, "Here:\n```python\n    return sq(x)\n```", True),
    (BODY, "    return x", False),
]


def test_a_flood_of_newlines_is_read_in_no_time():
    """A pattern that looked for the next line's end from each of them anew took minutes."""
    flood = "\n" * 200_000
    assert "assert f(1)" in Solution("f", "assert f(1)")(flood + "def f(x): return x")
    assert amount("The answer is 3." + flood) == 3


def test_programs():
    try:
        box = Sandbox(wall_seconds=20.0)
    except RuntimeError as error:
        pytest.skip(str(error))
    with box:
        samples, answers, right = zip(*PROGRAMS, strict=True)
        assert check(samples, answers, box) == list(right)
