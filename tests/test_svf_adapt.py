"""The model that adapts itself: library, batched generation, routing, few-shot, transfer, evaluation."""

import json
import math
import shutil
import sys

import pytest
import torch
from conftest import relative
from peft import LoraConfig, get_peft_model
from svf_models import Case, llama
from test_svf_tuner import adapt, perturb
from transformers import AutoModelForCausalLM

from svf import Adaptive, Expert, ExpertLibrary, FewShot, SVFConfig, experts, search, spectral
from svf.__main__ import load, main, parser
from svf.adapt import CLASSIFY, Classify, Route
from svf.evaluate import STRATEGIES
from svf.experts import transfer
from svf.generate import Generator, common_prefix
from svf.tokenizer import byte_tokenizer
from tasks import text

NAMES = ("math", "code", "logic")
MIXTURES = [[0, 0, 0, 0], [1, 0, 0, 0], [0.3, -0.5, 0.9, 0], [0, 0, 1.2, 0], [0, 0, 0, 0]]
PROMPTS = ["3+4=", "a>b b>c: a to c?", "x", "3 more than 2 times x:", "3+4="]
SIZES = {"vocab_size": 258, "max_position_embeddings": 256, "eos_token_id": 1}


def model_with(names=(*NAMES, "dispatch"), by=0.6, **sizes):
    """A random Llama with random experts, frozen."""
    case = Case(lambda: llama(**SIZES | sizes), target_modules="all-linear")
    model = adapt(case, names[0], task_type="CAUSAL_LM")
    for name in names[1:]:
        model.add_adapter(name, SVFConfig(**case.targets, task_type="CAUSAL_LM"))
    for seed, name in enumerate(names):
        perturb(model, name, by, seed)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def library():
    return ExpertLibrary(model_with())


@pytest.fixture(scope="module")
def generator(library):
    return Generator(library, byte_tokenizer())


def made(library, strategy="prompt"):
    return Adaptive(library.model, byte_tokenizer(), library, strategy)


def written(generator, ids, weights, n=12):
    return generator.decode(generator.prefill(ids, weights), weights, n)[0]


class Counted:
    """Counts what a library's base reads: rows and tokens a row, or all tokens, of every call."""

    def __init__(self, library):
        self.shapes, self.base = [], library.base

    @property
    def tokens(self):
        return [rows * length for rows, length in self.shapes]

    def __enter__(self):
        hook = lambda model, args, kwargs: self.shapes.append(tuple(kwargs["input_ids"].shape))  # noqa: E731
        self.hook = self.base.register_forward_pre_hook(hook, with_kwargs=True)
        return self

    def __exit__(self, *problem):
        self.hook.remove()


# ----------------------------------------------------------------------------------------------------------------------
# Library


def test_a_library_from_files(tmp_path, library):
    library.model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = llama(**SIZES)
    ids = torch.randint(92, (4, 7))
    plain = base(ids).logits
    ours = ExpertLibrary(base, [tmp_path / name for name in NAMES])
    assert ours.names == ours.kinds == NAMES
    ours.add("dispatch", Expert.load(tmp_path / "dispatch"))
    assert ours.names == (*NAMES, "dispatch") and ours.kinds == NAMES
    weights = torch.tensor(MIXTURES[:4])
    with torch.no_grad(), ours.mix(weights), library.mix(weights):
        together = ours.base(ids).logits
        assert torch.equal(together, library.base(ids).logits)
    assert torch.equal(together[0], plain[0]) and relative(together[1], plain[1]) > 1e-2
    assert not any(p.requires_grad for n, p in ours.model.named_parameters() if "svf_" in n)
    ours.remove("code")
    assert ours.names == ("math", "logic", "dispatch")
    with torch.no_grad(), ours.mix(torch.tensor([[0.0, 1.2, 0.0]])):
        assert relative(ours.base(ids).logits[3], together[3]) < 1e-5
    for name in ours.names:
        ours.remove(name)
    assert ours.model is base and ours.names == () and torch.equal(base(ids).logits, plain)


def test_what_a_library_refuses_leaves_it_as_it_was(tmp_path, library):
    library.model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    other = llama(**SIZES)
    before = {name: id(module) for name, module in other.named_modules()}
    ours = ExpertLibrary(other)
    with pytest.raises(ValueError, match=r"was made for .* load it onto its own base"):
        ours.add("math", tmp_path / "math")
    assert ours.model is other and {name: id(module) for name, module in other.named_modules()} == before
    torch.manual_seed(0)
    ours = ExpertLibrary(llama(**SIZES), {"sums": tmp_path / "math"})
    foreign = Expert.load(tmp_path / "code")
    foreign.config.basis_hash = "0" * 64
    partial = Expert.load(tmp_path / "code")
    partial.z.popitem()
    ids = torch.randint(92, (2, 7))
    with torch.no_grad(), ours.mix(torch.ones(1, 1)):
        before = ours.base(ids).logits
    refused = {"foreign": foreign, "partial": partial, "a.b": foreign, "sums": foreign, "other": foreign}
    for name, expert in refused.items():
        with pytest.raises(ValueError):
            ours.add(name, expert)
        assert ours.names == ("sums",)
    with torch.no_grad(), ours.mix(torch.ones(1, 1)):
        assert torch.equal(ours.base(ids).logits, before)
    for name in ("prompt", "classifier", "few_shot", "few_shot_layers", "best_single", "shuffled", "lora"):
        with pytest.raises(ValueError, match=f"an expert cannot be called '{name}'; choose another name"):
            ours.add(name, tmp_path / "code")
    assert ours.names == ("sums",) and set(STRATEGIES) <= {*experts.RESERVED}
    ours.add("code", tmp_path / "code")
    assert ours.names == ("sums", "code")
    with pytest.raises(FileNotFoundError, match="nowhere is no folder, and could not be fetched"):
        ours.add("nowhere", "nowhere")
    with pytest.raises(ValueError, match="two experts of one name"):
        ExpertLibrary(llama(**SIZES), ["a/math", "b/math"])
    with pytest.raises(ValueError, match="there is no expert 'maths'; there are sums, code"):
        ours.weights("maths")
    with pytest.raises(ValueError, match=r"shape \(3,\) do not fit 2 experts"):
        ours.weights([1, 2, 3])


def test_mixtures_by_layer_and_the_experts_made_of_them(tmp_path, library):
    library.model.save_pretrained(tmp_path)
    assert library.layers == ("model.layers.0", "model.layers.1")
    ids = torch.randint(92, (3, 7))
    rows = torch.rand(3, 2, 4)
    one = torch.tensor([0.4, 0.0, -0.2, 0.0])
    with torch.no_grad(), library.mix(rows):
        together = library.base(ids).logits
    with torch.no_grad(), library.mix(one.expand(3, 4)):
        alike = library.base(ids).logits
    loaded = [Expert.load(tmp_path / name) for name in library.names]
    for row in range(3):
        by_pattern = experts.mix(
            loaded, [{"*.layers.0.*": float(a), "*": float(b)} for a, b in zip(*rows[row], strict=True)]
        )
        ours = library.expert(rows[row])
        assert ours.z.keys() == by_pattern.z.keys()
        assert all(torch.allclose(ours.z[name], by_pattern.z[name], atol=1e-6) for name in ours.z)
        assert ours.config.parametrization == "residual" and ours.config.basis_hash == loaded[0].config.basis_hash
        library.add("found", ours)
        with torch.no_grad(), library.mix(library.weights("found")[None]):
            assert relative(library.base(ids[row : row + 1]).logits, together[row : row + 1]) < 1e-5
        library.remove("found")
    library.add("found", library.expert(one))
    with torch.no_grad(), library.mix(library.weights("found")[None]):
        assert relative(library.base(ids).logits, alike) < 1e-5
    library.remove("found")
    with pytest.raises(ValueError, match=r"give \(layers, experts\) or"), library.model.mix(one, layers={}):
        pass
    part = {"model.layers.1.mlp.up_proj": 0}
    with pytest.raises(ValueError, match="no weights for model"), library.model.mix(rows, layers=part):
        library.base(ids)


def test_a_normalised_expert_can_be_mixed(tmp_path):
    case = Case(lambda: llama(**SIZES), target_modules=["up_proj", "down_proj"])
    model = adapt(case, "a", parametrization="sigmoid", normalize="nuclear", task_type="CAUSAL_LM")
    perturb(model, "a")
    library = ExpertLibrary(model.requires_grad_(False))
    ids = torch.randint(92, (2, 7))
    with torch.no_grad(), library.mix(torch.tensor([[0.7]])):
        expected = library.base(ids).logits
    library.add("b", library.expert([0.7]))
    with torch.no_grad(), library.mix(torch.tensor([[0.0, 1.0]])):
        assert relative(library.base(ids).logits, expected) < 1e-5


def test_frozen_mixtures_are_made_once_and_trained_ones_are_not(library, monkeypatch):
    ids = torch.randint(92, (2, 7))
    layer = next(library.model.base_model.layers())
    calls, own = [], spectral.shift
    monkeypatch.setattr(spectral, "shift", lambda *args: calls.append(args) or own(*args))
    try:
        with torch.no_grad(), library.mix(torch.rand(2, 4)):
            first = library.base(ids).logits
            assert torch.equal(library.base(ids).logits, first)
            assert len(calls) == 4  # one for each expert, of all layers
        layer.z("weight")["math"].requires_grad_(True)
        with torch.no_grad(), library.mix(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])):
            first = library.base(ids).logits
            layer.z("weight")["math"].add_(1.0)
            second = library.base(ids).logits
            layer.z("weight")["math"].sub_(1.0)
        assert relative(second[0], first[0]) > 1e-3 and torch.equal(second[1], first[1])
    finally:
        layer.z("weight")["math"].requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# Generation


def test_rows_are_as_alone(generator):
    """Padding, neighbours and other mixtures change nothing."""
    ids, weights = [generator.encode(p) for p in PROMPTS], torch.tensor(MIXTURES)
    start = generator.prefill(ids, weights)
    together = written(generator, ids, weights)
    for i in range(len(ids)):
        alone = generator.prefill(ids[i : i + 1], weights[i : i + 1])
        assert relative(start.logits_BV[i], alone.logits_BV[0]) < 1e-5
        assert together[i] == written(generator, ids[i : i + 1], weights[i : i + 1])[0]
    assert together[0] == together[4] != together[1]


def test_generation_is_that_of_transformers(generator, library):
    for prompt, weights in zip(PROMPTS, torch.tensor(MIXTURES), strict=True):
        ids = torch.tensor([generator.encode(prompt)])
        with library.mix(weights[None]):
            whole = library.base.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=12, do_sample=False)
        assert written(generator, ids.tolist(), weights[None])[0] == whole[0, ids.shape[1] :].tolist()


def test_rows_that_end_leave_the_batch(generator, library):
    """With every character an end for some row, answers stay those of the row alone, and the batch gets smaller."""
    ids = [generator.encode(p) for p in (*PROMPTS, "8-5=", "say cat:", "b>a")]
    weights = torch.tensor([*MIXTURES, *MIXTURES[1:4]])
    free = generator.decode(generator.prefill(ids, weights), weights, 16, ignore_eos=True)[0]
    assert all(len(row) == 16 for row in free)
    ends = {1, free[0][1], free[2][4], free[3][7], free[5][2], free[6][10]}
    config = library.base.generation_config
    before, config.eos_token_id = config.eos_token_id, sorted(ends)
    try:
        with Counted(library) as counted:
            found, log_p = generator.decode(generator.prefill(ids, weights), weights, 16)
        for row, (whole, cut) in enumerate(zip(free, found, strict=True)):
            end = next((i for i, token in enumerate(whole) if token in ends), 15)
            assert cut == whole[: end + 1], row
        assert counted.tokens[1] == 8 and min(counted.tokens) < 4
    finally:
        config.eos_token_id = before
    for row, prompt in enumerate(ids):  # the log-probabilities that came with them
        whole = torch.tensor([prompt + found[row]])
        with torch.no_grad(), library.mix(weights[row : row + 1]):
            every = library.base(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = every.gather(1, whole[0, len(prompt) :, None]).mean()
        assert log_p[row] == pytest.approx(float(expected), abs=1e-4)


def test_drawn_answers_follow_the_seed(generator):
    ids, weights = [generator.encode("3+4=")] * 3, torch.zeros(3, 4)
    start = generator.prefill(ids, weights)
    first, again, other = (generator.decode(start, weights, 8, 1.0, seed)[0] for seed in (1, 1, 2))
    assert first == again != other and first[0] != first[1]
    assert generator.decode(start, weights, 8, 1e-4, 3)[0] == generator.decode(start, weights, 8)[0]


def test_a_shared_prefix_is_read_once(generator, library):
    """By rows of one mixture, with the same logits and answers as without."""
    long = "Kinds of things that all prompts here begin with: "
    ids = [generator.encode(long + prompt) for prompt in PROMPTS]
    weights = torch.tensor(MIXTURES)[[0, 1, 1, 1, 0]]
    plain = generator._read(ids, weights)
    with Counted(library) as counted:
        shared = generator.prefill(ids, weights)
    assert counted.tokens[0] == 2 * len(long) and sum(counted.tokens) < 0.75 * sum(map(len, ids))
    assert relative(shared.logits_BV, plain.logits_BV) < 1e-5
    assert generator.decode(shared, weights, 10)[0] == generator.decode(plain, weights, 10)[0]
    one = generator.prefill([generator.encode(long)], weights[1:2])
    kept = generator.prefill(ids[1:4], weights[1:4], prefix=(generator.encode(long), one))
    assert relative(kept.logits_BV, plain.logits_BV[1:4]) < 1e-5
    assert len(one) == 1 and one.cache.get_seq_length() == len(long)  # what is kept does not grow
    other = generator.prefill([generator.encode("x"), ids[1]], weights[1:3], prefix=(generator.encode(long), one))
    assert relative(other.logits_BV[1], plain.logits_BV[1]) < 1e-5


def test_only_rows_of_the_base_use_what_the_base_has_read(generator, library):
    ids, weights = [generator.encode(p) for p in PROMPTS], torch.tensor(MIXTURES)
    base = generator.prefill(ids, torch.zeros(5, 4))
    fresh = generator._read(ids, weights)
    with Counted(library) as counted:
        found = generator.prefill(ids, weights, base=base)
    assert counted.tokens == [3 * max(map(len, ids))]  # the three that are not the base
    assert relative(found.logits_BV, fresh.logits_BV) < 1e-5
    assert relative(base.logits_BV[1], fresh.logits_BV[1]) > 1e-3
    assert generator.decode(found, weights, 10)[0] == generator.decode(fresh, weights, 10)[0]
    assert generator.decode(base, weights * 0, 10)[0] == written(generator, ids, weights * 0, 10)
    with Counted(library) as counted:
        assert generator.prefill(ids, weights * 0, base=base) is base
    assert counted.tokens == []
    long = [generator.encode("What all of these prompts have in common: " + p) for p in PROMPTS]
    base = generator.prefill(long, torch.zeros(5, 4))  # the common part read once: padding is behind it
    found, fresh = generator.prefill(long, weights, base=base), generator._read(long, weights)
    assert generator.decode(found, weights, 10)[0] == generator.decode(fresh, weights, 10)[0]
    tiny = torch.full((5, 4), 1e-30)  # not exactly the base
    with Counted(library) as counted:
        generator.prefill(ids, tiny, base=base)
    assert len(counted.tokens) == 1


def test_batches_of_what_fits(generator, monkeypatch):
    assert generator.batches([3, 4], 8) == [[0, 1]] and generator.batches([], 8) == []
    monkeypatch.setattr(Generator, "rows_that_fit", lambda self, tokens: 2)
    assert generator.batches([9, 1, 5, 7, 2], 8) == [[1, 4], [2, 3], [0]]
    one_by_one = made(generator.library, lambda prompts: [{"math": 0.3, "code": -0.5} for _ in prompts])
    small = [answer.text for answer in one_by_one.generate(PROMPTS, 10)]
    monkeypatch.undo()
    assert small == [answer.text for answer in one_by_one.generate(PROMPTS, 10)]


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == [1, 2]
    assert common_prefix([[1], [2]]) == [] and common_prefix([(5, 6)]) == (5, 6)


# ----------------------------------------------------------------------------------------------------------------------
# Routes


def brute_force(library, ids, weights, labels):
    """Every label token by token without any cache, the probability shared out among what labels go on with."""
    found = []
    for label in labels:
        log = 0.0
        for n, token in enumerate(label):
            allowed = sorted({other[n] for other in labels if other[:n] == label[:n]})
            with torch.no_grad(), library.mix(weights[None]):
                logits = library.base(torch.tensor([[*ids, *label[:n]]])).logits[0, -1, allowed]
            log += float(logits.log_softmax(-1)[allowed.index(token)])
        found.append(math.exp(log))
    return found


@pytest.mark.parametrize("by", [None, "dispatch"])
def test_labels_are_scored_by_likelihood(library, generator, by):
    """Also labels that begin alike, or one with another; each row sums to one."""
    adaptive = made(library)
    labels = ["math", "code", "cot", "co", "other"]
    found = Classify(by).probabilities(adaptive, PROMPTS, labels)
    weights = library.weights(by)
    eos = byte_tokenizer().eos_token_id
    for row, prompt in zip(found, PROMPTS, strict=True):
        ids = generator.encode(CLASSIFY.format(labels=", ".join(labels), prompt=prompt))
        words = [(*generator.encode(f" {label}"), eos) for label in labels]
        assert row.tolist() == pytest.approx(brute_force(library, ids, weights, words), rel=1e-4)
        assert float(row.sum()) == pytest.approx(1, rel=1e-5)
    assert torch.allclose(found[0], found[4], rtol=1e-4)


def test_the_template_is_read_once(library):
    adaptive = made(library)
    first = adaptive.route(["3+4="])
    with Counted(library) as counted:
        again = adaptive.route(["3+4=", "x"])
    assert counted.tokens[0] == 2 * len("3+4=\nKind: ") - 2 * len(" ") + 2 * len(" ")
    assert again[0].label == first[0].label and again[0].scores == pytest.approx(first[0].scores, rel=1e-4)


def test_the_template_is_read_again_by_another_classifier(tmp_path):
    library = ExpertLibrary(model_with())
    others = {"dispatch": library.expert("math"), "again": library.expert("dispatch")}
    adaptive = made(library, "classifier")
    first = adaptive.route(["3+4="])[0].scores
    library.remove("dispatch")
    library.add("dispatch", others["dispatch"])
    second = adaptive.route(["3+4="])[0].scores
    assert second == pytest.approx(made(library, "classifier").route(["3+4="])[0].scores, rel=1e-4)
    assert second != pytest.approx(first, rel=1e-2)
    library.remove("dispatch")
    library.add("dispatch", others["again"])
    assert adaptive.route(["3+4="])[0].scores == pytest.approx(first, rel=1e-4)


def test_labels_of_a_model_that_ends_nothing():
    """Where no token says that a label is over, one that another begins with could not be written."""
    library = ExpertLibrary(model_with(("code", "logic"), eos_token_id=None))
    adaptive = made(library)
    adaptive.tokenizer.eos_token = None
    assert adaptive.generator.eos == []
    found = Classify().probabilities(adaptive, ["x"], ["code", "logic", "cot"])
    assert float(found.sum()) == pytest.approx(1, rel=1e-5)
    assert Classify().probabilities(adaptive, ["x"], ["other"]).tolist() == [[1.0]]
    library.add("coder", library.expert("logic"))
    with pytest.raises(ValueError, match="'code' and 'coder' cannot be told apart, since this model has no token"):
        adaptive.route(["x"])


def test_requests_beyond_the_context(library, monkeypatch):
    """Refused with the numbers; a kind is still found, by the beginning and the end."""
    adaptive, read = made(library), []
    fits, said = "x" * 206 + "y" * 44, "a request of 251 tokens and an answer of up to 6 are more than the 256 tokens"
    for strategy in ("base", "prompt"):
        answer = made(library, strategy).generate([fits], 6)[0]
        assert 1 <= len(answer.ids) <= 6
        with pytest.raises(ValueError, match=said):
            made(library, strategy).generate(["x", fits + "z"], 6)
    with pytest.raises(ValueError, match=said):
        FewShot([(fits + "z", bool)], max_new_tokens=6, progress=False).fit(adaptive)
    own = Generator.prefill
    monkeypatch.setattr(Generator, "prefill", lambda self, ids, *a, **k: read.extend(ids) or own(self, ids, *a, **k))
    scores = adaptive.route(["3+4=", fits])[1].scores
    longest = max(read, key=len)
    before, after = CLASSIFY.format(labels="math, code, logic, other", prompt="|").split("|")
    text = adaptive.generator.text(longest)
    kept = text.removeprefix(before).removesuffix(after + " ")
    assert text == before + kept + after + " " and set(kept) == {"x", "y"} and kept.endswith("y" * 44)
    assert len(longest) + len("logic") + 1 == 256 and len(kept) == 256 - len(before + after + " logic") - 1
    assert sum(scores.values()) == pytest.approx(1, rel=1e-4)
    few = ExpertLibrary(model_with(("a" * 120, "b" * 120)))
    with pytest.raises(ValueError, match="no room for a request in the model's context of 256 tokens: use fewer"):
        made(few).route(["x"])


@pytest.mark.parametrize("strategy", ["prompt", "classifier"])
def test_the_named_expert_answers(library, generator, strategy, monkeypatch):
    labels = iter([0, 2, 3, 1, 3])
    probabilities = torch.nn.functional.one_hot(torch.tensor(list(labels)), 4).float()
    seen = []

    def stated(self, adaptive, requests, names):
        seen.append((self.by, list(requests), names))
        return probabilities

    monkeypatch.setattr(Classify, "probabilities", stated)
    answers = made(library, strategy).generate(PROMPTS, 10)
    assert seen == [("dispatch" if strategy == "classifier" else None, PROMPTS, [*NAMES, "other"])]
    assert [answer.route.label for answer in answers] == ["math", "logic", "other", "code", "other"]
    expected = torch.eye(4)[[0, 2, 0, 1, 0]]
    expected[[2, 4]] = 0  # an unknown kind runs the base
    assert torch.equal(torch.stack([answer.route.weights for answer in answers]), expected)
    for prompt, answer, weights in zip(PROMPTS, answers, expected, strict=True):
        assert answer.ids == written(generator, [generator.encode(prompt)], weights[None], 10)[0]
    assert "takes it for math (100%)" in answers[0].route.reason


def test_callables_decide(library, generator):
    given = ["math", {"math": 0.5, "logic": -1}, None, "poetry", [0.1, 0.2, 0.3, 0.4], torch.full((2, 4), 0.1)]
    given.append(Route(torch.ones(4), "mine", "because"))

    def choose(requests):
        return given[: len(requests)]

    prompts = [*PROMPTS, "a", "b"]
    answers = made(library, choose).generate(prompts, 6)
    labels = [answer.route.label for answer in answers]
    assert labels == ["math", "mixture", "base", "other", "mixture", "mixture", "mine"]
    assert answers[3].route.reason == "choose says 'poetry', for which there is no expert"
    assert answers[1].route.weights.tolist() == [0.5, 0, -1, 0] and not answers[3].route.weights.any()
    for prompt, answer in zip(prompts, answers, strict=True):
        weights = answer.route.weights[None]
        assert answer.ids == written(generator, [generator.encode(prompt)], weights, 6)[0]
    with pytest.raises(ValueError, match="gave 7 routes for 8 requests"):
        made(library, lambda requests: given).generate([*prompts, "c"], 6)
    with pytest.raises(ValueError, match="no expert 'sums'"):
        made(library, lambda requests: [{"sums": 1.0}]).generate(["a"], 6)


def test_a_strategy_may_read_the_requests(library, generator):
    """The base's keys and values are then used for the rows that stay with the base."""
    adaptive = made(library)

    def choose(requests):
        assert relative(adaptive.read(), expected) < 1e-6
        return [None, "math", None, "code", None]

    ids = [generator.encode(p) for p in PROMPTS]
    expected = generator.prefill(ids, torch.zeros(5, 4)).logits_BV
    adaptive = made(library, choose)
    with Counted(library) as counted:
        answers = adaptive.generate(PROMPTS, 5)
    width = max(map(len, ids))
    assert counted.tokens[:2] == [5 * width, 2 * width] and all(n <= 5 for n in counted.tokens[2:])
    plain = made(library, lambda requests: [None, "math", None, "code", None]).generate(PROMPTS, 5)
    assert [a.ids for a in answers] == [a.ids for a in plain]
    with pytest.raises(ValueError, match="no requests in work"):
        adaptive.read()


def test_conversations_go_through_the_chat_template(library):
    template = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}a: "
    adaptive = made(library, "math")
    said = [
        {"role": "user", "content": "3+4="},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "x"},
    ]
    with pytest.raises(ValueError, match="no chat template"):
        adaptive.generate([said], 5)
    adaptive.tokenizer.chat_template = template
    found, expected = adaptive.generate([said, "u: 3+4=\na: 7\nu: x\na: "], 8)
    assert found.ids == expected.ids
    adaptive = Adaptive(library.model, adaptive.tokenizer, library, "prompt")
    found, expected = adaptive.route([said, "x"])  # a kind is that of the last thing said
    assert found.scores == pytest.approx(expected.scores, rel=1e-4)
    for one in ("3+4=", said):
        with pytest.raises(ValueError, match="give a list of requests"):
            adaptive.generate(one)


def test_refused_strategies(library):
    with pytest.raises(ValueError, match=r"'few_shot' is none of base, prompt, classifier, math.*FewShot\(examples\)"):
        made(library, "few_shot")
    with pytest.raises(ValueError, match="no expert 'sums'"):
        made(library, {"sums": 1.0})
    with pytest.raises(ValueError, match="3 is no strategy"):
        made(library, 3)
    bare = ExpertLibrary(llama(**SIZES))
    with pytest.raises(ValueError, match="needs an expert named 'dispatch'"):
        made(bare, "classifier")
    with pytest.raises(ValueError, match="library is one of another model"):
        Adaptive(bare.model, byte_tokenizer(), library)
    with pytest.raises(ValueError, match="a prompt is empty"):
        made(library, "base").generate([""])
    with pytest.raises(ValueError, match="needs examples"):
        FewShot([])
    assert [a.route.label for a in made(bare, "prompt").generate(["3+4="], 3)] == ["other"]
    assert made(bare, "base").generate([], 3) == []


# ----------------------------------------------------------------------------------------------------------------------
# Search


@pytest.mark.parametrize("method", ["cem", "cmaes"])
def test_search_finds_a_known_optimum(method):
    if method == "cmaes":
        pytest.importorskip("cmaes")
    best = torch.tensor([0.15, 0.8, 0.0, 0.45, 1.0, 0.3])
    asked = []

    def evaluate(candidates):
        asked.append(candidates.clone())
        return [(-float((c - best).square().sum()),) for c in candidates]

    first = torch.cat([torch.zeros(1, 6), torch.eye(6)])
    found = search.maximize(evaluate, first, torch.full((6,), 1 / 6), method, generations=40, seed=3, progress=False)
    assert torch.allclose(found.best, best, atol=0.05) and found.score[0] == pytest.approx(-0.0, abs=5e-3)
    assert torch.equal(asked[0][:7], first)
    every = torch.cat(asked)
    assert len(every.unique(dim=0)) == len(every) == found.evaluated  # nothing is evaluated twice
    assert float(every.min()) >= 0 and float(every.max()) <= 1
    assert found.history == sorted(found.history) and len(found.history) == 40
    same = search.maximize(evaluate, first, torch.full((6,), 1 / 6), method, generations=40, seed=3, progress=False)
    other = search.maximize(evaluate, first, torch.full((6,), 1 / 6), method, generations=40, seed=4, progress=False)
    assert torch.equal(same.best, found.best) and not torch.equal(other.best, found.best)


def test_of_equal_candidates_the_first_counts():
    first = torch.cat([torch.zeros(1, 2), torch.eye(2)])
    found = search.maximize(lambda c: [(1.0, 0.5)] * len(c), first, torch.full((2,), 0.5), progress=False)
    assert not found.best.any()
    ties = search.maximize(lambda c: [(1.0, float(x[1])) for x in c], first, torch.full((2,), 0.5), progress=False)
    assert float(ties.best[1]) == 1.0
    with pytest.raises(ValueError, match="population=2 is too small to contain the 3 points"):
        search.maximize(lambda c: [(0.0,)] * len(c), first, torch.full((2,), 0.5), population=2)
    with pytest.raises(ValueError, match="is none of cem, cmaes"):
        search.maximize(lambda c: [(0.0,)] * len(c), first, torch.full((2,), 0.5), method="adam")


def planted(generator, weights, prompts, n=2):
    """Examples that a mixture answers rightly, and hardly another one."""
    answers = written(
        generator, [generator.encode(p) for p in prompts], weights.expand(len(prompts), *weights.shape), n
    )
    texts = [generator.text(answer) for answer in answers]
    return [(p, lambda text, right=right: text == right) for p, right in zip(prompts, texts, strict=True)]


@pytest.mark.parametrize("per_layer", [False, True])
def test_few_shot_finds_the_mixture_that_is_right(library, generator, per_layer, tmp_path):
    hidden = torch.tensor([[0.8, 0.0, 0.9, 0.0], [0.8, 0.0, 0.9, 0.0]] if per_layer else [0.8, 0.0, 0.9, 0.0])
    examples = planted(generator, hidden, [f"{a}{sign}{b}=" for a in range(4) for sign in "+-" for b in (3, 8)])
    few_shot = FewShot(examples, per_layer, seed=1, generations=12, max_new_tokens=2, progress=False)
    seen = []
    own = few_shot.scores
    few_shot.scores = lambda adaptive, mixtures: seen.append(mixtures) or own(adaptive, mixtures)
    adaptive = made(library, few_shot)
    answers = adaptive.generate(["7-3=", "b>a"], 6)
    corners = library.batch([library.weights(name) for name in ("base", *NAMES)])
    assert torch.equal(seen[0][:4], corners[:, None].expand(-1, 2, -1) if per_layer else corners)
    assert all(len(mixtures) <= 32 and not mixtures[..., 3].any() for mixtures in seen)  # never the one that classifies
    singles = [score[0] for score in own(adaptive, seen[0][:4])]
    assert few_shot.found.score[0] == 1.0 > max(singles)
    assert "16 of 16 examples right" in answers[0].route.reason
    assert torch.equal(answers[0].route.weights, few_shot.found.best)
    assert len(seen) <= 12  # searched once
    library.expert(few_shot.found.best).save(tmp_path / "found")
    library.add("found", tmp_path / "found")
    try:
        again = made(library, "found").generate(["7-3=", "b>a"], 6)
    finally:
        library.remove("found")
    assert [a.ids for a in again] == [a.ids for a in answers]
    same = FewShot(examples, per_layer, seed=1, generations=12, max_new_tokens=2, progress=False)
    assert torch.equal(same.fit(adaptive).best, few_shot.found.best)


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_mixture_found_stays_with_its_experts(per_layer):
    """However the library changes; experts that came later have no part in it."""
    library = ExpertLibrary(model_with())
    kept = {name: library.expert(name) for name in library.names}
    few_shot = FewShot([("3+4=", bool)], per_layer, experts=["code", "logic"], population=6, generations=1,
                       max_new_tokens=2, progress=False)  # fmt: skip
    adaptive = made(library, few_shot)
    with pytest.raises(ValueError, match="found no mixture yet"):
        few_shot.mixture(library)
    few_shot.fit(adaptive)
    few_shot.found.best = torch.tensor([0.0, 0.75, 0.25, 0.0]).expand(*((2, 4) if per_layer else (4,)))
    before = adaptive.generate(PROMPTS, 6)
    library.remove("math")  # not in the mixture
    library.remove("code")
    with pytest.raises(ValueError, match="needs the expert 'code', which the library does not have any more"):
        adaptive.route(["x"])
    library.add("math", kept["math"])
    library.add("late", kept["math"])
    library.add("code", kept["code"])
    assert library.names == ("logic", "dispatch", "math", "late", "code")
    after = adaptive.generate(PROMPTS, 6)
    expected = torch.tensor([0.25, 0.0, 0.0, 0.0, 0.75])
    assert torch.equal(after[0].route.weights, expected.expand(2, 5) if per_layer else expected)
    assert [answer.text for answer in after] == [answer.text for answer in before]
    assert "0.25 logic, 0.75 code" in after[0].route.reason


def test_a_population_scores_as_candidate_by_candidate(library, generator):
    examples = planted(generator, torch.tensor([0.5, 0.5, 0.0, 0.0]), ["3+4=", "x", "c>a"])
    few_shot = FewShot(examples, max_new_tokens=2)
    mixtures = torch.rand(9, 4)
    mixtures[4] = torch.tensor([0.5, 0.5, 0.0, 0.0])
    together = few_shot.scores(made(library), mixtures)
    alone = [FewShot(examples, max_new_tokens=2).scores(made(library), m[None])[0] for m in mixtures]
    assert [score[0] for score in together] == [score[0] for score in alone]
    assert [score[1] for score in together] == pytest.approx([score[1] for score in alone], rel=1e-4)
    assert together[4][0] == 1.0 and 0 < together[4][1] < 1


def test_a_generation_is_one_batch(library, monkeypatch):
    """A row for every candidate and example: the model is called once for a token, whatever the population."""
    monkeypatch.setattr(Generator, "rows_that_fit", lambda self, tokens: 10**6)
    examples = [("3+4=", bool), ("x", bool), ("c>a", bool)]
    for population in (5, 15):
        few_shot = FewShot(examples, generations=2, population=population, max_new_tokens=4, progress=False)
        generations, own = [], few_shot.scores

        def scores(adaptive, mixtures, generations=generations, own=own):
            with Counted(library) as counted:
                found = own(adaptive, mixtures)
            generations.append((len(mixtures), counted.shapes))
            return found

        few_shot.scores = scores
        few_shot.fit(made(library, "base"))
        assert len(generations) == 2 and generations[0][0] > 3
        for candidates, shapes in generations:
            assert shapes[0] == (candidates * len(examples), 4)  # all prompts
            assert len(shapes) <= 4 and {length for _, length in shapes[1:]} == {1}


def test_the_base_is_left_only_for_more_right_answers(library):
    every = FewShot([("3+4=", lambda text: True)], generations=3, max_new_tokens=3, progress=False)
    found = every.fit(made(library, "base"))
    assert not found.best.any() and found.score == (1.0, 1.0)
    assert max(every.scores(made(library, "base"), torch.eye(4)))[1] < 1
    route = made(library, every).route(["x"])[0]
    assert route.reason == "1 of 1 examples right: the base" and not route.weights.any()


def test_equal_answers_are_checked_once(library):
    calls = []

    def check(text):
        calls.append(text)
        return len(text) > 3

    few_shot = FewShot([("3+4=", check)], max_new_tokens=6)
    mixtures = torch.zeros(5, 4)
    mixtures[3:, 0] = 1.0
    scores = few_shot.scores(made(library), mixtures)
    assert len(calls) == len(set(calls)) == 2 and scores[0] == scores[2]
    many = []
    few_shot = FewShot(["a", "b"], checker=lambda examples, texts: many.append(examples) or [True] * len(texts))
    few_shot.examples = [("3+4=", None), ("x", None)]
    assert [score[0] for score in few_shot.scores(made(library), mixtures)] == [1.0] * 5
    assert [example[0] for example in many[0]] == ["3+4=", "x", "3+4=", "x"] and len(many) == 1


def test_selection_and_report_are_disjoint(library):
    few_shot = FewShot([("3+4=", bool), ("x", bool)], generations=1, max_new_tokens=3, progress=False)
    adaptive = made(library, few_shot)
    with pytest.raises(ValueError, match=r"1 examples chose the mixture and cannot report on it, the first is '3\+4='"):
        adaptive.check([("9-1=", bool), ("3+4=", bool)])
    assert few_shot.found is None
    report = adaptive.check([("9-1=", lambda text: True), ("y", lambda text: False)], 3)
    assert report.right == [True, False] and report.accuracy == 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Another base


def test_transfer_in_order_does_better_than_shuffled(library, tmp_path):
    """On a model that differs a little, layers in order do what the expert did on its own one."""
    torch.manual_seed(0)
    other = llama(**SIZES, num_hidden_layers=2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    expert = library.expert("math")
    for refused in (expert,):
        with pytest.raises(ValueError, match="was made for"):
            ExpertLibrary(other, {"math": refused})
    ordered, shuffled = transfer(expert, other), transfer(expert, other, shuffle=0)
    assert all(torch.equal(ordered.z[name], expert.z[name]) for name in expert.z)
    for name in expert.z:
        swapped = name.replace("layers.0", "layers.x").replace("layers.1", "layers.0").replace("layers.x", "layers.1")
        assert torch.equal(shuffled.z[name], expert.z[swapped])
    ids = torch.randint(92, (4, 9))
    with torch.no_grad(), library.mix(library.weights("math")[None]):
        own = library.base(ids).logits
    theirs = ExpertLibrary(other, {"ordered": ordered, "mingled": shuffled})
    off = {}
    for name in ("base", "ordered", "mingled"):
        with torch.no_grad(), theirs.mix(theirs.weights(name)[None]):
            off[name] = relative(theirs.base(ids).logits, own)
    assert off["ordered"] < 0.3 * off["mingled"] and off["ordered"] < 0.3 * off["base"]


def test_transfer_to_other_names_and_shapes(library):
    class Other(torch.nn.Module):
        """The same matrices, called otherwise."""

        def __init__(self, width=56):
            super().__init__()
            self.blocks = torch.nn.ModuleList(llama(**SIZES, intermediate_size=width).model.layers)

    moved = transfer(library.expert("code"), Other())
    expert = library.expert("code")
    for name, z in moved.z.items():
        assert torch.equal(z, expert.z[name.replace("blocks.", "model.layers.")])
    assert moved.config.basis_hash is None and "blocks.1.mlp.up_proj" in moved.config.target_modules
    with pytest.raises(ValueError, match=r"\(32,\) numbers for .*gate_proj.weight, .* has \(20,\) singular values"):
        transfer(expert, Other(20))
    with pytest.raises(ValueError, match=r"has 2 vectors for q_proj\.weight, the other model has 3 of it"):
        transfer(expert, torch.nn.ModuleList([Other(), llama(**SIZES).model.layers[0]]))
    with pytest.raises(ValueError, match="only one layer, which cannot be shuffled"):
        transfer(
            Expert({"q_proj.weight": torch.ones(8)}, SVFConfig()),
            torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)}),
            0,
        )


# ----------------------------------------------------------------------------------------------------------------------
# Command line and evaluation


@pytest.fixture(scope="module")
def shipped(tmp_path_factory, library):
    """A folder with a base, its tokenizer, experts and LoRAs."""
    folder = tmp_path_factory.mktemp("shipped")
    library.model.save_pretrained(folder / "experts")
    torch.manual_seed(0)
    base = llama(**SIZES)
    base.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(("math", "code")):
        torch.manual_seed(seed)
        settings = LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        lora = get_peft_model(base, settings)
        lora.save_pretrained(folder / "loras" / name)
        base = lora.unload()
    return folder


def svf(*words):
    args = parser().parse_args(list(map(str, words)))
    args.run(args)


def model_words(shipped):
    return "--base", shipped / "base", "--experts", *[shipped / "experts" / name for name in (*NAMES, "dispatch")]


def test_adapt_from_the_shell(shipped, library, capsys, tmp_path):
    words = [*model_words(shipped), "--max-new-tokens", 6]
    svf("adapt", *words, "--strategy", "classifier", "--json", "--prompt", "3+4=", "x")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = made(library, "classifier").generate(["3+4=", "x"], 6)
    for one, answer in zip(found, expected, strict=True):
        assert one["answer"] == answer.text and one["route"]["label"] == answer.route.label
        assert list(one["route"]["weights"].values()) == answer.route.weights.tolist()
        assert sum(one["route"]["scores"].values()) == pytest.approx(1)
    right = made(library, "logic").generate(["3+4=", "9-1="], 6)
    lines = [{"prompt": p, "answer": a.text} for p, a in zip(("3+4=", "9-1="), right, strict=True)]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    few_shot = ["--strategy", "few_shot", "--examples", tmp_path / "examples.jsonl", "--generations", 1]
    svf("adapt", *words, *few_shot, "--save", tmp_path / "mixture", "--prompt", "x")
    assert "[few_shot: 2 of 2 examples right" in capsys.readouterr().out
    assert Expert.load(tmp_path / "mixture").config.basis_hash == library.expert("logic").config.basis_hash
    svf("transfer", shipped / "experts" / "math", tmp_path / "moved", "--to", shipped / "base", "--shuffle", 1)
    assert "shuffled with seed 1" in capsys.readouterr().out
    ExpertLibrary(AutoModelForCausalLM.from_pretrained(shipped / "base"), [tmp_path / "moved"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strategy", "poetry"], "error: strategy 'poetry' is none of base, prompt, classifier, few_shot, math"),
        (["--strategy", "few_shot"], "error: few_shot needs --examples FILE"),
        (["--save", "x"], "error: --save keeps the mixture that few_shot finds"),
        (["--experts", "nowhere"], "error: nowhere is no folder, and could not be fetched"),
        (["--experts", "a/math", "b/math"], "error: two of a/math, b/math are called math; write NAME=FOLDER"),
    ],
)
def test_mistakes_on_the_command_line(shipped, words, message, monkeypatch, capsys):
    argv = ["svf", "adapt", *model_words(shipped), *words, "--prompt", "x"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(message) and error.count("\n") == 1


def test_a_long_prompt_on_the_command_line(shipped, monkeypatch, capsys):
    argv = ["svf", "adapt", *model_words(shipped), "--strategy", "classifier", "--prompt", "x" * 250]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err.splitlines()[-1]  # after the bar of what was loaded
    assert end.value.code == 2
    assert error.startswith("error: a request of 250 tokens and an answer of up to 24 are more than the 256 tokens")


@pytest.mark.parametrize(
    ("command", "option", "bad", "good", "message"),
    [
        *[("adapt", "--" + name, "0", "1", "0 is less than 1") for name in ("generations", "population")],
        *[("eval", "--" + name, "-3", "3", "-3 is less than 1") for name in ("n", "seeds", "shots", "max-new-tokens")],
        *[("adapt", "--temperature", bad, "0", "is no finite number from 0 on") for bad in ("-1", "nan", "inf")],
        *[("serve", "--max-seconds", bad, "0.5", "is no finite number above 0") for bad in ("0", "-1", "nan", "inf")],
        ("eval", "--n", "ten", "10", "invalid positive value: 'ten'"),
    ],
)
def test_numbers_on_the_command_line(command, option, bad, good, message, capsys):
    words = [command, *(["--prompt", "x"] if command == "adapt" else [])]
    taken = vars(parser().parse_args([*words, f"{option}={good}"]))
    assert taken[option[2:].replace("-", "_")] == float(good)
    with pytest.raises(SystemExit) as end:
        parser().parse_args([*words, f"{option}={bad}"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and f"error: argument {option}: " in error and message in error


@pytest.mark.parametrize("content", ["[]", "no JSON", '{"settings": 1}'])
def test_a_file_that_is_no_evaluation(shipped, content, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.json"
    out.write_text(content)
    argv = ["svf", "eval", *model_words(shipped), "--tasks", "math", "--out", out]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and out.read_text() == content
    assert capsys.readouterr().err == f"error: {out} is no file of an evaluation; give another one with --out\n"


def test_evaluation_goes_on_where_it_stopped(shipped, tmp_path, capsys, monkeypatch):
    from svf import evaluate

    words = ["eval", *model_words(shipped), "--lora", shipped / "loras" / "math", shipped / "loras" / "code"]
    words += ["--tasks", "math", "longer", "--seeds", 2, "--n", 6, "--shots", 2]
    words += ["--generations", 1, "--population", 4, "--max-new-tokens", 3]
    svf(*words, "--out", tmp_path / "whole.json")
    shown = capsys.readouterr().out
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert len(whole["cells"]) == len(evaluate.STRATEGIES) * 2 * 2
    assert {cell["n"] for cell in whole["cells"].values()} == {6}
    accuracy = whole["summary"]["accuracy"]
    assert all(entries["longer"]["n"] == entries["math"]["n"] == 12 for entries in accuracy.values())
    assert all(sum(cell["routes"].values()) == 6 for cell in whole["cells"].values())
    assert all("| " + strategy + " |" in shown for strategy in evaluate.STRATEGIES)
    assert "prompt names the right kind for, per cent: math" in shown

    own, done = evaluate.Evaluation.cell, []

    def stops(self, *args):
        if len(done) % 16 == 15:
            done.append(None)
            raise KeyboardInterrupt
        done.append(args)
        return own(self, *args)

    monkeypatch.setattr(evaluate.Evaluation, "cell", stops)
    for _ in range(20):
        try:
            svf(*words, "--out", tmp_path / "parts.json")
            break
        except KeyboardInterrupt:
            continue
    cells = [args for args in done if args is not None]
    assert len(cells) == len(set(cells)) == len(whole["cells"]) and done.count(None) == 2
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="holds an evaluation with other settings"):
        svf(*words, "--seeds", 3, "--out", tmp_path / "parts.json")


def test_prompts_to_choose_by_are_not_reported_on(tmp_path, monkeypatch):
    from svf.evaluate import Evaluation, Settings

    run = Evaluation(
        Settings("b", {"math": "m"}, {}, ["math"], ["base"], [0], n=5, shots=3), tmp_path / "x", None, "cpu"
    )
    shots, test = run.samples("math", 0)
    assert (len(shots), len(test)) == (3, 5)
    monkeypatch.setattr(run, "samples", lambda task, seed: (shots, [*test[:4], shots[1]]))
    with pytest.raises(ValueError, match="math has 1 prompts both to choose by and to report on"):
        run.cell("base", "math", 0)


def test_experts_of_another_model_are_evaluated_with_transfer(shipped, library, tmp_path):
    from svf.evaluate import Evaluation, Settings

    torch.manual_seed(1)
    llama(**SIZES).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    words = ["eval", "--base", tmp_path / "other", "--experts", shipped / "experts" / "math", "--tasks", "math"]
    words += ["--strategies", "best_single", "--seeds", 1, "--n", 2, "--shots", 1, "--max-new-tokens", 2]
    words += ["--out", tmp_path / "x.json"]
    with pytest.raises(ValueError, match="was made for"):
        svf(*words)
    assert not (tmp_path / "x.json").exists()
    svf(*words, "--transfer")
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["settings"]["transfer"] and found["cells"]["best_single/math/0"]["routes"] == {"math": 2}
    settings = Settings(str(tmp_path / "other"), {"math": str(shipped / "experts/math")}, {}, [], [], [], transfer=True)
    moved = Evaluation(settings, tmp_path / "y.json", byte_tokenizer(), "cpu").library.expert("math")
    own = library.expert("math")
    assert moved.z.keys() == own.z.keys() and all(torch.allclose(moved.z[n], own.z[n], atol=1e-6) for n in own.z)
    with pytest.raises(ValueError, match="holds an evaluation with other settings"):
        svf(*words)


def test_the_shipped_experts_and_what_the_classifier_makes_of_requests():
    """As `python -m svf adapt` has them by default, on the shipped base: 38 of 40 prompts of every domain at least."""
    args = parser().parse_args(["adapt", "--strategy", "classifier", "--device", "cpu", "--prompt", "x"])
    adaptive = load(args, args.strategy, ("classifier",))
    assert {*adaptive.library.names} == {*text.DOMAINS, "dispatch"}
    for name in adaptive.library.names:
        assert all(z.abs().max() > 0 for z in adaptive.library.expert(name).z.values())
    prompts = [sample.prompt for domain in text.DOMAINS for sample in text.samples(domain, "test", 40)]
    labels = [route.label for route in adaptive.route(prompts)]
    for i, domain in enumerate(text.DOMAINS):
        assert labels[40 * i : 40 * i + 40].count(domain) >= 38, (domain, labels[40 * i : 40 * i + 40])


def test_cells_of_other_weights_are_not_gone_on_with(shipped, tmp_path):
    from svf.evaluate import Evaluation, Settings, content

    for part in ("base", "experts", "loras"):
        shutil.copytree(shipped / part, tmp_path / part)
    base, expert, lora = (tmp_path / part for part in ("base", "experts/math", "loras/math"))
    settings = Settings(str(base), {"math": str(expert)}, {"math": str(lora)}, ["math"], ["base"], [0])

    def evaluation():
        return Evaluation(settings, tmp_path / "x.json", byte_tokenizer(), "cpu")

    first = evaluation()
    first.cells = {"base/math/0": {"right": 1, "n": 200, "routes": {"base": 200}}}
    first.write()
    kept = (tmp_path / "x.json").read_text()
    assert evaluation().cells == first.cells
    for path in (base / "model.safetensors", expert / "adapter_model.safetensors", lora / "adapter_model.safetensors"):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ValueError, match="holds an evaluation with other settings; give another file with --out"):
            evaluation()
        path.write_bytes(before)
    assert evaluation().cells == first.cells
    old = json.loads(kept)
    del old["settings"]["content"]
    (tmp_path / "x.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="holds an evaluation with other settings"):
        evaluation()
    assert content("owner/name") == "owner/name"
    for broken in ("[]", "{", "{}", '{"cells": []}'):
        (tmp_path / "x.json").write_text(broken)
        with pytest.raises(ValueError, match=r"x\.json is no file of an evaluation; give another one with --out"):
            evaluation()
        assert (tmp_path / "x.json").read_text() == broken


def test_the_summary_is_right(tmp_path):
    from svf.evaluate import Evaluation, Settings

    tasks = ["math", "longer", "words"]
    settings = Settings("b", {"math": "m"}, {}, tasks, ["base", "prompt"], [0, 1], n=10)
    run = Evaluation(settings, tmp_path / "x.json", None, "cpu")
    right = {
        "base": {"math": (2, 4), "longer": (5, 5), "words": (1, 3)},
        "prompt": {"math": (3, 7), "longer": (5, 4), "words": (2, 5)},
    }
    for strategy, tasks in right.items():
        for task, by_seed in tasks.items():
            for seed, count in enumerate(by_seed):
                routes = {"math": 9, "other": 1} if strategy == "prompt" else {"base": 10}
                run.cells[f"{strategy}/{task}/{seed}"] = {"right": count, "n": 10, "routes": routes}
    summary = run.summary()
    prompt = summary["accuracy"]["prompt"]
    assert prompt["math"]["mean"] == 50 and prompt["math"]["n"] == 20
    # two seeds: t(0.975, 1) = 12.7062, standard error of 30 and 70 is 20, of the differences 10 and 30 it is 10
    assert prompt["math"]["half"] == pytest.approx(254.124, abs=0.01)
    assert prompt["math"]["over_base"] == {"mean": 20, "half": pytest.approx(127.062, abs=0.01)}
    assert prompt["unseen"]["mean"] == 40 and prompt["unseen"]["n"] == 40
    assert prompt["unseen"]["over_base"]["mean"] == 5
    assert summary["routed_rightly"] == {"prompt": {"math": {"mean": 90, "half": 0}}}
    one = Evaluation(
        Settings("b", {"math": "m"}, {}, ["math"], ["base", "prompt"], [1], n=10), tmp_path / "1.json", None, "cpu"
    )
    one.cells = run.cells
    assert "| prompt | 70.0 (+30.0) |" in one.table()  # one seed has no interval
    rows = [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(30)]
    for split in ("train", "test"):
        (tmp_path / "gsm8k").mkdir(exist_ok=True)
        lines = [json.dumps(row | {"question": f"{split} {row['question']}"}) for row in rows]
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("\n".join(lines))
    settings = Settings("b", {"math": "m"}, {}, ["gsm8k"], ["base"], [0], n=20, shots=4, root=str(tmp_path))
    run = Evaluation(settings, tmp_path / "x.json", byte_tokenizer(), "cpu")
    shots, test = run.samples("gsm8k", 0)
    assert len(shots) == 4 and len(test) == 20 and all("train" in s.prompt for s in shots)
    assert run.samples("gsm8k", 0) == (shots, test) != run.samples("gsm8k", 1)
    with pytest.raises(ValueError, match="code run what the model writes: add --allow-code-execution"):
        Evaluation(Settings("b", {}, {}, ["code"], ["base"], [0]), tmp_path / "y.json", None, "cpu")
    with pytest.raises(ValueError, match="'poem' is none of the tasks"):
        Evaluation(Settings("b", {}, {}, ["poem"], ["base"], [0]), tmp_path / "y.json", None, "cpu")
    with pytest.raises(ValueError, match="classifier needs an expert named dispatch"):
        Evaluation(Settings("b", {}, {}, ["math"], ["classifier"], [0]), tmp_path / "y.json", None, "cpu")


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
def test_rows_are_as_alone_on_a_gpu(dtype, tolerance):
    library = ExpertLibrary(model_with(by=0.3, hidden_size=256, intermediate_size=704).to("cuda", dtype))
    generator = Generator(library, byte_tokenizer())
    ids, weights = [generator.encode(p) for p in PROMPTS], torch.tensor(MIXTURES)
    start = generator.prefill(ids, weights)
    assert start.logits_BV.device.type == "cuda" and 1 <= len(generator.batches([64] * 1000, 64)) <= 4
    for i in range(len(ids)):
        alone = generator.prefill(ids[i : i + 1], weights[i : i + 1])
        assert relative(start.logits_BV[i], alone.logits_BV[0]) < tolerance
    if dtype == torch.float32:
        together = generator.decode(start, weights, 12)[0]
        assert together == [written(generator, ids[i : i + 1], weights[i : i + 1])[0] for i in range(len(ids))]
        base = generator.prefill(ids, weights * 0)
        again = generator.prefill(ids, weights, base=base)
        assert generator.decode(again, weights, 12)[0] == together


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_few_shot_and_labels_on_a_gpu():
    library = ExpertLibrary(model_with().cuda())
    generator = Generator(library, byte_tokenizer())
    hidden = torch.tensor([0.8, 0.0, 0.9, 0.0])
    examples = planted(generator, hidden, [f"{a}{sign}{b}=" for a in range(4) for sign in "+-" for b in (3, 8)])
    few_shot = FewShot(examples, seed=1, generations=12, max_new_tokens=2, progress=False)
    adaptive = made(library, few_shot)
    assert few_shot.fit(adaptive).score[0] == 1.0
    on_gpu = Classify("dispatch").probabilities(adaptive, PROMPTS, ["math", "code", "cot", "co"])
    library.model.cpu()
    on_cpu = Classify("dispatch").probabilities(adaptive, PROMPTS, ["math", "code", "cot", "co"])
    assert torch.allclose(on_gpu, on_cpu, rtol=1e-3)
