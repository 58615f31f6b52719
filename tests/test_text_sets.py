"""Published data sets from jsonl files and `datasets`: parts, prompts, judges, and what is said for want of them."""

import json
import sys
import types

import pytest

from svf.rollout import encode
from svf.sandbox import Sandbox
from svf.tokenizer import byte_tokenizer
from tasks.text import PARTS, TextTask, check
from tasks.text_sets import SETS, load


def gsm8k(i):
    return {
        "question": f"Tom has {i} apples and gets {i}.",
        "answer": f"He has {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i:,}",
    }


def competition_math(i):
    return {
        "problem": f"Halve {i}.",
        "solution": f"It is $\\boxed{{\\frac{{{i}}}{{2}}}}$.",
        "level": "Level 1",
        "type": "Algebra",
    }


def arc(i):
    labels = list("ABCD") if i % 2 else ["1", "2", "3", "4"]
    texts = [f"thing {i + k}" for k in range(4)]
    return {
        "id": str(i),
        "question": f"What is {i}?",
        "choices": {"text": texts, "label": labels},
        "answerKey": labels[i % 4],
    }


def mbpp(i):
    tests = [f"assert set(add_{i}([1])) == {{{i + 1}}}", f"assert add_{i}([]) == []"]
    code = (
        f"import math\r\ndef helper(x):\r\n    return x + {i}\r\ndef add_{i}(xs):\r\n    return [helper(x) for x in xs]"
    )
    return {"task_id": i, "text": f"Add {i} to all.", "code": code, "test_list": tests, "test_setup_code": ""}


def humaneval(i):
    prompt = f'from typing import List\n\n\ndef f_{i}(x: int) -> int:\n    """Add {i}."""\n'
    test = f"def check(candidate):\n    assert candidate(1) == {i + 1}\n"
    return {
        "task_id": f"H/{i}",
        "prompt": prompt,
        "canonical_solution": f"    return x + {i}\n",
        "test": test,
        "entry_point": f"f_{i}",
    }


ROWS = {
    "gsm8k": gsm8k,
    "competition_math": competition_math,
    "mbpp": mbpp,
    "humaneval": humaneval,
    "arc_easy": arc,
    "arc_challenge": arc,
}


def write(folder, name, split, numbers):
    path = folder / name / f"{split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(ROWS[name](i), ensure_ascii=False) + "\n" for i in numbers), encoding="utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for name in SETS:
        write(folder, name, "test", range(600, 630))
        if SETS[name].train:
            write(folder, name, "train", [*range(590, 610), *range(200)])  # some of the test problems, and others
    return folder


def test_all_sets_have_rows():
    assert set(ROWS) == set(SETS)


@pytest.mark.parametrize("name", [name for name in SETS if SETS[name].train])
def test_parts_are_disjoint_and_all_there(root, name):
    parts = {part: [sample.prompt for sample in load(name, part, root=root)] for part in PARTS}
    assert len(parts["test"]) == 30
    assert len(parts["train"]) + len(parts["selection"]) == 210  # ten of the 220 are in test
    assert len(set().union(*parts.values())) == 240
    share = len(parts["selection"]) / 210
    assert abs(share - 1 / SETS[name].selection) < 0.12
    assert [s.prompt for s in load(name, "train", 7, root)] == parts["train"][:7]
    assert {s.domain for s in load(name, "test", root=root)} == {name}


@pytest.mark.parametrize("name", SETS)
def test_every_right_answer_is_judged_right_and_others_wrong(root, name):
    samples = load(name, "test", 6, root)
    assert len({s.target for s in samples}) > 1
    box = None
    if any(sample.runs_code for sample in samples):
        try:
            box = Sandbox(wall_seconds=20.0)
        except RuntimeError as error:
            pytest.skip(str(error))
    assert check(samples, [s.target for s in samples], box) == [True] * 6
    wrong = [next(s.target for s in samples if s.target != sample.target) for sample in samples]
    assert check(samples, wrong, box) == [False] * 6
    assert check(samples, [""] * 6, box) == [False] * 6


def test_gsm8k(root):
    sample = load("gsm8k", "test", root=root)[0]
    assert sample.target == "He has 600+600=1200.\nThe answer is 1,200."
    assert sample.check("1200") and sample.check("$1,200.00") and not sample.check("200") and not sample.check("-1,200")
    assert sample.prompt.startswith("@@ Instruction\n") and sample.prompt.endswith("gets 600.\n\n@@ Response\n")


def test_arc_with_numbers_as_keys(root):
    lettered, numbered = load("arc_easy", "test", root=root)[1], load("arc_easy", "test", root=root)[2]
    assert lettered.target == "The answer is (B)." and numbered.target == "The answer is (C)."
    assert "(A) thing 602\n(B) thing 603\n(C) thing 604\n(D) thing 605" in numbered.prompt
    assert numbered.check("I believe the answer is (C)") and not numbered.check("the answer is (3)")


def test_mbpp_asks_by_one_test_and_judges_by_all(root):
    sample = load("mbpp", "test", root=root)[0]
    assert "assert set(add_600([1])) == {601}" in sample.prompt and "add_600([])" not in sample.prompt
    assert "\r" not in sample.target and sample.judge.program.name == "add_600"


def test_humaneval_is_for_testing_only(root):
    with pytest.raises(ValueError, match="humaneval has a test part only"):
        load("humaneval", "train", root=root)


def test_humaneval_can_be_a_domain_that_is_tested(root):
    task = TextTask("humaneval", root=str(root), allow_code_execution=True, n_test=3)
    assert [sample.domain for sample in task.dataset("test")] == ["humaneval"] * 3
    with pytest.raises(ValueError, match="humaneval has a test part only"):
        task.dataset("train")[0]


def test_names_and_parts(root):
    with pytest.raises(ValueError, match="no data set 'gsm9k'; there are gsm8k, competition_math, mbpp"):
        load("gsm9k", "test", root=root)
    with pytest.raises(ValueError, match="no part 'valid'; there are train, selection, test"):
        load("gsm8k", "valid", root=root)


def test_chat_template(root):
    tokenizer = byte_tokenizer()
    plain = load("gsm8k", "test", 1, root)[0]
    assert load("gsm8k", "test", 1, root, tokenizer)[0].prompt == plain.prompt
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    prompt = load("gsm8k", "test", 1, root, tokenizer)[0].prompt
    assert prompt.startswith("<s>[user]Solve") and prompt.endswith("gets 600.[assistant]") and "@@" not in prompt
    assert encode(tokenizer, prompt).count(tokenizer.bos_token_id) == 1  # published: two


def no_network(*_, **__):
    raise ConnectionError("Couldn't reach the hub\nand much more")


def test_without_network_one_sentence_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=no_network))
    with pytest.raises(ValueError) as error:
        load("gsm8k", "train", root=tmp_path)
    message = str(error.value)
    assert "\n" not in message and str(tmp_path / "gsm8k") in message and "Couldn't reach the hub" in message
    assert "put train.jsonl and test.jsonl" in message and "question and answer" in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[text\]'.* put test\.jsonl into .*humaneval"):
        load("humaneval", "test", root=tmp_path)


def test_a_missing_or_broken_file_is_named(tmp_path):
    write(tmp_path, "gsm8k", "test", range(3))
    with pytest.raises(ValueError, match=r"there is no .*gsm8k/train\.jsonl"):
        load("gsm8k", "train", root=tmp_path)
    path = tmp_path / "gsm8k" / "test.jsonl"
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ValueError, match=r"test\.jsonl, line 4, is no JSON"):
        load("gsm8k", "test", root=tmp_path)
    path.write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match="gsm8k, test, row 1: 'answer' is missing; a row has question and answer"):
        load("gsm8k", "test", root=tmp_path)
    path.write_text('{"question": "a", "answer": "who knows"}\n')
    with pytest.raises(ValueError, match="row 1: its answer does not end with ####"):
        load("gsm8k", "test", root=tmp_path)


def test_the_hub_is_asked_for_the_published_splits(tmp_path, monkeypatch):
    asked = []

    def load_dataset(hub, config, split):
        asked.append((hub, config, split))
        first = 1000 * len(asked)
        return [ROWS[name](i) for i in range(first, first + 12)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for name in SETS:
        load(name, "train" if SETS[name].train else "test", root=tmp_path)
    subjects = [config for hub, config, split in asked if "hendrycks" in hub and split == "train"]
    assert len(subjects) == len(set(subjects)) == 7
    assert [(hub, config, split) for hub, config, split in asked if "hendrycks" not in hub] == [
        ("openai/gsm8k", "main", "test"),
        ("openai/gsm8k", "main", "train"),
        ("google-research-datasets/mbpp", "full", "test"),
        ("google-research-datasets/mbpp", "full", "train"),
        ("google-research-datasets/mbpp", "full", "validation"),
        ("openai/openai_humaneval", None, "test"),
        ("allenai/ai2_arc", "ARC-Easy", "test"),
        ("allenai/ai2_arc", "ARC-Easy", "train"),
        ("allenai/ai2_arc", "ARC-Challenge", "test"),
        ("allenai/ai2_arc", "ARC-Challenge", "train"),
    ]


def test_rows_of_other_editions(tmp_path):
    """MBPP+ calls the problem `prompt` and has imports; MATH-500 has the answer beside the solution."""
    (tmp_path / "mbpp").mkdir()
    row = mbpp(5) | {"prompt": "Add five.", "test_imports": ["import math"]}
    del row["text"]
    (tmp_path / "mbpp" / "test.jsonl").write_text(json.dumps(row))
    assert "Add five." in load("mbpp", "test", root=tmp_path)[0].prompt
    (tmp_path / "competition_math").mkdir()
    row = {"problem": "p", "solution": "no box", "answer": "\\frac{1}{3}"}
    (tmp_path / "competition_math" / "test.jsonl").write_text(json.dumps(row))
    assert load("competition_math", "test", root=tmp_path)[0].check("\\boxed{1/3}")
