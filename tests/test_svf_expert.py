"""Experts from the command line: the shipped base, its configurations, a run from start to end."""

import json
import math

import pytest
import torch
import yaml
from conftest import ROOT
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from svf import rollout
from svf.sandbox import Sandbox
from tasks import cli
from tasks.text import check, samples

BASE = ROOT / "svf/assets/base"


def test_the_shipped_base_is_small_loads_and_answers_about_half_of_each_domain():
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 8e6
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    assert model.config.model_type == "llama" and sum(p.numel() for p in model.parameters()) < 3e6
    try:
        sandbox, domains = Sandbox(jobs=2), ("math", "logic", "code")
    except RuntimeError:  # here programs cannot be isolated
        sandbox, domains = None, ("math", "logic")
    for domain in domains:
        asked = samples(domain, "test", 200)
        prompts = [rollout.encode(tokenizer, sample.prompt) for sample in asked]
        rows = rollout.sample(model, prompts, rollout.end_tokens(model, tokenizer), tokenizer.pad_token_id, 16)
        answers = [row[kept].tolist() for row, kept in zip(rows.answers, rows.answered, strict=True)]
        right = sum(check(asked, tokenizer.batch_decode(answers, skip_special_tokens=True), sandbox)) / 200
        assert 0.33 < right < 0.67, (domain, right)  # 40 to 60 % of all there are


def test_a_run_trains_an_expert_and_says_what_it_gained(train, tmp_path):
    words = ["data.n_val=20", "data.n_test=30", "data.batch_size=4", "model.policy.kl=0.05", "run=a"]
    words += [
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "data.others=[logic]",
        "trainer.log_every_n_steps=1",
    ]
    done = train("task=expert", *words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/expert/a"
    test = json.loads((run / "test.json").read_text())
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    of_math = [answer for answer in answers if answer["domain"] == "math"]
    assert len(answers) == 60 and len(of_math) == test["n"] == 30
    assert test["test/accuracy"] == pytest.approx(sum(a["right"] for a in of_math) / 30)
    assert test["test/before_accuracy"] == pytest.approx(sum(a["base_right"] for a in of_math) / 30)
    assert test["test/gain"] == pytest.approx(test["test/accuracy"] - test["test/before_accuracy"], abs=1e-6)
    assert test["test/logic"] == pytest.approx(sum(a["right"] for a in answers if a["domain"] == "logic") / 30)
    assert test["trainable"] == 3584 and math.isfinite(test["seconds"]) and test["trained_per_second"] > 0
    header, *_ = (run / "metrics.csv").read_text().splitlines()
    for name in ("reward", "kl", "entropy", "length", "clipped", "loss"):
        assert f"train/{name}" in header.split(",")
    # the expert is small, belongs to the base as anybody loads it, and does something
    files = list((run / "adapter").iterdir())
    assert sum(path.stat().st_size for path in files if path.suffix in (".safetensors", ".json")) < 100_000
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), run / "adapter").eval()
    ids = torch.tensor([[20, 21, 22]])
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=ids).logits, adapted)
    with safe_open(run / "adapter/adapter_model.safetensors", "pt") as file:
        assert all("svf_z" in name for name in file.keys())  # noqa: SIM118
    again = train("test", "task=expert", "ckpt_path=best", *words[:2], "data.others=[logic]")
    assert again.returncode == 0, again.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("accuracy: "))
    assert line.partition(" (")[0] in again.stdout


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["data.domain=code"], "data.allow_code_execution=true"),
        (["data.domain=[math,logic]", "model.adapter=peft.LoraConfig"], "only SVF trains several experts at once"),
        (["model.policy.answers=1"], "model.policy.answers of 2 or more"),
        (["model.base=nowhere"], "model.base=nowhere cannot be loaded"),
        (["model.policy.answer=3"], "model.policy.answers"),
    ],
)
def test_mistakes_are_said_in_a_line(words, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", *cli.spell(["task=expert", *words])])
    with pytest.raises((SystemExit, cli.UserError)) as stopped:
        cli.CLI()
    said = str(stopped.value) + capsys.readouterr().err
    assert sentence in said


@pytest.mark.parametrize("task", ["lm", "expert", "expert/published", "expert/llama8b", "expert/gsm8k"])
def test_every_configuration_names_itself_and_its_keys_are_known(task, monkeypatch):
    class ParseOnly(cli.CLI):
        def instantiate_classes(self) -> None:
            pass

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    monkeypatch.setattr("sys.argv", ["train.py", *cli.spell([f"task={task}"])])
    line = ParseOnly()
    assert yaml.safe_load(line._parser("fit").dump(line.config["fit"], skip_none=False))["task"] == task


@pytest.mark.slow
def test_an_expert_gains_ten_points_and_more(train, tmp_path):
    """The README's first expert; the others take longer."""
    train("task=expert", "data.domain=math", "run=a")
    test = json.loads((tmp_path / "runs/expert/a/test.json").read_text())
    assert test["n"] >= 1000 and test["test/gain"] - test["test/gain_95"] > 0 and test["test/gain"] >= 0.1
