"""What the server is made of, without one: rows of a batch as alone, jobs, draws, text from tokens."""

import pytest
import torch
from peft import get_peft_model
from serving import adaptive
from svf_models import SMALL, gpt2, llama, qwen
from test_svf_tuner import perturb
from transformers import MistralConfig, MistralForCausalLM

from svf import Adaptive, ExpertLibrary, SVFConfig
from svf.engine import Alone, Engine, Full, Job, Row, Text, choose
from svf.tokenizer import byte_tokenizer


def routed(make, device="cpu"):
    """A model with two experts; its tokens from the third on are the characters from ! to ^."""
    torch.manual_seed(0)
    model = get_peft_model(make(), SVFConfig(target_modules="all-linear"), "a")
    model.add_adapter("b", SVFConfig(target_modules="all-linear"))
    for seed, name in enumerate("ab"):
        perturb(model, name, 0.4, seed)
    mixtures = {"A": "a", "B": "b", "C": {"a": -0.4, "b": 0.8}}
    library = ExpertLibrary(model.to(device))
    return Adaptive(model, byte_tokenizer(), library, lambda requests: [mixtures.get(r[0]) for r in requests])


def eager():
    return llama(attn_implementation="eager")


def check_against_alone(model):
    """Prompts and answers of all lengths, more of them than slots, cut into chunks: each as alone."""
    engine, asked = Engine(model, slots=3, chunk=5), []
    for i in range(9):
        prompt = "ABCD"[i % 4] + "".join(chr(33 + (7 * i + 5 * j) % 62) for j in range(3 * i))
        pieces = []
        job = Job(prompt, model.generator.encode(prompt), 6 + 5 * (i % 3), pieces.append)
        engine.submit(job)
        asked.append((job, pieces))
    engine.close()
    engine.run()
    found = []
    for job, pieces in asked:
        alone = Alone(model, job.request, job.route.weights, job.max_tokens)
        found.append(alone.compare("".join(piece.text for piece in pieces)))
        assert pieces[-1].finish == alone.finish or found[-1] == "tie"
    assert found.count("wrong") == 0
    assert found.count("same") >= 8


@pytest.mark.parametrize("make", [gpt2, qwen, eager])
def test_kinds_of_models(make):
    check_against_alone(routed(make))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [gpt2, qwen, llama])
def test_on_a_gpu(make):
    check_against_alone(routed(make, "cuda"))


def test_what_cannot_be_served_is_said():
    config = MistralConfig(**SMALL, sliding_window=4)
    with pytest.raises(ValueError, match="only models of full attention can be served, not one with DynamicSliding"):
        Engine(Adaptive(MistralForCausalLM(config), byte_tokenizer()))


def test_full_closed_and_too_long():
    engine = Engine(adaptive("base"), waiting=1, context=32)
    with pytest.raises(ValueError, match="empty"):
        engine.submit(Job("", [], 3, print))
    with pytest.raises(ValueError, match="30 tokens and an answer of 3 are more than the 32 that fit"):
        engine.submit(Job("", [1] * 30, 3, print))
    engine.submit(Job("", [1] * 30, 2, print))
    with pytest.raises(Full, match="1 requests are waiting already"):
        engine.submit(Job("", [1], 2, print))
    with pytest.raises(ValueError, match="context 1000 is not from 2 to 512"):
        Engine(engine.adaptive, context=1000)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])

    def drawn(n=2000, **settings):
        row = Row(Job("", [1], 1, print, seed=3, **settings), None)
        return torch.bincount(torch.tensor(choose(logits.expand(n, 4), [row] * n)), minlength=4) / n

    p = (logits[0] / 0.7).softmax(0)
    assert (drawn(temperature=0.7) - p).abs().max() < 4 * (0.25 / 2000) ** 0.5
    kept = p[:2] / p[:2].sum()  # 0.76 and 0.18 are the fewest that hold 0.9
    found = drawn(temperature=0.7, top_p=0.9)
    assert (found[:2] - kept).abs().max() < 4 * (0.25 / 2000) ** 0.5
    assert found[2:].sum() == 0
    assert drawn(50, temperature=1e-300)[0] == 1
    assert drawn(50, temperature=0.0)[0] == 1


def test_text_comes_in_whole_characters_and_without_stop_strings():
    tokenizer = byte_tokenizer()

    def pieces(said, *stop):
        text = Text(tokenizer, stop)
        found = []
        for token in tokenizer(said).input_ids:
            found.append(text.add(token))
            if text.stopped:
                break
        return [*found, text.end()], text.stopped

    assert pieces("aé€") == (["a", "", "é", "", "", "€", ""], False)
    assert pieces("ab", "bc") == (["a", "", "b"], False)
    assert pieces("abc", "bc") == (["a", "", "", ""], True)
    assert pieces("aab", "aaa", "b") == (["", "", "aa", ""], True)
    assert pieces("xabab.", "abac") == (["x", "", "", "", "ab", "ab.", ""], False)
    cut = Text(tokenizer, ())
    assert [cut.add(token) for token in tokenizer("é").input_ids[:1]] == [""]
    assert cut.end() == "\N{REPLACEMENT CHARACTER}"
    for seed in range(50):  # whatever the bytes, the parts are the whole
        tokens = torch.randint(2, 258, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        text = Text(tokenizer, ())
        assert "".join([*map(text.add, tokens), text.end()]) == tokenizer.decode(tokens)
