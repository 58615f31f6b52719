"""What only a GPU shows: bf16 identity and accuracy at real kernels, bases made there, memory of a step."""

import pytest
import torch
from conftest import relative
from peft import LoraConfig, PeftModel, get_peft_model
from svf_models import Case, llama
from test_svf_tuner import adapt, perturb, zs
from torch import nn

from svf import SVFConfig, spectral
from svf.decompose import solve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def wide(rows=4, tokens=64, **changes):
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 1024}
    case = Case(lambda: llama(**sizes | changes), target_modules="all-linear")
    case.model.to("cuda", torch.bfloat16)
    case.inputs = (torch.randint(1024, (rows, tokens), device="cuda"),)
    return case


@pytest.mark.parametrize("tokens", [1, 16, 63, 300, 1000])
@pytest.mark.parametrize("parametrization", ["residual", "exp"])
def test_identity_is_exact_in_bf16(tokens, parametrization):
    """By all three ways of rescaling: few tokens, as many as directions, folded."""
    case = wide(tokens=tokens)
    base = case()
    model = adapt(case, parametrization=parametrization)
    assert torch.equal(case(model), base)
    perturb_cuda(model)
    assert relative(case(model), base) > 1e-2
    model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(case(model), base)


def perturb_cuda(model, by=0.1, adapter="default"):
    model.cpu()
    perturb(model, adapter, by)
    model.cuda()


def test_bf16_merged_is_as_good_as_unmerged():
    case = wide()
    model = adapt(case)
    perturb_cuda(model)
    low = case(model)
    model.merge_adapter()
    merged = case(model)
    model.unmerge_adapter()
    exact = case(model.float())
    errors = [float((out.float() - exact).square().mean().sqrt()) for out in (merged, low)]
    assert errors[0] < 1.2 * errors[1], errors


@pytest.mark.parametrize("tokens", [7, 96, 700])
@pytest.mark.parametrize("rows", [False, True], ids=["shared", "per-row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rescaling_matches_fp64(tokens, rows, dtype):
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(96, 96, device="cuda", dtype=torch.float64))[0].to(dtype)
    x = torch.randn(3, tokens, 96, device="cuda").to(dtype).requires_grad_()
    d = (0.2 * torch.randn(*((3, 1, 96) if rows else (96,)), device="cuda")).requires_grad_()
    bias = torch.randn(96, device="cuda").to(dtype)
    upstream = torch.randn_like(x)
    x64, d64 = x.detach().double().requires_grad_(), d.detach().double().requires_grad_()
    expected = x64 + (((x64 - bias.double()) @ q.double()) * d64) @ q.double().T
    wanted = torch.autograd.grad(expected, (x64, d64), upstream.double())
    found = spectral.rescale(x, q, d, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative(found, expected) < tolerance
    for ours, theirs in zip(torch.autograd.grad(found, (x, d), upstream), wanted, strict=True):
        assert relative(ours, theirs) < tolerance


def test_bases_of_gpu_and_cpu_are_one(tmp_path):
    """An expert made with a GPU's bases answers the same with a CPU's."""
    torch.manual_seed(0)
    w = torch.randn(700, 512)
    assert relative(solve(w, device="cuda").values.cpu(), solve(w, device="cpu").values) < 1e-12
    case = wide()
    case.model.float()
    model = adapt(case, decomposition={"device": "cuda"})
    perturb_cuda(model)
    expected = case(model)
    model.save_pretrained(tmp_path)
    config = SVFConfig.from_pretrained(tmp_path)
    config.decomposition = {"device": "cpu", "cache": False}
    assert relative(case(PeftModel.from_pretrained(model.unload(), tmp_path, config=config)), expected) < 1e-5


def test_rows_mix_in_bf16():
    case = wide()
    model = adapt(case, "a")
    model.add_adapter("b", SVFConfig(**case.targets))
    for name in "ab":
        perturb_cuda(model, adapter=name)
    weights = torch.tensor([[1.0, 0], [0, 1], [0, 0], [0.5, 0.5]], device="cuda")
    with model.mix(weights):
        mixed = case(model)
    exact_case, exact = case, model.float()
    with exact.mix(weights):
        expected = exact_case(exact)
    assert relative(mixed, expected) < 5e-2


def test_a_step_needs_less_memory_than_lora():
    """Saved for backward: tokens x directions per matrix, beside LoRA's fp32 copy of every input."""
    peaks = {}
    for name, config in (
        ("svf", SVFConfig(target_modules=["gate_proj", "up_proj", "down_proj"])),
        ("lora", LoraConfig(r=16, target_modules=["gate_proj", "up_proj", "down_proj"])),
    ):
        case = wide(rows=16, tokens=256)
        model = get_peft_model(case.model, config).train()
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            case(model).float().square().mean().backward()
        peaks[name] = torch.cuda.max_memory_allocated()
        del model, case
        torch.cuda.empty_cache()
    assert peaks["svf"] < peaks["lora"], peaks


def test_trains_in_bf16():
    case = wide()
    model = adapt(case).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(case(model)[:, :-1].flatten(0, 1).float(), case.inputs[0][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    assert all(z.dtype == torch.float32 for z in zs(model).values())
