"""SVF as a PEFT method: identity, merging, saving, switching, targets, refusals, on every kind of model."""

import json
import re
import warnings
from collections import OrderedDict

import pytest
import torch
from conftest import relative
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from svf_models import CASES, Case, gpt2, llama, moe, thinker
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from svf import SVFConfig, spectral
from svf.layers import SVFLayer


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


FORMS = ["auto", "one_sided", "factored", "merged"]
every_form = pytest.mark.parametrize("form", ["auto", "factored", "merged"])  # auto is one_sided where there is that


def having(case, form):
    """The case with targets that can have the form."""
    if (case.name, form) == ("resnet", "factored"):
        pytest.skip("convolutions have no factored form")
    if form == "factored":
        case.targets.pop("target_parameters", None)
    return case


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def zs(model, adapter="default"):
    return {name: p for name, p in model.named_parameters() if "svf_z" in name and name.endswith(f".{adapter}")}


def perturb(model, adapter="default", by=0.3, seed=1):
    """Random z, so that an adapter changes something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for z in zs(model, adapter).values():
            z.add_(by * torch.randn(z.shape, generator=generator))


def adapt(case, adapter_name="default", **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(case.model, SVFConfig(**case.targets | settings), adapter_name=adapter_name).eval()


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@both_dtypes
@pytest.mark.parametrize("parametrization", ["residual", "exp"])
def test_identity_is_exact(case, dtype, parametrization):
    case.model.to(dtype)
    base = case()
    weights = {name: p.clone() for name, p in case.model.named_parameters()}
    model = adapt(case, parametrization=parametrization, normalize="none" if dtype == torch.bfloat16 else "nuclear")
    assert torch.equal(case(model), base)
    assert all(z.dtype == torch.float32 for z in zs(model).values())

    perturb(model)
    assert relative(case(model), base) > 1e-3
    with model.disable_adapter():
        assert torch.equal(case(model), base)
    model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(case(model), base)
    assert same_bits(weights, {name: p.clone() for name, p in model.unload().named_parameters()})


@every_form
def test_forms_agree_with_the_merged_model(case, form):
    model = adapt(having(case, form), form=form)
    perturb(model)
    adapted = case(model)
    model.merge_adapter()
    assert relative(case(model), adapted) < 1e-5
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert not any(isinstance(module, SVFLayer) for module in plain.modules())
    assert relative(case(plain), adapted) < 1e-5


@every_form
def test_forms_in_bf16(case, form):
    """Unmerged, merged and the gradients of z against fp32 arithmetic with the same weights and z, over draws of z."""
    case.model.to(torch.bfloat16)
    base = case()
    model = adapt(having(case, form), form=form)
    if form != "factored":
        assert torch.equal(case(model), base)
    outputs, grads, zero = ([], [], []), ([], []), {name: z.detach().clone() for name, z in zs(model).items()}
    for seed in range(4):
        model.load_state_dict(zero, strict=False)
        perturb(model, by=0.4, seed=seed)
        state = {name: p.detach().clone() for name, p in model.named_parameters() if "svf_" not in name}
        outputs[0].append(case(model).float())
        grads[0].append(gradients(outputs[0][-1], model))
        model.merge_adapter()
        outputs[1].append(case(model).float())
        model.unmerge_adapter()
        outputs[2].append(case(model.float()))
        grads[1].append(gradients(outputs[2][-1], model))
        model.to(torch.bfloat16)
        assert same_bits(state, {name: p for name, p in model.named_parameters() if "svf_" not in name})
    unmerged, merged, exact = (torch.stack(found) for found in outputs)
    assert relative(merged, exact) < 1.2 * relative(unmerged, exact)
    assert relative(unmerged, exact) < 0.01
    assert relative(base.expand_as(exact), exact) > 3 * relative(unmerged, exact)
    assert relative(*map(torch.stack, grads)) < 0.08


def gradients(out, model):
    """Of all z, in one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(out.square().sum(), list(zs(model).values()))])


@every_form
def test_gradients_of_z_are_those_of_the_formula(case, form):
    """dL/de_i = s_i u_i' G v_i with G the dense gradient of the weight, here by autograd through W'."""
    model = adapt(having(case, form), form=form)
    perturb(model, by=0.1)
    case(model).float().square().sum().backward()
    found = {name: z.grad.clone() for name, z in zs(model).items()}
    model.zero_grad()
    for expert in (e for layer in model.modules() if isinstance(layer, SVFLayer) for e in layer.experts.values()):
        expert.config.form = "merged"
    case(model).float().square().sum().backward()
    for name, z in zs(model).items():
        assert relative(found[name], z.grad, at_least=1e-4) < 1e-3, name


def test_a_form_that_a_layer_cannot_have_is_refused():
    def grouped():
        return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))

    for make, targets, forms in (
        (lambda: CASES["moe"]().model, {"target_parameters": ["experts.down_proj"]}, ["merged"]),
        (lambda: CASES["resnet"]().model, CASES["resnet"]().targets, ["one_sided", "merged"]),
        (grouped, {"target_modules": ["0"]}, ["merged"]),
        (lambda: CASES["llama"]().model, {}, ["one_sided", "factored", "merged"]),
    ):
        for form in FORMS[1:]:
            model, config = make(), SVFConfig(**targets, form=form)
            if form in forms:
                layers = list(get_peft_model(model, config).base_model.layers())
                assert {layer.form for layer in layers} == {form}
                continue
            names = set(model.state_dict())
            said = rf"cannot be computed with form='{form}', only with {' or '.join(forms)}; use form='auto'"
            with pytest.raises(ValueError, match=said):
                get_peft_model(model, config)
            assert set(model.state_dict()) == names
        layers = list(get_peft_model(make(), SVFConfig(**targets)).base_model.layers())
        assert {layer.form for layer in layers} == {forms[0]}


def test_a_mixture_of_experts_of_different_forms_is_auto():
    model = get_peft_model(CASES["resnet"]().model, SVFConfig(target_modules=["shortcut.convolution"]), "a")
    model.add_adapter("b", SVFConfig(target_modules=["shortcut.convolution"], form="merged"))
    model.add_weighted_adapter(["a", "b"], [1, 1], "both")
    model.add_weighted_adapter(["b", "b"], [1, 1], "same")
    assert (model.peft_config["both"].form, model.peft_config["same"].form) == ("auto", "merged")


@pytest.mark.parametrize("tokens", [5, 12, 40, 200])
@pytest.mark.parametrize("rows", [False, True], ids=["shared", "per-row"])
@pytest.mark.parametrize("bias", [False, True])
def test_rescaling_matches_autograd(tokens, rows, bias):
    """The three ways of `spectral.rescale` (two products, scaled Q, folded), against plain autograd in fp64."""
    torch.manual_seed(tokens)
    q = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0][:, :17].contiguous()
    x = torch.randn(2, tokens, 24, dtype=torch.float64, requires_grad=True)
    d = torch.randn(*((2, 1, 17) if rows else (17,)), dtype=torch.float64, requires_grad=True)
    b = torch.randn(24, dtype=torch.float64, requires_grad=True) if bias else None
    upstream = torch.randn_like(x)
    inputs = [x, d] + ([b] if bias else [])
    expected = x + (((x - (b if bias else 0)) @ q) * d) @ q.T
    wanted = torch.autograd.grad(expected, inputs, upstream)
    found = spectral.rescale(x, q, d, b)
    assert relative(found, expected) < 1e-12
    for ours, theirs in zip(torch.autograd.grad(found, inputs, upstream), wanted, strict=True):
        assert relative(ours, theirs) < 1e-6  # d's gradient is accumulated in fp32


@both_dtypes
def test_saved_and_loaded(case, dtype, tmp_path):
    case.model.to(dtype)
    model = adapt(case)
    perturb(model)
    adapted = case(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all("svf_z" in name and tensor.dtype == torch.float32 for name, tensor in tensors.items())
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(z.numel() for z in zs(model).values())
    base = model.unload()
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(base, tmp_path, **options)
        assert torch.equal(case(again), adapted)
        base = again.unload()


def test_several_adapters(case, tmp_path):
    model = adapt(case)
    perturb(model)
    first = case(model)
    model.add_adapter("other", SVFConfig(**case.targets))
    perturb(model, "other", seed=2)
    assert torch.equal(case(model), first)
    model.set_adapter("other")
    other = case(model)
    assert relative(other, first) > 1e-3
    assert all(p.requires_grad == name.endswith(".other") for name, p in model.named_parameters())

    model.base_model.set_adapter(["default", "other"])
    together = case(model)
    model.merge_adapter()
    assert relative(case(model), together) < 1e-5
    model.unmerge_adapter()

    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert not zs(model, "other")
    assert torch.equal(case(model), first)
    model.load_adapter(tmp_path / "other", "again")
    model.set_adapter("again")
    assert torch.equal(case(model), other)


def test_weighted_adapter(case):
    model = adapt(case, parametrization="exp")
    perturb(model, by=0.1)
    model.add_adapter("other", SVFConfig(**case.targets, parametrization="sigmoid", normalize="nuclear"))
    first = case(model)
    model.add_weighted_adapter(["default", "other"], [1.0, 0.0], "one")
    model.add_weighted_adapter(["default", "other"], [0.0, 0.0], "none")
    model.add_weighted_adapter(["default", "other"], [0.4, 0.6], "both")
    model.set_adapter("one")
    assert relative(case(model), first) < 1e-5
    model.set_adapter("none")
    with model.disable_adapter():
        base = case(model)
    assert torch.equal(case(model), base)
    layer = next(layer for layer in model.modules() if isinstance(layer, SVFLayer))
    name = layer.names()[0]
    expected = 0.4 * layer.shift_of("default", name) + 0.6 * layer.shift_of("other", name)
    assert torch.allclose(layer.shift_of("both", name), expected)
    assert model.peft_config["both"].parametrization == "residual"


@pytest.mark.parametrize("parametrization", ["residual", "exp", "sigmoid"])
@pytest.mark.parametrize("normalize", ["nuclear", "fro"])
def test_a_normalisation_keeps_its_norm(normalize, parametrization):
    """e in proportion to what it is without one; the sum of singular values, or of their squares, stays."""
    torch.manual_seed(0)
    plain = nn.Linear(12, 20)
    u, s, vh = torch.linalg.svd(plain.weight.detach().double(), full_matrices=False)
    z = 0.3 * torch.randn(12)
    e = {"residual": 1 + z, "exp": z.exp(), "sigmoid": 2 * z.sigmoid()}[parametrization].double()
    c = (s.sum() / (e * s).sum()) if normalize == "nuclear" else s.norm() / (e * s).norm()
    config = SVFConfig(target_modules=["0"], parametrization=parametrization, normalize=normalize, max_mult=2.0)
    model = get_peft_model(nn.Sequential(plain), config)
    with torch.no_grad():
        model.base_model.model[0].svf_z["default"].copy_(z)
    merged = model.merge_and_unload()[0].weight.detach()
    assert relative(merged, (u * (c * e * s)) @ vh) < 1e-5
    values = torch.linalg.svdvals(merged.double())
    order = {"nuclear": 1, "fro": 2}[normalize]
    assert float(values.norm(order)) == pytest.approx(float(s.norm(order)), rel=1e-5)


def test_a_merge_that_is_not_finite_is_refused():
    case = CASES["llama"]()
    model = adapt(case, target_modules="all-linear")
    layer = case.model.model.layers[0].mlp.up_proj
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.svf_z["default"][3] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj merged with default is not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged


def test_trains_under_the_trainer_of_transformers(tmp_path):
    """What its checkpoint holds is the expert, and training goes on from it."""
    case = CASES["llama"]()
    model = get_peft_model(case.model, SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = [{"input_ids": row, "labels": row} for row in case.inputs[0]]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, learning_rate=0.05, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_steps=1, seed=0,
    )  # fmt: skip
    before = {name: p.clone() for name, p in model.named_parameters() if "svf_" not in name}
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    expert = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert expert.keys() == {name.replace(".default", "") for name in zs(model)}
    assert not (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    ended = {name: z.detach().clone() for name, z in zs(model).items()}
    Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(relative(z, ended[name], 1e-3) < 1e-4 for name, z in zs(model).items())


def test_published_space():
    """Means of sigmoids, normalised once."""
    case = CASES["llama"]()
    settings = {"parametrization": "sigmoid", "normalize": "nuclear", "init_std": 1.0}
    model = adapt(case, **settings)
    model.add_adapter("other", SVFConfig(**case.targets, **settings))
    model.add_weighted_adapter(["default", "other"], [0.3, 0.5], "mean", space="published")
    layer = next(layer for layer in model.modules() if isinstance(layer, SVFLayer))
    m = 0.3 * layer.svf_z["default"].sigmoid() + 0.5 * layer.svf_z["other"].sigmoid()
    s = layer.svf_values
    assert torch.allclose(1 + layer.shift_of("mean"), m * s.sum() / (s * m).sum(), atol=1e-5)
    model.add_adapter("residual", SVFConfig(**case.targets))
    with pytest.raises(ValueError, match="published space mixes sigmoid experts"):
        model.add_weighted_adapter(["default", "residual"], [1, 1], "x", space="published")


def test_weighted_adapter_refusals():
    model = adapt(CASES["llama"]())
    with pytest.raises(ValueError, match="no adapter 'othr'"):
        model.add_weighted_adapter(["default", "othr"], [1, 1], "x")
    with pytest.raises(ValueError, match="as many weights"):
        model.add_weighted_adapter(["default"], [1, 1], "x")
    with pytest.raises(ValueError, match="already"):
        model.add_weighted_adapter(["default"], [1], "default")


def test_unknown_names_are_refused():
    case = Case(llama, target_modules=["q_proj"])
    model = adapt(case, "a")
    model.add_adapter("b", SVFConfig(**case.targets))
    for ask in (
        lambda: model.base_model.set_adapter("typo"),
        lambda: model.base_model.set_adapter(["a", "typo"]),
        lambda: model.merge_adapter(["typo"]),
        lambda: model.set_requires_grad(["typo"]),
        lambda: model.merge_and_unload(adapter_names=["typo"]),
    ):
        with pytest.raises(ValueError, match=r"^there is no adapter 'typo'; there are a, b$"):
            ask()
    assert len(zs(model, "b")) == 2
    places = {f"model.layers.{i}.self_attn.q_proj": i for i in range(2)}
    message = r"no adapted layer 'typo'; there are model\.layers\.0\.self_attn\.q_proj, "
    with pytest.raises(ValueError, match=message), model.mix(torch.zeros(3, 2), layers=places | {"typo": 2}):
        pass


def test_only_z_learns(case):
    model = adapt(case).train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(zs(model))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        loss = case(model).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("form", ["one_sided", "factored", "merged"])
def test_golden_compose(golden, form):
    stored = golden("svf_compose")
    for number in "012":
        case = stored.under(f"{number}.")
        n_out, n_in = case["weight"].shape
        linear = nn.Sequential(nn.Linear(n_in, n_out, bias=False))
        linear[0].weight.data = case["weight"].clone()
        config = SVFConfig(
            target_modules=["0"],
            parametrization="sigmoid",
            normalize="nuclear",
            max_mult=float(case["max_mult"]),
            form=form,
        )
        model = get_peft_model(linear, config)
        layer = model.base_model.model[0]
        z = layer.svf_z["default"]
        z.data = case["raw"].clone()
        assert relative(model(case["x"]), case["y"]) < 1e-5
        assert relative(layer.parameter("weight") + layer.get_delta_weight("default"), case["weight_new"]) < 1e-5
        # inputs e_j with the upstream gradient of W' e_j: the gradient of sum(W' * grad_output)
        (model(torch.eye(n_in)) * case["grad_output"].T).sum().backward()
        assert relative(z.grad, case["grad_raw"]) < 1e-5


LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_8B |= {"num_key_value_heads": 8, "vocab_size": 128256}
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["q_proj", "v_proj"], 163_840), (MLP, 393_216), (["q_proj", "v_proj", *MLP], 557_056), ("all-linear", 720_896)],
    ids=["qv", "mlp", "both", "all"],
)
def test_counts_of_llama_3_8b(targets, count):
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**LLAMA_8B)), SVFConfig(target_modules=targets))
    assert model.get_nb_trainable_parameters()[0] == count
    with pytest.raises(RuntimeError, match=r"meta device; call model.decompose\(\)"):
        layer = next(layer for layer in model.modules() if isinstance(layer, SVFLayer))
        layer.shift_of("default")


def test_expert_file_of_the_mlp_set_is_small(tmp_path):
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**LLAMA_8B)), SVFConfig())
    state = {name: torch.zeros(z.shape) for name, z in zs(model).items()}
    model.save_pretrained(tmp_path, state_dict=state)
    assert sum(f.stat().st_size for f in tmp_path.glob("adapter_*")) < 1_700_000


def test_a_base_from_meta_is_decomposed_later():
    torch.manual_seed(0)
    full = llama()
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(full.config), SVFConfig())
    model.base_model.model.to_empty(device="cpu")
    state = full.state_dict()
    state = {k.replace("_proj.weight", "_proj.base_layer.weight") if ".mlp." in k else k: v for k, v in state.items()}
    missing, _ = model.base_model.model.load_state_dict(state, strict=False)
    assert all("svf_z" in name for name in missing)
    with torch.no_grad():
        for z in zs(model).values():
            z.zero_()
    model.decompose()
    ids = torch.randint(64, (2, 5))
    model.base_model.model.model.rotary_emb = full.model.rotary_emb
    assert torch.equal(model(input_ids=ids).logits, full(input_ids=ids).logits)


# What is adapted


def test_top_k(case):
    model = adapt(case, top_k=3)
    assert all(z.shape[-1] <= 3 for z in zs(model).values())
    perturb(model)
    adapted = case(model)
    for form in ("factored", "merged"):
        for layer in model.modules():
            if isinstance(layer, SVFLayer):
                layer.experts["default"].config.form = form if form in layer.forms() else "auto"
        assert relative(case(model), adapted) < 1e-5
    model.add_adapter("all", SVFConfig(**case.targets))
    perturb(model, "all")
    assert relative(case(model), adapted) < 1e-5
    model.base_model.set_adapter(["default", "all"])
    both = case(model)
    assert relative(case(model.merge_and_unload()), both) < 1e-5


def test_targets():
    def adapted(**settings):
        model = get_peft_model(llama(), SVFConfig(**settings))
        return sorted(layer.key for layer in model.modules() if isinstance(layer, SVFLayer))

    assert len(adapted()) == 6  # the MLP of both layers
    assert adapted(target_modules=["up_proj"], layers_to_transform=[1]) == ["model.layers.1.mlp.up_proj"]
    assert adapted(target_modules=r".*\.0\..*q_proj") == ["model.layers.0.self_attn.q_proj"]
    assert len(adapted(target_modules="all-linear")) == 14
    upper = adapted(target_modules="all-linear", layers_to_transform=[1], exclude_modules=["v_proj"])
    assert len(upper) == 6
    assert all(".layers.1." in key for key in upper)
    assert len(adapted(target_modules="all-linear", exclude_modules=["q_proj"])) == 12
    with pytest.raises(ValueError, match="layers_to_transform needs"):
        SVFConfig(target_modules="x", layers_to_transform=[0])
    with pytest.raises(ValueError, match="parametrization='cubic' is none of residual, exp, sigmoid"):
        SVFConfig(parametrization="cubic")
    with pytest.raises(ValueError, match="decomposition has no option 'cahce'"):
        SVFConfig(decomposition={"cahce": False})
    with pytest.raises(ValueError, match="give target_modules"):
        get_peft_model(thinker(), SVFConfig())
    with pytest.raises(ValueError, match="Embedding; SVF adapts"):
        adapted(target_modules=["embed_tokens"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"top_k": 2.5}, "top_k=2.5 must be a whole number"),
        ({"top_k": 0}, "top_k=0 must be a whole number"),
        ({"parametrization": "sigmoid", "max_mult": 0.0}, "max_mult=0.0 must be a finite number above 0"),
        ({"init": float("nan")}, "init=nan must be a finite number"),
        ({"init_std": -1.0}, "init_std=-1.0 must be a finite number"),
        ({"target_modules": "(.*"}, "is no regular expression"),
        ({"exclude_modules": "(["}, "is no regular expression"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        SVFConfig(**settings)


def test_a_weight_that_is_not_finite_is_refused():
    for value in (torch.nan, -torch.inf):
        model = nn.Sequential(nn.Linear(4, 6))
        with torch.no_grad():
            model[0].weight[2, 1] = value
        with pytest.raises(ValueError, match=r"^0\.weight has values that are not finite"):
            get_peft_model(model, SVFConfig(target_modules=["0"]))
        assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("normalize", ["nuclear", "fro"])
def test_a_weight_of_zeros_has_no_norm_to_keep(normalize):
    """Branches start at zero in many models."""
    model = nn.Sequential(nn.Linear(4, 6))
    nn.init.zeros_(model[0].weight)
    model = get_peft_model(model, SVFConfig(target_modules=["0"], parametrization="sigmoid", normalize=normalize))
    layer, x = model.base_model.model[0], torch.randn(3, 4)
    assert torch.equal(layer.shift_of("default"), layer.svf_z["default"].sigmoid() - 1)
    assert torch.equal(model(x), layer.base_layer.bias.expand(3, 6))
    model(x).sum().backward()
    assert torch.equal(layer.svf_z["default"].grad, torch.zeros(4))


def test_modules_to_save(tmp_path):
    case = Case(llama)
    model = get_peft_model(case.model, SVFConfig(modules_to_save=["lm_head"]))
    perturb(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    adapted = case(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(case(PeftModel.from_pretrained(model.unload(), tmp_path)), adapted)


def test_kinds_of_linear_layers():
    """A subclass is adapted where it computes what a linear layer does."""

    class Same(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.warns(UserWarning, match="Scaled is more than a linear layer"):
        model = get_peft_model(nn.Sequential(Same(6, 4), Scaled(4, 4)), SVFConfig(target_modules="all-linear"))
    assert [layer.key for layer in model.base_model.layers()] == ["0"]


def test_computed_weights_are_left_alone():
    """Merging into one would change nothing."""
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        model = nn.Sequential(OrderedDict(normed=norm(nn.Linear(4, 4)), plain=nn.Linear(4, 4)))
        with pytest.warns(UserWarning, match=r"normed \(its weight is computed in every forward\)"):
            model = get_peft_model(model, SVFConfig(target_modules=["normed", "plain"]))
        assert [layer.key for layer in model.base_model.layers()] == ["plain"]


class Reader(nn.Module):
    """Reads the weight of one child, looks at the dtype of another."""

    def __init__(self):
        super().__init__()
        self.read, self.fine, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5, bias=False)
        self.embed = nn.Embedding(5, 8)
        self.head.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        x = x.to(self.fine.weight.dtype)
        x = self.fine(x) @ self.read.weight
        return self.head(self.attention(x, x, x)[0])


def test_what_is_left_alone_is_said():
    model = Reader()
    with pytest.warns(UserWarning, match="SVF left alone") as told:
        model = get_peft_model(model, SVFConfig(target_modules="all-linear"))
    text = str(next(w.message for w in told if "left alone" in str(w.message)))
    assert "read (Reader reads its weight itself)" in text
    assert "head (tied: its weight is" in text
    assert "attention.out_proj (MultiheadAttention reads its weight itself)" in text
    assert [layer.key for layer in model.modules() if isinstance(layer, SVFLayer)] == ["fine"]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no target of adapter"):
        get_peft_model(Reader(), SVFConfig(target_modules=["read"]))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.above, self.proj, self.free = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        alias = self.proj
        weight = alias.weight
        return self.free(self.above(F.linear(x, weight)))


class Outer(nn.Module):
    """Reads weights of its parts in every way that code does; looks at others."""

    def __init__(self):
        super().__init__()
        self.block, self.blocks = Inner(), nn.ModuleList([Inner(), Inner()])
        self.tower = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.rows = nn.ModuleDict({"a": nn.Linear(4, 4)})
        self.first, self.second, self.third, self.seen, self.handed = (nn.Linear(4, 4) for _ in range(5))

    @property
    def fused(self):
        a, b = self.first, (self.second if self.training else self.third)
        return torch.cat([a.weight.data, b.weight])

    def forward(self, x):
        seen = self.seen.weight
        if seen is not None and isinstance(seen, torch.Tensor) and x.dtype != seen.dtype:
            x = x.to(seen.device, self.seen.weight.dtype)
        for i, block in enumerate(self.blocks):
            x = x + i * block.above.weight.sum()
        for row in self.rows.values():
            x = F.linear(x, row.weight, row.bias)
        x = self.block(x) @ self.block.above.weight @ self.tower[0].weight
        return self.product(self.seen(x), part=self.handed) @ self.fused.T

    def product(self, x, part):
        return x @ part.weight

    def reset_parameters(self):
        nn.init.zeros_(self.seen.weight)


def test_weights_that_are_read_from_anywhere_above_are_left_alone():
    """By another name, by index, in a loop, in a property, by a module two steps above, handed to another method."""
    linear = {name for name, module in Outer().named_modules() if isinstance(module, nn.Linear)}
    for targets in ({"target_modules": "all-linear"}, {"target_parameters": sorted(f"{n}.weight" for n in linear)}):
        model = Outer()
        with pytest.warns(UserWarning, match="SVF left alone") as told:
            model = get_peft_model(model, SVFConfig(**targets))
        adapted = {layer.key for layer in model.base_model.layers()}
        free = {"block.free", "blocks.0.free", "blocks.1.free", "tower.2", "seen"}
        assert adapted == free
        text = str(next(w.message for w in told if "left alone" in str(w.message)))
        said = dict(re.findall(r"([\w.]+?)(?:\.weight)? \((\w+) reads its weight itself\)", text))
        assert said.keys() == linear - free
        assert {name for name, by in said.items() if by == "Inner"} == {"block.proj", "blocks.0.proj", "blocks.1.proj"}
        assert set(said.values()) == {"Inner", "Outer"}


def test_parameters_that_are_left_alone_are_said():
    """As modules are: a wrapper around a weight that another module reads would do nothing."""
    names = ["fine.weight", "read.weight", "attention.out_proj.weight", "head.weight"]
    model = Reader()
    with pytest.warns(UserWarning, match="SVF left alone") as told:
        model = get_peft_model(model, SVFConfig(target_parameters=names))
    text = str(next(w.message for w in told if "left alone" in str(w.message)))
    assert "read.weight (Reader reads its weight itself)" in text
    assert "attention.out_proj.weight (MultiheadAttention reads its weight itself)" in text
    assert "head.weight (tied: its weight is" in text
    assert [layer.key for layer in model.modules() if isinstance(layer, SVFLayer)] == ["fine"]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no target of adapter"):
        get_peft_model(llama(tie_word_embeddings=True), SVFConfig(target_parameters=["lm_head.weight"]))


def test_composes_with_lora(tmp_path):
    """SVF over a LoRA-merged base, and LoRA over an SVF-merged one; a live LoRA layer is left alone."""
    case = Case(llama)
    lora = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    base = get_peft_model(case.model, lora).merge_and_unload()
    merged = case(base)
    model = get_peft_model(base, SVFConfig())
    assert torch.equal(case(model), merged)
    perturb(model)
    adapted = case(model)
    model.save_pretrained(tmp_path)
    plain = model.merge_and_unload()
    assert relative(case(plain), adapted) < 1e-5
    over = get_peft_model(plain, lora)
    assert relative(case(over), adapted) > 1e-2
    with pytest.raises(ValueError, match="was made for"):  # the merged weights are another base
        PeftModel.from_pretrained(over.unload(), tmp_path)
    live = get_peft_model(llama(), lora).base_model.model
    with pytest.warns(UserWarning, match="adapted already by lora"):
        get_peft_model(live, SVFConfig(target_modules=["up_proj", "down_proj"]))


def test_refuses_another_base(tmp_path):
    case = Case(llama)
    model = adapt(case)
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(said["basis_hash"]) == 64
    assert "decomposition" not in said
    other = Case(llama, target_modules=MLP).model
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"expert 'default' was made for .* this base is"):
        PeftModel.from_pretrained(other, tmp_path)
    config = SVFConfig.from_pretrained(tmp_path)
    config.check_basis = False
    PeftModel.from_pretrained(Case(llama).model, tmp_path, config=config)


def test_a_refused_adapter_leaves_nothing(tmp_path):
    """Neither z in layers that were there, nor layers of its own; and its name is free."""
    case = Case(llama, target_modules=["q_proj", "up_proj"])
    model = adapt(case, "a")
    perturb(model, "a")
    model.save_pretrained(tmp_path)
    case = Case(llama, target_modules=["q_proj"])
    with torch.no_grad():
        case.model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-3
    model = adapt(case, "b")
    names, expected = set(model.state_dict()), case(model)
    with pytest.raises(ValueError, match="expert 'a' was made for"):
        model.load_adapter(tmp_path / "a", "a")
    assert zs(model, "a") == {}
    assert set(model.state_dict()) == names
    assert list(model.peft_config) == ["b"]
    assert model.active_adapters == ["b"]
    assert torch.equal(case(model), expected)
    model.add_adapter("a", SVFConfig(target_modules=["q_proj"]))
    assert len(zs(model, "a")) == 2


def test_z_stays_fp32_in_a_cast_model():
    case = Case(llama)
    model = adapt(case)
    perturb(model)
    before = {name: z.clone() for name, z in zs(model).items()}
    model.to(torch.bfloat16)
    assert same_bits(before, zs(model))
    assert case(model).dtype == torch.bfloat16


def test_bf16_merged_is_as_good_as_unmerged():
    """Both against fp32 arithmetic with the same weights and z."""
    case = Case(lambda: llama(hidden_size=64, intermediate_size=160, num_hidden_layers=4), rows=16)
    case.model.to(torch.bfloat16)
    model = adapt(case, target_modules="all-linear")
    perturb(model, by=0.1)
    low = case(model)
    model.merge_adapter()
    merged = case(model)
    model.unmerge_adapter()
    exact = case(model.float())
    errors = [float((out.float() - exact).square().mean().sqrt()) for out in (merged, low)]
    assert errors[0] < 1.2 * errors[1], errors


def test_autocast():
    case = Case(llama)
    with torch.autocast("cpu", torch.bfloat16):
        base = case()
        model = adapt(case)
        assert torch.equal(case(model), base)
        perturb(model)
        case(model).float().sum().backward()
    assert all(z.grad.dtype == torch.float32 and z.grad.abs().sum() > 0 for z in zs(model).values())


def test_pickles_and_copies():
    import copy
    import io

    case = Case(llama)
    model = adapt(case)
    perturb(model)
    adapted = case(model)
    assert torch.equal(case(copy.deepcopy(model)), adapted)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(case(torch.load(file, weights_only=False)), adapted)


def test_gpt2_conv1d_is_transposed():
    case = Case(gpt2, target_modules=["c_attn"])
    model = adapt(case)
    layer = next(layer for layer in model.modules() if isinstance(layer, SVFLayer))
    assert (layer.in_features, layer.out_features) == (32, 96)
    s = torch.linalg.svdvals(layer.base_layer.weight.double())
    assert torch.allclose(layer.svf_values.double(), s, atol=1e-5)


def test_experts_have_their_own_z():
    case = Case(moe, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = adapt(case)
    shapes = {name.split("svf_z_")[1]: tuple(z.shape) for name, z in zs(model).items() if ".layers.0." in name}
    assert shapes == {"gate_up_proj.default": (4, 32), "down_proj.default": (4, 24)}
    perturb(model)
    adapted = case(model)
    layer = next(layer for layer in model.modules() if isinstance(layer, SVFLayer))
    e = 1 + layer.z("down_proj")["default"][2]
    u, s, vh = torch.linalg.svd(layer.base_layer.down_proj[2].double(), full_matrices=False)
    model.merge_adapter()
    merged = layer.base_layer.down_proj[2]
    assert relative(merged, (u * s * e.double()) @ vh) < 1e-5
    assert relative(case(model), adapted) < 1e-5


def test_import_needs_no_lightning():
    import subprocess
    import sys

    code = (
        "import sys, svf; assert 'lightning' not in sys.modules; from peft import PeftType; print(PeftType.SVF.value)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "SVF"
