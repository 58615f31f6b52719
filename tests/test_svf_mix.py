"""Mixtures of experts per row and token: against one by one, in training, checkpointed, in generate, refusals."""

import pytest
import torch
from conftest import relative
from peft import get_peft_model
from svf_models import CASES, Case, llama
from test_svf_tuner import adapt, every_form, having, perturb, zs
from torch import nn

from svf import SVFConfig


def experts(case, names=("a", "b", "c"), **settings):
    model = adapt(case, names[0], **settings)
    for name in names[1:]:
        model.add_adapter(name, SVFConfig(**case.targets | settings))
    for seed, name in enumerate(names):
        perturb(model, name, seed=seed)
    return model


@pytest.fixture(params=CASES)
def case(request):
    """With targets whose rows can be mixed: no whole weights."""
    case = CASES[request.param]()
    case.targets.pop("target_parameters", None)
    return case


def alone(case, model, row):
    """The output of one row by itself."""
    inputs = case.inputs
    case.inputs = tuple(x[row : row + 1] for x in inputs)
    try:
        return case(model)
    finally:
        case.inputs = inputs


@every_form
def test_rows_are_as_one_by_one(case, form):
    model = experts(having(case, form), form=form)
    with model.mix(torch.eye(3)):
        together = case(model)
    for row, name in enumerate("abc"):
        model.set_adapter(name)
        assert relative(together[row : row + 1], alone(case, model, row)) < 1e-5
    model.add_weighted_adapter(["a", "b", "c"], [0.2, -0.3, 0.8], "abc")
    model.set_adapter("abc")
    expected = case(model)
    weights = torch.tensor([0.2, -0.3, 0.8, 0.0])
    with model.mix(weights):
        assert relative(case(model), expected) < 1e-5
    with model.mix({"c": 0.8, "a": 0.2, "b": -0.3}):
        assert relative(case(model), expected) < 1e-5
    with model.mix(weights.expand(3, 4)):
        assert relative(case(model), expected) < 1e-5


@pytest.mark.parametrize("kind", ["alike", "truncated", "normalised", "trained", "by parametrization"])
def test_mixtures_made_for_all_layers_at_once(case, kind):
    """Without gradients: the same as layer by layer, of the z of now, for whatever layers that can be done."""
    model = experts(case)
    if kind in ("truncated", "normalised", "by parametrization"):
        settings = {"truncated": {"top_k": 3}, "normalised": {"normalize": "fro"}}.get(kind, {"parametrization": "exp"})
        model.delete_adapter("c")
        model.add_adapter("c", SVFConfig(**case.targets | settings))
        perturb(model, "c", by=0.2, seed=3)
    model.requires_grad_(False)
    if kind == "trained":
        next(iter(zs(model, "b").values())).requires_grad_(True)
    for weights in (torch.tensor([0.2, -0.3, 0.8]), torch.rand(3, 3)):
        for _ in range(2):
            with model.mix(weights):
                expected = case(model)  # with gradients every layer makes its own
                with torch.no_grad():
                    assert relative(case(model), expected) < 1e-6
                made = model.base_model.mixing.wanted.together[len(weights) if weights.ndim > 1 else None]
            sizes = [layer.basis("weight").shape[-1] for layer in model.base_model.layers()]
            number = {"truncated": sum(k <= 3 for k in sizes), "normalised": 0, "trained": len(sizes) - 1}
            assert len(made) == number.get(kind, len(sizes))
            perturb(model, "a", by=0.1, seed=4)


def test_zero_weights_are_the_base(case):
    model = experts(case)
    with model.disable_adapter():
        base = case(model)
    with model.mix(torch.zeros(3, 3)):
        found = case(model)
    # rows of their own take a CTM off its fast path, which rounds otherwise
    assert torch.equal(found, base) if case.name != "thinker" else relative(found, base) < 1e-6


@every_form
def test_rows_in_bf16(case, form):
    """Each as its own expert alone, and far from the others; mixed ones as good as one mixture for all, in bf16."""
    case.model.to(torch.bfloat16)
    model = experts(having(case, form), form=form)
    for seed, name in enumerate("abc"):
        perturb(model, name, by=1.0, seed=seed + 10)
    with model.mix(torch.eye(3)):
        together = case(model)
    for row in range(3):
        distances = []
        for name in "abc":
            model.set_adapter(name)
            distances.append(relative(together[row : row + 1], alone(case, model, row)))
        own = distances.pop(row)
        assert own < 0.03 and own < 0.3 * min(distances), (own, distances)
    weights = torch.tensor([[0.3, 0.1, -0.2], [0.0, 0.5, 0.2], [0.2, -0.1, 0.4]])
    with model.mix(weights):
        mixed = case(model)
    outputs = []
    for row in range(3):
        with model.mix(weights[row]):
            outputs.append(alone(case, model, row))
    model.float()
    with model.mix(weights):
        exact = case(model)
    assert relative(mixed, exact) < 1.6 * relative(torch.cat(outputs), exact)


@pytest.mark.parametrize("name", ["moe", "ctm"])
def test_whole_weights_take_one_mixture(name):
    case = CASES[name]()
    model = experts(case)
    with model.mix(torch.eye(3)), pytest.raises(ValueError, match="rows cannot be mixed; use one active adapter"):
        case(model)
    with model.mix({"b": 1.0}):
        one = case(model)
    model.set_adapter("b")
    assert relative(one, case(model)) < 1e-6
    model.add_weighted_adapter(["a", "c"], [0.3, 0.6], "ac")
    model.set_adapter("ac")
    with model.mix({"a": 0.3, "c": 0.6}):
        one = case(model)
    assert relative(one, case(model)) < 1e-5


def test_tokens():
    case = CASES["llama"]()
    model = experts(case)
    weights = torch.rand(3, 9, 3)
    with model.mix(weights):
        full = case(model)
    # causal: the first tokens do not depend on later ones
    for tokens in (1, 4):
        short = Case(llama)
        short.inputs = (case.inputs[0][:, :tokens],)
        with model.mix(weights[:, :tokens]):
            assert relative(short(model), full[:, :tokens]) < 1e-5
    with model.mix(weights[:, :1].expand(3, 9, 3)):
        by_token = case(model)
    with model.mix(weights[:, 0]):
        assert relative(case(model), by_token) < 1e-5


class Flattened(nn.Module):
    """Puts rows and tokens into one axis in between."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 6)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.flatten(0, 1)))).view(*x.shape[:2], -1)


def test_flattened_rows():
    torch.manual_seed(0)
    model = get_peft_model(Flattened(), SVFConfig(target_modules="all-linear"), "a")
    model.add_adapter("b", SVFConfig(target_modules="all-linear"))
    perturb(model, "a")
    perturb(model, "b", seed=2)
    x = torch.randn(2, 5, 8)
    with model.mix(torch.eye(2)):
        both = model(x)
    with model.mix(torch.eye(2)[:, None].expand(2, 5, 2)):
        assert relative(model(x), both) < 1e-6
    for row, name in enumerate("ab"):
        model.set_adapter(name)
        assert relative(both[row], model(x)[row]) < 1e-6


def test_adapter_names():
    case = CASES["llama"]()
    model = experts(case)
    ids = case.inputs[0]
    found = model(input_ids=ids, adapter_names=["b", "__base__", "a"]).logits
    with model.mix(torch.tensor([[0.0, 1, 0], [0, 0, 0], [1, 0, 0]])):
        assert torch.equal(case(model), found)
    with pytest.raises(ValueError, match="no adapter 'd'"):
        model(input_ids=ids, adapter_names=["a", "d", "a"])
    with pytest.raises(ValueError, match="must be given to the PEFT model"):
        model.base_model.model(input_ids=ids, adapter_names=["a", "b", "a"])
    model.train()  # in training too
    model(input_ids=ids, adapter_names=["b", "__base__", "a"]).logits.sum().backward()


def test_refusals():
    case = CASES["llama"]()
    model = experts(case)
    with pytest.raises(ValueError, match="no adapter 'd'"), model.mix({"d": 1.0}):
        pass
    with pytest.raises(ValueError, match="do not fit 3 experts"), model.mix(torch.ones(3, 2)):
        pass
    for weights in ("a", [[1, 0, 0], [1]]):
        with pytest.raises(ValueError, match="are neither numbers nor a dict of them by expert"), model.mix(weights):
            pass
    with pytest.raises(ValueError, match="are not all finite"):
        model.add_weighted_adapter(["a", "b"], [torch.nan, 1.0], "ab")
    with model.mix(torch.ones(2, 3)), pytest.raises(ValueError, match="weights for 2 rows, the batch has 3"):
        case(model)
    with model.mix(torch.ones(3, 4, 3)), pytest.raises(ValueError, match="weights for 4 tokens a row, the batch has 9"):
        case(model)
    with model.mix(torch.ones(1, 3)), pytest.raises(ValueError, match="weights for 1 rows"):  # only generate repeats
        case(model)
    with model.mix(torch.ones(3)), pytest.raises(ValueError, match="a mixture already"), model.mix(torch.ones(3)):
        pass
    model.add_adapter("d", SVFConfig(**case.targets, modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="'d' has modules of its own"), model.mix(torch.ones(4)):
        pass
    model.delete_adapter("d")
    model.merge_adapter()
    with model.mix(torch.ones(3)), pytest.raises(ValueError, match="call unmerge_adapter"):
        case(model)


def test_generate_refuses_other_numbers_of_rows():
    """Two prompts for each weight are not beams."""
    case = CASES["llama"]()
    model = experts(case)
    ids, settings = case.inputs[0].repeat(2, 1), {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(ValueError, match="weights for 3 rows, the batch has 6"):
        model.generate(input_ids=ids, adapter_names=["a", "b", "c"], **settings)
    for prompts in ({"inputs": ids[:3]}, {"input_ids": ids[:3]}):
        with model.mix(torch.ones(1, 3)), pytest.raises(ValueError, match="weights for 1 rows, the batch has 3"):
            model.generate(**prompts, **settings)
    beams = model.generate(input_ids=ids[:3], adapter_names=["a", "b", "c"], num_beams=2, **settings)
    assert beams.shape == (3, 11)


def test_many_experts_train_at_once():
    """Rows of one batch belong to different experts: their gradients are those of separate batches."""
    case = CASES["llama"]()
    model = experts(case).train()
    model.set_requires_grad(["a", "b", "c"])
    weights = torch.eye(3).requires_grad_()
    with model.mix(weights):
        case(model).square().sum().backward()
    found = {name: z.grad.clone() for e in "abc" for name, z in zs(model, e).items()}
    assert weights.grad.abs().min() > 0
    model.zero_grad()
    for row, name in enumerate("abc"):
        model.set_adapter(name)
        alone(case, model, row).square().sum().backward()
        for key, z in zs(model, name).items():
            assert relative(found[key], z.grad) < 1e-4
        model.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Backward after the block, with other mixtures and none in between."""
    case = CASES["llama"]()
    model = experts(case).train()
    model.set_requires_grad(["a", "b", "c"])
    mixtures = [torch.eye(3), torch.rand(3, 3), torch.rand(3, 9, 3)]

    def gradients():
        model.zero_grad()
        losses = []
        for weights in mixtures:
            with model.mix(weights):
                losses.append(case(model).square().sum())
        losses.append(case(model).square().sum())
        sum(losses[1:]).backward()
        with model.mix(torch.ones(3, 3)):
            losses[0].backward()
        return {name: z.grad.clone() for e in "abc" for name, z in zs(model, e).items()}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = gradients()
    assert any(module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing"))
    for name, grad in plain.items():
        assert relative(again[name], grad) < 1e-5, name


def test_recomputing_without_the_mixture_is_refused():
    model = get_peft_model(Flattened(), SVFConfig(target_modules="all-linear"), "a")
    x = torch.randn(2, 5, 8, requires_grad=True)
    with model.mix(torch.ones(2, 1)):
        loss = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum()
        loss.backward()
        loss = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum()
    with pytest.raises(RuntimeError, match="call backward inside"):
        loss.backward()


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 4, "num_return_sequences": 2},
        {},
    ],
    ids=["beams", "sequences", "both", "greedy"],
)
def test_generate(settings, task_type):
    case = CASES["llama"]()
    model = experts(case, task_type=task_type)
    ids = case.inputs[0]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0} | settings
    torch.manual_seed(1)
    with model.mix(torch.eye(3)):
        together = model.generate(input_ids=ids, **options)
    torch.manual_seed(1)
    named = model.generate(input_ids=ids, adapter_names=["a", "b", "c"], **options)
    assert torch.equal(together, named)
    if "do_sample" in settings:  # each draw is its row's expert's: check by the likelihood that it had under it
        return
    copies = settings.get("num_return_sequences", 1)
    for row, name in enumerate("abc"):
        model.set_adapter(name)
        one = model.generate(input_ids=ids[row : row + 1], **options)
        assert torch.equal(together[row * copies : (row + 1) * copies], one)


def test_sampled_rows_come_from_their_own_expert():
    """With z so large that each expert is sure of itself, sampling with copies of rows equals its greedy answer."""
    case = CASES["llama"]()
    model = experts(case)
    ids = case.inputs[0]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    with model.mix(torch.eye(3)):
        sampled = model.generate(input_ids=ids, do_sample=True, temperature=1e-4, num_return_sequences=2, **options)
    for row, name in enumerate("abc"):
        model.set_adapter(name)
        greedy = model.generate(input_ids=ids[row : row + 1], **options)
        assert torch.equal(sampled[2 * row], greedy[0])
        assert torch.equal(sampled[2 * row + 1], greedy[0])


def test_rows_cannot_be_mixed_behind_a_router():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            return self.experts[0](x[:1]) + self.experts[1](x[1:])

    model = get_peft_model(Routed(), SVFConfig(target_modules="all-linear"), "a")
    with model.mix(torch.ones(2, 1)), pytest.raises(ValueError, match="in its router's order"):
        model(torch.randn(2, 4))


def test_grouped_convolutions_take_one_mixture():
    model = get_peft_model(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)), SVFConfig(target_modules=["0"]), "a")
    perturb(model, "a")
    x = torch.randn(2, 8, 5, 5)
    adapted = model(x)
    with model.mix(torch.ones(1)):
        assert relative(model(x), adapted) < 1e-6
    with model.mix(torch.ones(2, 1)), pytest.raises(ValueError, match="grouped convolution"):
        model(x)
    assert relative(model.merge_and_unload()(x), adapted) < 1e-5
