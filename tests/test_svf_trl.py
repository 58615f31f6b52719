"""SVF under TRL, for those who live there: the short example of the README, and what it does."""

import pytest
import torch
from svf_models import llama

from svf import SVFConfig
from svf.tokenizer import byte_tokenizer
from tasks.text import samples

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


@pytest.mark.slow
def test_grpo_trains_an_expert_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    model = llama(vocab_size=258, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    requests = samples("math", "train", 8)
    judges = {sample.prompt: sample for sample in requests}

    def reward(prompts, completions, **_):
        """A judge that a random model can please."""
        assert set(prompts) <= set(judges)
        return [float(len(text) % 2) for text in completions]

    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), learning_rate=1e-2, per_device_train_batch_size=8, num_generations=4,
            max_completion_length=4, max_steps=2, beta=0.1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": sample.prompt} for sample in requests]),
        processing_class=byte_tokenizer(),
        peft_config=SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("svf_z" in name for name in trained)
    assert max(float(p.detach().abs().max()) for p in trained.values()) > 1e-3
    after = trainer.model.unload().state_dict()
    assert all(after[name].equal(value) for name, value in before.items())
