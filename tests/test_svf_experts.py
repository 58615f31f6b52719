"""Expert files, their algebra, export to LoRA, published files, and the command line."""

import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import relative
from peft import PeftModel, get_peft_model
from svf_models import CASES, Case, gpt2, llama
from test_svf_tuner import adapt, perturb, zs
from transformers import AutoModelForCausalLM

from svf import Expert, SVFConfig, experts
from svf.__main__ import main, parser
from svf.layers import SVFLayer


@pytest.fixture(params=["llama", "gpt2", "moe", "resnet", "ctm"])
def case(request):
    return CASES[request.param]()


def svf(*words):
    args = parser().parse_args(list(map(str, words)))
    args.run(args)


def two(case, folder, **settings):
    """A model with two random experts, saved."""
    model = adapt(case, "a", **settings)
    model.add_adapter("b", SVFConfig(**case.targets | settings))
    perturb(model, "a")
    perturb(model, "b", seed=2)
    model.save_pretrained(folder)
    return model


def test_a_file_is_an_expert(case, tmp_path):
    model = two(case, tmp_path)
    expert = Expert.load(tmp_path / "a")
    parameters = dict(case.model.named_parameters())
    for name, z in expert.z.items():
        module, _, parameter = name.rpartition(".")
        shape = next(parameters[n].shape for n in (name, f"{module}.base_layer.{parameter}") if n in parameters)
        assert z.shape[-1] == (min(shape[0], shape[1:].numel()) if len(shape) != 3 else min(shape[1:]))
    expert.save(tmp_path / "again")
    model.load_adapter(tmp_path / "again", "again")
    model.set_adapter("a")
    first = case(model)
    model.set_adapter("again")
    assert torch.equal(case(model), first)


def test_algebra_is_that_of_the_model(case, tmp_path):
    model = two(case, tmp_path, parametrization="exp")
    a, b = Expert.load(tmp_path / "a"), Expert.load(tmp_path / "b")
    results = {
        "sum": (a + b, [1, 1]),
        "difference": (a - b, [1, -1]),
        "scaled": (0.3 * a, [0.3, 0]),
        "between": (experts.interpolate(a, b, 0.25), [0.75, 0.25]),
    }
    for name, (expert, weights) in results.items():
        expert.save(tmp_path / name)
        model.load_adapter(tmp_path / name, name)
        model.add_weighted_adapter(["a", "b"], weights, f"{name} in the model")
        model.set_adapter(name)
        found = case(model)
        model.set_adapter(f"{name} in the model")
        assert relative(found, case(model)) < 1e-5
        assert (
            relative(
                experts.from_model(model, f"{name} in the model").z[next(iter(expert.z))], next(iter(expert.z.values()))
            )
            < 1e-5
        )


def test_algebra_by_layer(tmp_path):
    case = CASES["llama"]()
    two(case, tmp_path)
    a, b = Expert.load(tmp_path / "a"), Expert.load(tmp_path / "b")
    both = experts.mix([a, b], [{"*.layers.0.*": 2.0, "*": 0.0}, {"*.q_proj.*": 1.0, "*": 0.5}])
    for name, z in both.z.items():
        weight_a, weight_b = 2.0 * (".layers.0." in name), 1.0 if "q_proj" in name else 0.5
        assert torch.allclose(z, weight_a * a.z[name] + weight_b * b.z[name])
    with pytest.raises(ValueError, match=r"no pattern of \*.layers.0.\* matches"):
        a * {"*.layers.0.*": 1.0}


def test_experts_of_other_modules_add(tmp_path):
    case = Case(llama, target_modules=["q_proj", "up_proj"])
    model = adapt(case, "a")
    model.add_adapter("b", SVFConfig(target_modules=["up_proj", "down_proj"]))
    perturb(model, "a")
    perturb(model, "b", seed=2)
    model.save_pretrained(tmp_path)
    both = Expert.load(tmp_path / "a") + Expert.load(tmp_path / "b")
    assert both.config.basis_hash is None
    both.save(tmp_path / "both")
    model.base_model.set_adapter(["a", "b"])
    expected = case(model)
    model.load_adapter(tmp_path / "both", "both")
    model.set_adapter("both")
    assert relative(case(model), expected) < 1e-5


def test_refusals(tmp_path):
    case = CASES["llama"]()
    model = two(case, tmp_path)
    a = Expert.load(tmp_path / "a")
    other = Expert.load(tmp_path / "b")
    other.config.basis_hash = "0" * 64
    with pytest.raises(ValueError, match="different bases cannot be mixed"):
        a + other
    with pytest.raises(ValueError, match="different top_k are mixed on their base"):
        experts.mix([a, Expert(a.z, SVFConfig(top_k=4, basis_hash=a.config.basis_hash))], [1, 1])
    with pytest.raises(FileNotFoundError, match="is no expert: it has no adapter_config"):
        Expert.load(tmp_path)
    other.config.normalize = "nuclear"
    with pytest.raises(ValueError, match="add_weighted_adapter or svf"):
        other * 2.0
    with pytest.raises(ValueError, match="no adapter 'c'"):
        experts.from_model(model, "c")


@pytest.mark.parametrize("rank", [4, 32, 50])
@pytest.mark.parametrize("name", ["llama", "gpt2", "resnet"])
def test_export_is_the_best_lora(name, rank, tmp_path):
    """Of every change of a weight, LoRA gets the truncated SVD, and the energy that this keeps is what is said."""
    case = CASES[name]()
    model = adapt(case)
    perturb(model)
    expected = case(model)
    deltas = {
        layer.key: layer.as_matrix("weight", layer.get_delta_weight("default")).detach().double()
        for layer in model.modules()
        if isinstance(layer, SVFLayer)
    }
    kept = experts.export_lora(model, tmp_path, rank)
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    for key, delta in deltas.items():
        layer = again.base_model.model.get_submodule(key)
        ours = layer.get_delta_weight("default").double()
        ours = (ours.T if name == "gpt2" else ours.flatten(1)).detach()
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert relative(ours, best, at_least=1e-3) < 1e-4
        assert kept[key] == pytest.approx(float((s[:rank] ** 2).sum() / (s**2).sum()), rel=1e-4)
    if rank >= 32:
        assert relative(case(again), expected) < 1e-5
        assert min(kept.values()) == pytest.approx(1)


def test_export_refusals(tmp_path):
    model = adapt(CASES["moe"]())
    with pytest.raises(ValueError, match="cannot be exported to LoRA; merge"):
        experts.export_lora(model, tmp_path, 4)


def test_whole_modules_are_not_dropped_silently(tmp_path):
    model = get_peft_model(Case(llama).model, SVFConfig(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"also saves lm_head in full \(modules_to_save\)"):
        experts.export_lora(model, tmp_path / "lora", 4)
    with pytest.raises(ValueError, match=r"also saves lm_head in full \(modules_to_save\)"):
        experts.from_model(model)
    assert not (tmp_path / "lora").exists()


def checkpoint(make, folder):
    case = Case(make)
    case.model.save_pretrained(folder)
    return case


def test_commands(tmp_path, capsys):
    base, expert = tmp_path / "base", tmp_path / "expert"
    case = checkpoint(llama, base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base).eval(), SVFConfig(task_type="CAUSAL_LM"))
    perturb(model)
    expected = case(model)
    model.save_pretrained(expert)

    svf("merge", expert, tmp_path / "merged")
    assert relative(case(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected) < 1e-5

    svf("export", expert, tmp_path / "lora", "--rank", 32)
    said = capsys.readouterr().out
    assert "energy of the change kept: 100.00%" in said
    assert "model.layers.1.mlp.down_proj" in said
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).eval(), tmp_path / "lora")
    assert relative(case(lora), expected) < 1e-5

    svf("decompose", base, "--targets", "gate_proj", "up_proj", "down_proj", "--cache", tmp_path / "cache")
    assert model.peft_config["default"].basis_hash in capsys.readouterr().out


def test_a_merged_checkpoint_has_the_tokenizer_of_a_base_of_the_hub(tmp_path, monkeypatch):
    base, files = tmp_path / "base", ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.txt")
    case = checkpoint(llama, base)
    for file in files:
        (base / file).write_text(f"{{}} {file}")
    model = adapt(case)
    model.save_pretrained(tmp_path / "expert")
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = [file for file in files if any(fnmatch(file, pattern) for pattern in allow_patterns)]
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    svf("merge", tmp_path / "expert", tmp_path / "merged", "--base", "someone/base")
    assert asked == {"someone/base": list(files)}
    assert {file: (tmp_path / "merged" / file).read_text() for file in files} == {f: f"{{}} {f}" for f in files}


def test_published_files(tmp_path, capsys):
    case = checkpoint(llama, tmp_path / "base")
    order = ["gate_proj", "up_proj", "down_proj"]
    names = [f"model.layers.{i}.mlp.{name}.weight" for i in range(2) for name in order]
    logits = [(0.1 + 0.5 * torch.randn(32)).bfloat16() for _ in names]
    positional = torch.nn.ParameterList(torch.nn.Parameter(p) for p in logits)
    torch.save({f"learnable_params_module_list.{k}": v for k, v in positional.state_dict().items()}, tmp_path / "p.pt")
    named = {name: torch.nn.Parameter(p) for name, p in zip(names, logits, strict=True)}
    torch.save(named, tmp_path / "l.pt")
    outputs = []
    for file in ("p.pt", "l.pt"):
        svf("convert", tmp_path / file, tmp_path / file[0], "--base", tmp_path / "base")
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), tmp_path / file[0]
        )
        config = model.peft_config["default"]
        assert (config.parametrization, config.normalize) == ("sigmoid", "nuclear")
        assert config.target_modules == set(order)
        outputs.append(case(model))
    assert torch.equal(*outputs)
    state = case.model.state_dict()
    for name, p in named.items():  # the published composition, in fp64
        u, s, vh = torch.linalg.svd(state[name].double(), full_matrices=False)
        m = torch.sigmoid(p.double())
        state[name] = ((u * (s * m)) @ vh * s.sum() / (s * m).sum()).float()
    case.model.load_state_dict(state)
    assert relative(outputs[0], case()) < 1e-5

    torch.save({"learnable_params_module_list.0": logits[0]}, tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"has 1 vectors, the MLPs of .* have 6"):
        svf("convert", tmp_path / "short.pt", tmp_path / "x", "--base", tmp_path / "base")
    torch.save({names[0]: logits[0][:5]}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="has 32 singular values"):
        svf("convert", tmp_path / "odd.pt", tmp_path / "x", "--base", tmp_path / "base")


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = (Path(__file__).parent.parent / "README.md").read_text().split("## SVF adapters")[1].split("\n## ")[0]
    exec(section.split("```python\n")[1].split("```")[0], {})
    assert {path.name for path in (tmp_path / "experts").iterdir()} >= {"math", "code", "both"}


def test_errors_of_the_command_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["svf", "merge", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is no expert: it has no adapter_config.json\n"


def refusal(monkeypatch, capsys, *words):
    """What a command says that ends with exit code 2, in one line."""
    monkeypatch.setattr(sys, "argv", ["svf", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err.rpartition("\r")[2].splitlines(keepends=True)[-1]  # after the bars of Transformers
    assert end.value.code == 2
    assert said.startswith("error: ") and said.endswith("\n")
    return said.removeprefix("error: ").strip()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    """Not even by the merged model of the base itself."""
    base, expert = tmp_path / "base", tmp_path / "expert"
    case = checkpoint(llama, base)
    get_peft_model(case.model, SVFConfig(task_type="CAUSAL_LM")).save_pretrained(expert)
    torch.save({"model.layers.0.mlp.up_proj.weight": torch.zeros(32)}, tmp_path / "l.pt")
    (tmp_path / "empty").mkdir()
    before = contents(base), contents(expert)
    for words in (
        ("merge", expert, base, "--base", base),
        ("export", expert, expert, "--base", base),
        ("convert", tmp_path / "l.pt", expert, "--base", base),
        ("transfer", expert, expert, "--to", base),
    ):
        assert refusal(monkeypatch, capsys, *words) == f"{words[2]} is there already; give another folder"
    assert (contents(base), contents(expert)) == before
    svf("export", expert, tmp_path / "empty", "--base", base)
    assert (tmp_path / "empty" / "adapter_config.json").exists()


def test_whole_modules_are_merged_too(tmp_path, monkeypatch, capsys):
    """Also where the expert says its base itself; and what is not finite is not written."""
    case = checkpoint(llama, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(model, SVFConfig(modules_to_save=["lm_head"]))
    perturb(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path / "expert")
    expected = case(model)
    svf("merge", tmp_path / "expert", tmp_path / "merged")
    assert relative(case(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected) < 1e-5
    next(iter(zs(model).values())).data[0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    assert "merged with default is not finite" in refusal(
        monkeypatch, capsys, "merge", tmp_path / "nan", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_said(tmp_path, monkeypatch, capsys):
    base, expert, out = tmp_path / "base", tmp_path / "expert", tmp_path / "out"
    case = checkpoint(llama, base)
    get_peft_model(case.model, SVFConfig(task_type="CAUSAL_LM")).save_pretrained(expert)
    for path, words, said in (
        (tmp_path / "p.pt", ("convert", tmp_path / "p.pt", out, "--base", base), "is neither a policy_params.pt nor"),
        (expert / "adapter_model.safetensors", ("merge", expert, out, "--base", base), "is damaged"),
        (expert / "adapter_config.json", ("merge", expert, out, "--base", base), "is no configuration of an adapter"),
        (base / "model.safetensors", ("decompose", base), "is damaged"),
    ):
        path.write_bytes(b"junk")
        assert refusal(monkeypatch, capsys, *words).startswith(f"{path} {said}")
    torch.save([1, 2], tmp_path / "p.pt")
    assert "is neither a policy" in refusal(monkeypatch, capsys, "convert", tmp_path / "p.pt", out, "--base", base)
    assert "is no folder" in refusal(monkeypatch, capsys, "decompose", tmp_path / "nowhere")
    assert "is no regular expression" in refusal(monkeypatch, capsys, "decompose", base, "--targets", "(.*")
    assert "argument --rank: 0 is less than 1" in refusal(monkeypatch, capsys, "export", expert, out, "--rank", 0)
    assert not out.exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_file_is_no_base(there, tmp_path, monkeypatch, capsys):
    """The checkpoint of a CTM; also where the expert says it, and it is elsewhere."""
    case = CASES["ctm"]()
    model = adapt(case)
    model.save_pretrained(tmp_path / "expert")
    if there:
        (tmp_path / "maze.safetensors").touch()
    words = [
        "svf",
        "merge",
        str(tmp_path / "expert"),
        str(tmp_path / "out"),
        "--base",
        str(tmp_path / "maze.safetensors"),
    ]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'maze.safetensors'} names a file, not a folder")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_gpt2_merges_to_a_plain_checkpoint(tmp_path):
    case = checkpoint(gpt2, tmp_path / "base")
    model = adapt(case, target_modules="all-linear")
    perturb(model)
    expected = case(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert relative(case(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected) < 1e-5
    assert zs(model) == {}
