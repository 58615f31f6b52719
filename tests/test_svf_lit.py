"""Sampling, policy gradients and supervised training of language models: numbers against ones worked out by hand."""

import copy
import functools

import pytest
import torch
from peft import IA3Config, LoraConfig
from svf_models import llama
from torch import nn
from transformers import LlamaConfig

from svf import SVFConfig, rollout
from svf.lit import LitLM, Policy, Scratch, paired_gain
from svf.tokenizer import byte_tokenizer
from tasks.optim import Optim
from tasks.text import Batch, TextTask

PROMPTS = [[5, 9, 12], [7], [30, 31, 32, 33, 34]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return llama()


class Trainer:
    """What of a trainer a step needs to know."""

    log_every_n_steps, global_step, is_global_zero, sanity_checking = 1, 0, True, False


@pytest.fixture
def lit(monkeypatch):
    """Makes a module around a tiny new model. What it logs is in `logged`."""

    def make(task=None, seed=0, **arguments):
        torch.manual_seed(seed)
        monkeypatch.setattr("svf.lit.LlamaConfig", functools.partial(LlamaConfig, initializer_range=0.2))
        task = task or TextTask(["math", "logic"] if arguments.pop("two", False) else "math", batch_size=3)
        scratch = Scratch(d_model=16, d_mlp=24, layers=2, heads=2, kv_heads=1, context=128)
        module = LitLM(task, scratch=scratch, **{"max_new_tokens": 4} | arguments)
        module.logged = {}
        module._trainer = Trainer()
        monkeypatch.setattr(LitLM, "global_step", 0)
        monkeypatch.setattr(module, "log", lambda name, value, **_: module.logged.update({name: float(value)}))
        return module

    return make


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def test_the_tokenizer_keeps_every_text_and_adds_nothing():
    tokenizer = byte_tokenizer()
    text = "a>b, é\n  =12"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode()) and tokenizer.decode([*ids, tokenizer.eos_token_id], True) == text
    assert len(tokenizer) == 258 and {tokenizer.pad_token_id, tokenizer.eos_token_id} == {0, 1}


def test_the_beginning_of_a_text_is_marked_once():
    class Marking:
        bos_token = "<s>"

        def __call__(self, text, add_special_tokens):
            return type("Encoding", (), {"input_ids": [1] * add_special_tokens + [2]})

    assert rollout.encode(Marking(), "hello") == [1, 2] and rollout.encode(Marking(), "<s>hello") == [2]


def test_the_likeliest_answers_are_those_of_generate(model):
    rows = rollout.sample(model, PROMPTS, ends=[3], pad=0, max_new_tokens=6, times=2)
    for i, prompt in enumerate(PROMPTS):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=3, pad_token_id=0
        )[0, len(prompt) :]
        for copy_ in (2 * i, 2 * i + 1):
            assert rows.answers[copy_][rows.answered[copy_]].tolist() == theirs.tolist()
            assert rows.ids[copy_][rows.mask[copy_]].tolist() == prompt + theirs.tolist()


def test_an_answer_ends_with_its_end_token_and_nothing_counts_behind_it(model):
    free = rollout.sample(model, PROMPTS, [], pad=0, max_new_tokens=6)
    end = int(free.answers[0, 2])
    first = free.answers[0].tolist().index(end)
    rows = rollout.sample(model, PROMPTS, [end], pad=0, max_new_tokens=6)
    assert rows.answered[0].tolist() == [True] * (first + 1) + [False] * (rows.n - first - 1)
    assert rows.answers[0].tolist() == free.answers[0, : first + 1].tolist() + [0] * (rows.n - first - 1)


def test_drawn_tokens_have_the_models_probabilities(model):
    torch.manual_seed(0)
    with torch.no_grad():
        expected = (model(torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.7).softmax(-1)
    rows = rollout.sample(model, PROMPTS[:1], [], pad=0, max_new_tokens=1, temperature=0.7, times=20_000)
    found = rows.answers[:, 0].bincount(minlength=64) / 20_000
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt() + 1e-4).all()


def test_log_probabilities_are_those_of_each_row_alone(model):
    torch.manual_seed(1)
    rows = rollout.sample(model, PROMPTS, [3], pad=0, max_new_tokens=5, temperature=2.0, times=3)
    log_p, entropy = rollout.log_probabilities(model, rows, temperature=2.0, entropy=True)
    for i in range(len(rows.ids)):
        ids = rows.ids[i][rows.mask[i]]
        n = int(rows.answered[i].sum())
        log_all = (model(ids[None]).logits[0] / 2.0).log_softmax(-1)[-n - 1 : -1]
        torch.testing.assert_close(log_p[i, :n], log_all.gather(1, ids[-n:, None])[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy[i, :n], -(log_all.exp() * log_all).sum(-1), atol=1e-5, rtol=1e-5)
        assert not log_p[i, n:].any() and not entropy[i, n:].any()


def test_some_rows_without_empty_columns_have_the_same_log_probabilities(model):
    torch.manual_seed(1)
    rows = rollout.sample(model, PROMPTS, list(range(40)), pad=0, max_new_tokens=8, temperature=3.0, times=4)
    whole = rollout.log_probabilities(model, rows)[0].sum(1)
    for index in (torch.tensor([4, 5]), torch.tensor([11, 0, 7])):
        part = rows.take(index)
        assert part.mask.any(0).all() and part.ids.shape[1] <= rows.ids.shape[1]
        torch.testing.assert_close(rollout.log_probabilities(model, part)[0].sum(1), whole[index], atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# By reward


def test_advantages(lit):
    reward = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    loo = lit()._advantage(reward, ["math", "math"])
    torch.testing.assert_close(loo, torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3], [0.0] * 4]))
    assert lit(policy=Policy(baseline="none"))._advantage(reward, ["a", "b"]).equal(reward)
    normal = lit(policy=Policy(normalize=True))._advantage(reward, ["a", "a"])
    torch.testing.assert_close(normal, loo / loo.std())
    running = lit(policy=Policy(baseline="running", momentum=0.5))
    torch.testing.assert_close(running._advantage(reward, ["a", "b"]), reward - torch.tensor([[0.25], [1.0]]))
    torch.testing.assert_close(running._advantage(reward, ["b", "a"]), reward - torch.tensor([[1.0], [0.25]]))
    assert running.running == {"a": pytest.approx(0.625), "b": pytest.approx(0.625)}


def gradients(module):
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def shifted(module, by=0.1):
    """Moves an adapter away from the base."""
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if parameter.requires_grad:
                parameter += by * torch.sin(torch.arange(parameter.numel()).float() + len(name)).view(parameter.shape)


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_the_gradient_is_that_of_the_written_formula(lit, monkeypatch, micro_batch):
    policy = Policy(answers=4, temperature=1.5, kl=0.3, wrong=-1.0)
    often = {"micro_batch": micro_batch, "gradient_checkpointing": micro_batch is not None}
    module = lit(policy=policy, adapter=SVFConfig(target_modules="all-linear"), **often)
    forwards = []
    mlp = module.model.get_submodule("base_model.model.model.layers.0.mlp")
    mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    shifted(module)
    kept = {}
    answer = module.answer
    monkeypatch.setattr(module, "answer", lambda *args: kept.setdefault("rows", answer(*args)))
    rewards = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0]).bool()
    monkeypatch.setattr(module.task, "check", lambda *args: rewards.tolist())
    samples = [module.task.dataset("train")[i] for i in range(3)]
    loss = module.training_step(Batch(samples), 0)
    loss.backward()
    found = gradients(module)
    module.zero_grad()
    drawing = kept["rows"].n
    assert len(forwards) == drawing + (2 if micro_batch is None else 9)  # of 3 micro-batches: twice, and the base

    rows, total, kls, lengths = kept["rows"], 0.0, [], []
    base = copy.deepcopy(module.model).eval()
    reward = rewards.float() * 2 - 1
    for i in range(12):
        ids, n = rows.ids[i][rows.mask[i]][None], int(rows.answered[i].sum())
        others = [float(reward[j]) for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        log_p = (module.model(input_ids=ids).logits[0] / 1.5).log_softmax(-1)[-n - 1 : -1].gather(1, ids[0, -n:, None])
        with torch.no_grad(), base.disable_adapter():
            log_b = (base(input_ids=ids).logits[0] / 1.5).log_softmax(-1)[-n - 1 : -1].gather(1, ids[0, -n:, None])
        kl = (log_b - log_p).exp() - (log_b - log_p) - 1
        total = total + (-(reward[i] - sum(others) / 3) * log_p.sum() + 0.3 * kl.sum()) / 12
        kls.append(float(kl.detach().sum()))
        lengths.append(n)
    total.backward()
    torch.testing.assert_close(loss.detach(), total.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found, gradients(module), atol=1e-5, rtol=1e-3)
    assert module.logged["train/reward"] == pytest.approx(float(reward.mean()))
    assert module.logged["train/kl"] == pytest.approx(sum(kls) / sum(lengths), rel=1e-3) and min(kls) >= 0
    assert module.logged["train/length"] == pytest.approx(sum(lengths) / 12)


def test_the_base_diverges_from_itself_by_nothing(lit):
    for arguments in ({"adapter": SVFConfig(target_modules="all-linear")}, {"policy": Policy(kl=0.1)}):
        module = lit(**arguments)
        module.training_step(Batch([module.task.dataset("train")[0]]), 0)
        assert module.logged["train/kl"] == pytest.approx(0, abs=1e-6)


def test_experts_trained_together_get_the_gradients_that_they_get_alone(lit, monkeypatch):
    """Also each its own clipping."""
    reward = {"math": [True, False, False, True, True, True], "logic": [False, True, False, False, False, True]}
    adapter = SVFConfig(target_modules=["q_proj", "down_proj"])
    found = {}
    for domains in (["math"], ["logic"], ["math", "logic"]):
        torch.manual_seed(1)
        task = TextTask(domains, batch_size=3)
        module = lit(task, adapter=adapter, policy=Policy(answers=2), seed=1)
        drawn = {}

        def answer(samples, mix, times, temperature, module=module, drawn=drawn):
            """Answers that depend on the request alone."""
            prompts = [module.tokenizer(s.prompt).input_ids for s in samples for _ in range(times)]
            answers = [[40 + (sum(p) + i % 2) % 7, 50 + i % 2, 1][i % 2 :] for i, p in enumerate(prompts)]
            for sample in samples:
                drawn[sample.prompt] = sample.domain
            return rollout.rows(prompts, answers, 0)

        def judge(samples, texts):
            return [
                reward[d][[s.domain for s in samples[:i]].count(d)] for i, d in enumerate(s.domain for s in samples)
            ]

        monkeypatch.setattr(module, "answer", answer)
        monkeypatch.setattr(task, "check", judge)
        samples = sorted(next(iter(task.train_dataloader())).samples, key=lambda s: domains.index(s.domain))
        module.training_step(Batch(samples), 0).backward()
        monkeypatch.setattr(module, "clip_gradients", lambda optimizer, value, _, m=module: nn.utils.clip_grad_norm_(
            [p for p in m.parameters() if p.grad is not None], value))  # fmt: skip
        module.configure_gradient_clipping(None, 1e-3)
        for name in domains:
            end = name if len(domains) > 1 else "default"
            grads = [p.grad for path, p in sorted(module.named_parameters()) if path.endswith(f"svf_z.{end}")]
            found.setdefault(name, []).append(torch.cat(grads))
    for alone, together in found.values():
        assert alone.norm() == pytest.approx(1e-3, rel=1e-3)
        torch.testing.assert_close(together, alone, atol=1e-8, rtol=1e-3)
    assert not torch.allclose(found["math"][0], found["logic"][0], atol=1e-5)


def test_reward_is_learned(lit, monkeypatch):
    """Answers of one token, right if its embedding lies on one side."""
    module = lit(policy=Policy(answers=16), adapter=LoraConfig(target_modules="all-linear"))
    module.max_new_tokens = 1
    monkeypatch.setattr(module.task, "check", lambda samples, texts: half[-1])
    half, answer, shares = [], module.answer, []
    embeddings = module.model.get_input_embeddings().weight

    def watched(*args):
        rows = answer(*args)
        half.append((embeddings[rows.answers[:, 0], 0] > 0).tolist())
        shares.append(sum(half[-1]) / len(half[-1]))
        return rows

    monkeypatch.setattr(module, "answer", watched)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 0.03)
    samples = [module.task.dataset("train")[i] for i in range(16)]
    base = {name: p.clone() for name, p in module.named_parameters() if not p.requires_grad}
    for _ in range(40):
        optimizer.zero_grad()
        module.training_step(Batch(samples), 0).backward()
        optimizer.step()
    assert shares[0] < 0.55 and sum(shares[-5:]) / 5 > 0.72, shares
    assert all(p.equal(base[name]) for name, p in module.named_parameters() if name in base)


@pytest.mark.parametrize(
    "adapter, part",
    [
        (LoraConfig(target_modules="all-linear"), "lora_"),
        (LoraConfig(target_modules="all-linear", use_dora=True), "lora_"),
        (IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]), "ia3_"),
        (SVFConfig(), "svf_z"),
        (None, ""),
    ],
)
def test_one_recipe_trains_any_adapter_or_all(lit, monkeypatch, adapter, part):
    module = lit(adapter=adapter, policy=Policy(kl=0.1))
    monkeypatch.setattr(module.task, "check", lambda samples, texts: [i % 3 == 0 for i in range(len(texts))])
    module.training_step(Batch([module.task.dataset("train")[i] for i in range(2)]), 0).backward()
    trained = {name: p.grad for name, p in module.model.named_parameters() if p.requires_grad}
    assert trained and all(part in name for name in trained)
    assert any(grad.any() for grad in trained.values()) and all(grad.isfinite().all() for grad in trained.values())
    assert module.logged["train/kl"] == pytest.approx(0, abs=1e-5) and module.logged["train/entropy"] > 0
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == module.cost["trainable"]


# ----------------------------------------------------------------------------------------------------------------------
# By target


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_supervised_loss_is_the_mean_over_the_answers_tokens_and_their_ends(lit, micro_batch):
    module = lit(objective="target", micro_batch=micro_batch)
    samples = [module.task.dataset("train")[i] for i in range(5)]
    loss = module.training_step(Batch(samples), 0)
    loss.backward()
    found = gradients(module)
    module.zero_grad()
    total, n = 0.0, 0
    for sample in samples:
        prompt, target = (module.tokenizer(text).input_ids for text in (sample.prompt, sample.target))
        ids = torch.tensor([[*prompt, *target, 1]])
        labels = torch.tensor([[-100] * len(prompt) + [*target, 1]])
        total, n = total + module.model(input_ids=ids, labels=labels).loss * (len(target) + 1), n + len(target) + 1
    (total / n).backward()
    torch.testing.assert_close(loss.detach(), (total / n).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, gradients(module), atol=1e-6, rtol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The rest


def test_samples_of_every_domain_are_shown(lit, monkeypatch):
    module = lit(two=True)
    of = {"math": 12, "logic": 12}
    asked = [sample for name, n in of.items() for sample in module.task.samples(name, "selection", n)]
    module.on_validation_start()
    for part in (asked[:10], asked[10:]):
        module.validation_step(Batch(part), 0)
    assert [shown[0] for shown in module.shown] == ["math"] * 8 + ["logic"] * 8


def test_paired_gain():
    gain, half = paired_gain([True, True, False, True], [False, True, True, False])
    assert gain == pytest.approx(0.25)
    assert half == pytest.approx(1.96 * (sum((d - 0.25) ** 2 for d in (1, 0, -1, 1)) / 3 / 4) ** 0.5)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"two": True, "adapter": LoraConfig(target_modules=["q_proj"])}, "only SVF trains several experts at once"),
        ({"base": "nowhere"}, "give model.base, a checkpoint to start from, or model.scratch"),
        ({"max_new_tokens": 0}, "model.max_new_tokens=0"),
        ({"max_new_tokens": 2}, "cuts every answer to math, which takes 3 tokens or more"),
        ({"optim": Optim(no_decay=("nowhere",))}, "'nowhere' is in no parameter's name"),
    ],
)
def test_what_is_refused(lit, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        lit(**arguments)


@pytest.mark.parametrize("arguments", [{"answers": 1}, {"answers": 0, "baseline": "none"}, {"temperature": -1}])
def test_policies_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match=r"model\.policy"):
        Policy(**arguments)
