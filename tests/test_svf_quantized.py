"""A base held in 8 or 4 bits by torchao or bitsandbytes, where they are installed: bases of the unquantised weights."""

import functools

import pytest
import torch
from conftest import relative
from peft import PeftModel, get_peft_model
from svf_models import Case, llama
from test_svf_tuner import perturb, zs
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from svf import SVFConfig
from svf.layers import is_quantized


def torchao(bits, model):
    quantization = pytest.importorskip("torchao.quantization")
    int4 = quantization.IntxWeightOnlyConfig(torch.int4, quantization.granularity.PerGroup(32))
    quantization.quantize_(model, int4 if bits == 4 else quantization.Int8WeightOnlyConfig())


def bits(kind, model):
    nn = pytest.importorskip("bitsandbytes").nn
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        sizes = module.in_features, module.out_features, module.bias is not None
        if kind == 4:
            new = nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
        else:
            new = nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        new.load_state_dict(module.state_dict())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new.to("cpu"))


QUANTIZERS = {
    "torchao-int8": functools.partial(torchao, 8),
    "torchao-int4": functools.partial(torchao, 4),
    "bnb-nf4": functools.partial(bits, 4),
    "bnb-int8": functools.partial(bits, 8),
}


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_quantized_base(kind, tmp_path):
    case = Case(lambda: llama(hidden_size=64, intermediate_size=128))
    case.model.save_pretrained(tmp_path / "base")
    plain = get_peft_model(Case(lambda: llama(hidden_size=64, intermediate_size=128)).model, SVFConfig())
    perturb(plain)
    plain.save_pretrained(tmp_path / "expert")
    expected = case(plain)

    QUANTIZERS[kind](case.model)
    assert is_quantized(case.model.model.layers[0].mlp.up_proj)
    base = case()
    where = {"checkpoint": str(tmp_path / "base")}
    with pytest.raises(ValueError, match="bases come from the unquantised weights"):
        get_peft_model(case.model, SVFConfig())
    case = Case(lambda: llama(hidden_size=64, intermediate_size=128))
    QUANTIZERS[kind](case.model)
    with pytest.raises(ValueError, match="cannot be computed with form='merged', only with one_sided; use"):
        get_peft_model(case.model, SVFConfig(form="merged", decomposition=where))

    case = Case(lambda: llama(hidden_size=64, intermediate_size=128))
    QUANTIZERS[kind](case.model)
    model = get_peft_model(case.model, SVFConfig(decomposition=where))
    assert torch.equal(case(model), base)
    assert model.peft_config["default"].basis_hash == plain.peft_config["default"].basis_hash
    case(model).square().sum().backward()
    assert all(z.grad.abs().sum() > 0 for z in zs(model).values())
    perturb(model)
    assert relative(case(model), expected) < 1.5 * relative(base, case(plain.unload())) + 0.02
    with model.disable_adapter():
        assert torch.equal(case(model), base)
    with pytest.raises(ValueError, match="quantised and cannot take a merged weight"):
        model.merge_adapter()

    config = SVFConfig.from_pretrained(tmp_path / "expert")
    config.decomposition = where
    adapted = case(model)
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "expert", config=config)
    # bitsandbytes multiplies in another way where nothing has a gradient
    assert relative(case(again), adapted) < (1e-6 if kind.startswith("torchao") else 2e-2)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["torchao-int8", "bnb-nf4"])
def test_an_expert_loads_onto_a_base_that_transformers_quantised(kind, tmp_path):
    """Its configuration says which folder the unquantised weights are in."""
    if kind == "torchao-int8":
        config = TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    case = Case(lambda: llama(hidden_size=64, intermediate_size=128))
    case.model.save_pretrained(tmp_path / "base")
    plain = case()
    model = get_peft_model(case.model, SVFConfig())
    perturb(model)
    model.save_pretrained(tmp_path / "expert")
    expected = case(model)

    def quantized():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config).eval()

    base = case(quantized())
    # another one: on some CPUs bitsandbytes packs its weights in the first forward, and state_dict loses them
    model = PeftModel.from_pretrained(quantized(), tmp_path / "expert")
    assert relative(case(model), expected) < 1.5 * relative(base, plain) + 0.02
    assert relative(case(model), base) > 0.05
    with model.disable_adapter():
        assert torch.equal(case(model), base)
    with pytest.raises(ValueError, match="cannot be computed with form='factored', only with one_sided"):
        model.add_adapter("other", SVFConfig(form="factored"))
    assert list(model.peft_config) == ["default"]
