"""A tiny base that writes printable text, and random experts of it, for tests of the server."""

import torch
from peft import get_peft_model
from svf_models import llama

from svf import SVFConfig
from svf.adapt import Adaptive
from svf.experts import Expert, from_model
from svf.tokenizer import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def base():
    """Writes printable ASCII, of some variety and with few near ties, or the end."""
    torch.manual_seed(0)
    model = llama(vocab_size=258, max_position_embeddings=512, bos_token_id=None, eos_token_id=1)
    printable = torch.zeros(258, 1)
    printable[[1, *(byte_tokenizer()(chr(i)).input_ids[0] for i in range(32, 127))]] = 20
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
