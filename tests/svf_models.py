"""Tiny random models of every kind that the SVF tests adapt: (model, what it is called with, SVF targets)."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ResNetConfig,
    ResNetModel,
)

import ctm

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 56, "max_position_embeddings": 64}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Biases and norms too, so that every part matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def llama(**changes):
    return randomize(LlamaForCausalLM(LlamaConfig(**SMALL | {"tie_word_embeddings": False} | changes)))


def qwen():
    return randomize(Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8, attention_bias=True, tie_word_embeddings=True)))


def gpt2():
    return randomize(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)))


def moe():
    sizes = SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return randomize(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)))


def resnet():
    return randomize(ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 32], depths=[1, 1])))


def thinker():
    config = ctm.CTMConfig(
        d_model=24, d_input=16, ticks=3, heads=2, n_synch_out=6, n_synch_action=6, memory_length=5, synapse_depth=2
    )
    return randomize(ctm.CTM(config, (2, 3)))


class Case:
    """One model with its targets and a batch of `rows` rows."""

    def __init__(self, make, rows=3, **targets):
        torch.manual_seed(0)
        self.model, self.targets = make(), targets
        self.name = make.__name__
        if make is resnet:
            self.inputs = (torch.randn(rows, 3, 32, 32),)
        elif make is thinker:
            self.inputs = (torch.randn(rows, 7, 16),)
        else:
            self.inputs = (torch.randint(64, (rows, 9)),)

    def __call__(self, model=None):
        """The model's output, one float tensor with the rows first."""
        model = self.model if model is None else model
        dtype = next(p.dtype for p in model.parameters() if p.ndim > 1)
        out = model(*(x.to(dtype) if x.is_floating_point() else x for x in self.inputs))
        if hasattr(out, "logits"):
            return out.logits
        return out.predictions if hasattr(out, "predictions") else out.last_hidden_state


CASES = {
    "llama": lambda: Case(llama, target_modules="all-linear"),
    "qwen": lambda: Case(qwen, target_modules="all-linear"),
    "gpt2": lambda: Case(gpt2, target_modules="all-linear"),
    "moe": lambda: Case(
        moe, target_modules=["q_proj", "o_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    ),
    "resnet": lambda: Case(resnet, target_modules=r".*(convolution|shortcut.convolution)"),
    "ctm": lambda: Case(thinker, target_modules="all-linear", target_parameters=["neurons.0.weight"]),
}
