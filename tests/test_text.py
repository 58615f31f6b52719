"""Generated text tasks: right targets, right checkers, parts kept apart."""

import contextlib
import io
import json

import pytest
import yaml
from conftest import ROOT

from svf.adapt import CLASSIFY
from tasks import text
from tasks.text import DOMAINS, GENERATORS, PARTS, UNSEEN, Sample, TextTask, check, make, samples


class InProcess:
    """Stands for the sandbox where programs are our own."""

    def run(self, programs):
        results = []
        for program in programs:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(program, {})
            results.append(type("Result", (), {"ok": True, "output": printed.getvalue()}))
        return results


@pytest.mark.parametrize("domain", GENERATORS)
def test_every_target_is_right_and_short_and_the_parts_have_nothing_in_common(domain):
    parts = {part: samples(domain, part, 300) for part in PARTS}
    for part in parts.values():
        assert len({sample.prompt for sample in part}) == len(part) == 300
        assert all(check(part, [sample.target for sample in part], InProcess()))
        assert max(len(sample.target) for sample in part) <= text.LONGEST
        assert max(len(sample.prompt) for sample in part) <= (90 if domain == "dispatch" else 64)
        assert {sample.domain for sample in part} == {domain}
    # the other parts are also apart from what other seeds train on
    train = {make(domain, "train", seed, i).prompt for seed in (1, 2) for i in range(300)}
    assert not train & {sample.prompt for part in ("selection", "test") for sample in parts[part]}
    assert samples(domain, "test", 50) == parts["test"][:50]


def test_the_same_problem_in_other_words_is_in_the_same_part():
    """Rules of a proof come in any order."""
    sample = make("logic", "test", 0, 0)
    rules = sample.prompt.partition(":")[0].split()
    found = {part: {s.prompt: s for s in samples("logic", part, 2000)} for part in ("train", "selection")}
    split = [(prompt.partition(":")[0].split(), prompt.partition(":")[2]) for part in found.values() for prompt in part]
    assert (sorted(rules), sample.prompt.partition(":")[2]) not in [(sorted(rules), goal) for rules, goal in split]


def test_two_seeds_draw_different_samples_and_one_seed_the_same():
    first, again, other = ([make("code", "train", seed, i).prompt for i in range(20)] for seed in (3, 3, 4))
    assert first == again != other


NUMBERS = {
    True: ("=7", "9,4=7", " = 7 ", "7", "=+7"),
    False: ("=-7", "=8", "", "=", "7=", "=7.0", "=7=8", "=\u0667"),
}


@pytest.mark.parametrize("right", [True, False])
def test_the_number_behind_the_last_equals_sign_is_the_answer(right):
    sample = Sample("7+2-5+3=", "math", "=7", text.Number(7))
    assert [sample.check(completion) for completion in NUMBERS[right]] == [right] * len(NUMBERS[right])


PROOFS = {
    True: ("abc", "cba", "adc", "cda", " abc"),
    False: ("ac", "ab", "bc", "abcd", "a>b>c", "abbc", "", "a", "abdc"),
}


@pytest.mark.parametrize("right", [True, False])
def test_a_proof_is_any_unbroken_chain_of_rules(right):
    rules = frozenset({("a", "b"), ("b", "c"), ("a", "d"), ("d", "c")})
    proof = text.Proof(rules, "a", "c")
    assert [proof(completion) for completion in PROOFS[right]] == [right] * len(PROOFS[right])


PROGRAMS = {
    True: ("x=2*x-5", "x-=4;x*=2;x+=3", "x=3+2*(x-4)", "x+=x-5"),
    False: ("x=2*x+5", "x=-13", "x=(", "", "print(x)", "x=2*x-5.0", "y=2*x-5"),
}


@pytest.mark.parametrize("right", [True, False])
def test_a_program_is_judged_by_what_it_does(right):
    operations = [text.Operation("-", 4), text.Operation("*", 2), text.Operation("+", 3)]
    sample = Sample("+3 of *2 of -4 of x:", "code", "", text.Program(text.Line(), text._values(operations)))
    n = len(PROGRAMS[right])
    assert check([sample] * n, PROGRAMS[right], InProcess()) == [right] * n


def test_what_is_no_python_is_wrong_without_being_run():
    class Refusing:
        def run(self, programs):
            raise AssertionError(programs)

    code = samples("code", "test", 3)
    assert check(code, ["x=(", "x=\x00", "for x in"], Refusing()) == [False] * 3


def test_programs_run_in_the_sandbox():
    from svf.sandbox import Sandbox

    try:
        sandbox = Sandbox(jobs=1)
    except RuntimeError as error:
        pytest.skip(str(error))
    code, math = samples("code", "test", 4), samples("math", "test", 2)
    answers = [code[0].target, "while True:x=1", "import os;os.a", code[3].target, math[0].target, "=x"]
    with sandbox:
        assert check([*code, *math], answers, sandbox) == [True, False, False, True, True, False]


def test_a_request_is_dispatched_to_the_kind_it_is():
    seen = set()
    for sample in samples("dispatch", "selection", 100):
        request = sample.prompt.removeprefix(
            CLASSIFY.partition("{prompt}")[0].format(labels="math, code, logic, other")
        )
        request, label = request.removesuffix("\nKind:"), sample.target
        shape = {"=": " math", "x:": " code", "?": " logic"}
        expected = next((kind for end, kind in shape.items() if request.endswith(end)), " other")
        assert label == expected and sample.check(label) and not sample.check(" kind")
        seen.add(label)
    assert seen == {" math", " code", " logic", " other"}


def test_unseen_tasks_are_in_no_training():
    assert len(UNSEEN) >= 3 and not set(UNSEEN) & set(DOMAINS)
    trained = {sample.prompt for domain in ("math", "code", "logic") for sample in samples(domain, "train", 2000)}
    for domain in UNSEEN:
        assert not trained & {sample.prompt for sample in samples(domain, "test", 300)}
    for path in ("lm.yaml", "expert.yaml"):
        domains = yaml.safe_load((ROOT / "configs" / path).read_text())["data"]["init_args"]["domain"]
        assert not set(UNSEEN) & ({domains} if isinstance(domains, str) else set(domains))


def test_a_domain_gets_the_same_samples_alone_and_among_others():
    def prompts(n, **arguments):
        task = TextTask(batch_size=2, **arguments)
        return [sample for i in range(n) if (sample := task.dataset("train")[i]).domain == "logic"]

    alone = prompts(6, domain="logic")
    among = prompts(24, domain=["math", "logic", "other"], shares=[2, 1, 1])
    assert [s.prompt for s in alone] == [s.prompt for s in among]
    task = TextTask(["math", "logic", "other"], [2, 1, 1], batch_size=2)
    assert [s.domain for s in next(iter(task.train_dataloader())).samples] == ["math", "logic", "other", "math"] * 2


def test_evaluation_has_every_domain_and_tests_others_besides():
    task = TextTask(["math", "logic"], others=["wider", "math"], n_val=3, n_test=4)
    assert [s.domain for s in task.dataset("val")] == ["math"] * 3 + ["logic"] * 3
    assert [s.domain for s in task.dataset("test")] == ["math"] * 4 + ["logic"] * 4 + ["wider"] * 4


def test_published_sets_are_read_from_a_folder_and_shuffled_anew_in_every_pass(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for split, n in (("train", 40), ("test", 5)):
        rows = [json.dumps({"question": f"{split} {i}?", "answer": f"It is {i}.\n#### {i}"}) for i in range(n)]
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("\n".join(rows))
    task = TextTask("gsm8k", root=str(tmp_path), batch_size=4)
    val, test = task.dataset("val"), task.dataset("test")
    n = 40 - len(val)
    stream = [task.dataset("train")[i] for i in range(2 * n)]
    first, second = ([sample.prompt for sample in part] for part in (stream[:n], stream[n:]))
    assert len(test) == 5 and sorted(first) == sorted(second) and first != second
    assert len({*first, *(sample.prompt for sample in val)}) == 40
    assert task.check(stream[:1], [stream[0].target]) == [True] != task.check(stream[:1], ["The answer is 99."])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"domain": "code"}, "data.allow_code_execution=true"),
        ({"others": ["constants"]}, "data.allow_code_execution=true"),
        ({"domain": "maths"}, "there is no domain 'maths'"),
        ({"domain": ["math", "math"]}, "several different ones"),
        ({"domain": []}, "give a name"),
        ({"domain": ["math"], "shares": [1, 2]}, "a whole number above 0 for each of math"),
        ({"n_test": 0}, "data.n_test=0 must be at least 1"),
    ],
)
def test_what_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        TextTask(**arguments)
