"""The table of methods: what is run, which learning rate is taken, and what its cells say."""

import json

import pytest
from scipy.stats import t as student_t

from svf import table
from tasks import cli


@pytest.fixture
def found(monkeypatch, tmp_path):
    """Runs that find what their names say, without being made. Returns the names asked for, in order."""
    made = []

    def result(run):
        _, *words = run.name.split("-")
        if "base" in words:
            return {"test/accuracy": 0.5, "n": 100}
        rate = next(float(word.removeprefix("data.")) for word in run.name.split("-") if word.startswith("0."))
        seed = int(words[-1])
        values = {"trainable": 10, "seconds": 2.0 + seed % 2, "selection": 1 - abs(rate - 0.03)}
        return values | {"test/accuracy": 0.6 + 0.1 * seed, "test/math": 0.4, "test/logic": 0.3}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table.Run, "result", property(result))
    monkeypatch.setattr(table, "make_all", lambda runs, jobs, folder: made.extend(runs) or folder.mkdir(exist_ok=True))
    return made


def test_the_best_rate_of_the_sweep_is_run_over_domains_and_seeds(found, tmp_path, capsys):
    options = {"domains": "math,logic", "methods": "SVF,reward", "seeds": "3", "out": str(tmp_path / "out")}
    content = table.table(options, ["data.n_test=5"])
    swept = [run for run in found if run.name.endswith("-1000")]
    chosen = [run for run in found if run not in swept and "base" not in run.name]
    assert [next(w for w in run.words if "optim.lr" in w) for run in swept] == [
        f"model.optim.lr={rate}" for rate in table.METHODS["SVF, reward"].rates
    ]
    assert all("data.domain=math" in run.words and "data.n_test=5" in run.words for run in swept)
    assert len(chosen) == 6 and all("model.optim.lr=0.03" in run.words for run in chosen)
    base, svf = content["rows"]
    cell = svf["cells"]["math"]
    assert cell["n"] == 3 and cell["mean"] == pytest.approx(0.7)
    assert cell["half"] == pytest.approx(student_t.ppf(0.975, 2) * 0.1 / 3**0.5)
    assert base["cells"]["math"]["half"] == pytest.approx(1.96 * 0.05)
    assert svf["others"]["n"] == 6 and svf["others"]["mean"] == pytest.approx((0.3 - 0.5 + 0.4 - 0.5) / 2)
    assert svf["seconds"] == pytest.approx(7 / 3)
    assert json.loads((tmp_path / "out/table.json").read_text())["rows"][1]["lr"] == 0.03
    assert (
        "| SVF, reward | 70.0 ± 24.8 (3) | 70.0 ± 24.8 (3) | -15.0 ± 5.7 (6) | 10 | 0.03 | 2 |"
        in capsys.readouterr().out
    )


def test_every_method_is_a_run_that_train_py_understands(monkeypatch):
    class ParseOnly(cli.CLI):
        def instantiate_classes(self) -> None:
            pass

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    kinds = {}
    for name in table.METHODS:
        run = table.run_of(name, 0.01, "math", 3, ("logic",), [])
        monkeypatch.setattr("sys.argv", ["train.py", *cli.spell(list(run.words))])
        config = ParseOnly().config["fit"]
        arguments = config.model.init_args
        kinds[name] = (arguments.adapter and arguments.adapter.class_path.rpartition(".")[2], arguments.objective)
        assert arguments.optim.lr == 0.01 and config.seed_everything == 3 and config.data.init_args.others == ["logic"]
    assert kinds == {
        "SVF, reward": ("SVFConfig", "reward"),
        "LoRA r16, reward": ("LoraConfig", "reward"),
        "SVF, target": ("SVFConfig", "target"),
        "LoRA r16, target": ("LoraConfig", "target"),
        "IA3, reward": ("IA3Config", "reward"),
        "full, reward": (None, "reward"),
    }


def test_runs_that_fail_are_named_when_the_others_are_finished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=r"bad: UserError.*there is no task"):
        table.make_all([table.Run("bad", ("task=nothing",))], 1, tmp_path / "out")
