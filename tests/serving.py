"""A tiny base with a byte-level tokenizer and random experts, for tests of answers and of the server."""

import torch
from peft import get_peft_model
from svf_models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from svf import SVFConfig
from svf.adapt import Adaptive
from svf.experts import Expert, from_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every byte, and <eos>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<eos>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def base():
    """Writes printable ASCII, of some variety and with few near ties, or <eos>."""
    torch.manual_seed(0)
    model = llama(vocab_size=257, max_position_embeddings=512, bos_token_id=None, eos_token_id=0)
    printable = torch.zeros(257, 1)
    printable[[0, *(byte_tokenizer()(chr(i)).input_ids[0] for i in range(32, 127))]] = 20
    with torch.no_grad():
        model.lm_head.weight *= printable
    return model


def experts(*names: str) -> dict[str, Expert]:
    """Random ones, of the base above."""
    if not names:
        return {}
    config = SVFConfig(target_modules="all-linear", init_std=0.4, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = get_peft_model(base(), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return {name: from_model(model, name) for name in names}


def adaptive(strategy, *names: str) -> Adaptive:
    return Adaptive(base(), byte_tokenizer(), experts(*names), strategy)
