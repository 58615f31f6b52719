"""python -m svf.bench: what an SVF adapter costs, beside LoRA and full fine-tuning of the same modules.

No number is printed unless the parity checks passed in the same run. Shapes are Llama-3-8B's with random weights on a
GPU, small ones elsewhere. Timing needs no true singular vectors, any orthogonal matrices cost the same; the part
`decompose` times the real thing.

    accuracy    bf16 logits of merged and unmerged adapters against fp32 arithmetic
    step        a training step (forward, backward, AdamW) and its peak memory; "one_sided experts": rows of several
                experts, which train at once
    decode      tokens a second of `generate`, and a prefill, without adapter, with, merged, mixed by row
    switch      changing a mixture, with what the first forward after it pays extra, and set_adapter beside PEFT's IA3
    decompose   all linear weights of the model, from weights to bases
    route       32 requests with 32 different mixtures in one batch, beside the same batch with one mixture
    cem         a few-shot search, beside putting every candidate's weights into the model one after another

The last two are on the shipped base with its experts; `route` on Llama-3-8B's shapes too where there is a GPU. The
server under parallel clients is by itself: python -m svf.bench serve --help.
"""

import argparse
import contextlib
import gc
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from svf import Adaptive, ExpertLibrary, FewShot, SVFConfig, decompose, spectral
from svf.decompose import Basis, Matrix
from svf.generate import Generator

MLP = ["gate_proj", "up_proj", "down_proj"]
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LARGE |= {"vocab_size": 128256, "max_position_embeddings": 8192}
SMALL = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 2048, "max_position_embeddings": 2048}
EXPERTS = 4
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)

warnings.filterwarnings("ignore")


def base(layers: int) -> LlamaForCausalLM:
    """A random model on the device, frozen."""
    torch.manual_seed(0)
    config = LlamaConfig(**(LARGE if GPU else SMALL), num_hidden_layers=layers, tie_word_embeddings=False)
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(config).requires_grad_(False).train()
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def orthogonal_bases() -> Iterator[None]:
    """Random orthogonal matrices for bases, each in memory of its own."""
    made: dict[int, Tensor] = {}

    def bases(matrices: list[Matrix], options, known, top_k) -> Iterator[Basis]:
        for matrix in matrices:
            n = matrix.directions
            if n not in made:
                made[n] = torch.linalg.qr(torch.randn(n, n, device=DEVICE))[0].to(DTYPE)
            yield Basis(made[n].clone(), torch.linspace(2, 0.1, n, dtype=torch.float64, device=DEVICE))

    true = decompose.bases, decompose.digests
    decompose.bases, decompose.digests = bases, lambda matrices: ["" for _ in matrices]
    try:
        yield
    finally:
        decompose.bases, decompose.digests = true


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], times: int, warm: int = 2) -> float:
    """Median over `times` runs."""
    taken = []
    for i in range(warm + times):
        wait()
        start = time.perf_counter()
        run()
        wait()
        if i >= warm:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def free() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> float | None:
    """GiB of GPU memory since `free`; None where there is no GPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if GPU else None


def write(path: str) -> None:
    """All numbers as JSON, which has no NaN: null instead."""
    whole = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in RESULTS]
    with open(path, "w") as file:
        json.dump(whole, file, indent=1, allow_nan=False)


def say(part: str, **values) -> None:
    """One line to read, and the same as JSON."""
    shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    print(f"{part:10} {shown}", flush=True)
    RESULTS.append({"part": part, **values})


RESULTS: list[dict] = []


# ----------------------------------------------------------------------------------------------------------------------
# Parity


def parity() -> list[str]:
    """What is wrong, nothing if nothing is."""
    wrong = []
    torch.manual_seed(0)
    for n_out, n_in, tokens in ((96, 64, 20), (96, 64, 200), (64, 96, 20), (64, 96, 200), (64, 64, 90)):
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
            linear = nn.Sequential(nn.Linear(n_in, n_out)).to(DEVICE, dtype)
            x = torch.randn(tokens, n_in, device=DEVICE, dtype=dtype)
            upstream = torch.randn(tokens, n_out, device=DEVICE, dtype=dtype)
            plain = linear(x)
            d = 0.2 * torch.randn(min(n_out, n_in), device=DEVICE)
            for form in ("one_sided", "factored", "merged"):
                config = SVFConfig(target_modules=["0"], form=form, decomposition={"cache": False})
                model = get_peft_model(linear, config)
                z = model.base_model.model[0].svf_z["default"]
                if form != "factored" and not torch.equal(model(x), plain):
                    wrong.append(f"{form} is not the base at init ({n_out}x{n_in}, {dtype})")
                z.data.copy_(d)
                y = model(x)
                y.backward(upstream)
                weight = linear[0].base_layer.weight.double()
                u, s, vh = torch.linalg.svd(weight, full_matrices=False)
                e = (1 + d.double()).requires_grad_()
                expected = F.linear(x.double(), (u * (s * e)) @ vh, linear[0].bias.double())
                expected.backward(upstream.double())
                for name, ours, theirs in (("outputs", y, expected), ("gradients", z.grad, e.grad)):
                    error = float((ours.double() - theirs).norm() / theirs.norm())
                    if not error < tolerance:
                        wrong.append(f"{name} of {form} off by {error:.2g} ({n_out}x{n_in}, {tokens} tokens, {dtype})")
                linear = model.unload()
            wrong += rows_differ(linear, x, upstream, tolerance)
    return wrong


def rows_differ(linear: nn.Module, x: Tensor, upstream: Tensor, tolerance: float) -> list[str]:
    """What is wrong about rows with mixtures of their own, against the rows one by one."""
    config = SVFConfig(target_modules=["0"], init_std=0.2, decomposition={"cache": False})
    model = get_peft_model(linear, config, "a")
    model.add_adapter("b", config)
    model.set_requires_grad(["a", "b"])
    weights = torch.rand(len(x), 2, device=DEVICE)
    zs = [model.base_model.model[0].svf_z[name] for name in "ab"]
    with model.mix(weights):
        together = model(x)
    gradients = torch.autograd.grad(together, zs, upstream)
    alone = []
    for i in range(len(x)):
        with model.mix(weights[i]):
            alone.append(model(x[i : i + 1]))
    wanted = torch.autograd.grad(torch.cat(alone), zs, upstream)
    model.unload()
    found = []
    pairs = (("outputs", together, torch.cat(alone)), ("gradients", torch.cat(gradients), torch.cat(wanted)))
    for name, ours, theirs in pairs:
        error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        if not error < tolerance:
            found.append(f"{name} of mixed rows off by {error:.2g} ({tuple(linear[0].weight.shape)}, {x.dtype})")
    return found


@torch.no_grad()
def accuracy(seeds: int = 5) -> None:
    """Error of bf16 logits against fp32 arithmetic with the same weights and z: adapter unmerged, and merged."""
    ratios = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=4)).to(DEVICE, torch.bfloat16).eval()
        options = {"cache": False, "progress": False}
        adapted = get_peft_model(model, SVFConfig(target_modules="all-linear", init_std=0.1, decomposition=options))
        ids = torch.randint(SMALL["vocab_size"], (8, 64), device=DEVICE)
        unmerged = adapted(input_ids=ids).logits.float()
        adapted.merge_adapter()
        merged = adapted(input_ids=ids).logits.float()
        adapted.unmerge_adapter()
        exact = adapted.float()(input_ids=ids).logits
        errors = [float((logits - exact).square().mean().sqrt()) for logits in (unmerged, merged)]
        ratios.append(errors[1] / errors[0])
        say("accuracy", seed=seed, unmerged_rms=errors[0], merged_rms=errors[1], ratio=ratios[-1])
    say("accuracy", lowest=min(ratios), highest=max(ratios))


# ----------------------------------------------------------------------------------------------------------------------
# Training steps


class Published(nn.Module):
    """The published mechanics for one matrix: U, S, V kept, the weight composed densely, a dense gradient, and back."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        n = min(linear.weight.shape)
        make = {"device": DEVICE, "dtype": DTYPE}
        q = torch.linalg.qr(torch.randn(max(linear.weight.shape), n, device=DEVICE))[0].to(DTYPE)
        square = torch.linalg.qr(torch.randn(n, n, device=DEVICE))[0].to(DTYPE)
        self.u, self.v = (q, square) if linear.out_features >= linear.in_features else (square, q)
        self.s = torch.linspace(2, 0.1, n, **make)
        self.p = nn.Parameter(0.1 + 0.01 * torch.randn(n, **make))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.sigmoid(self.p)
        weight = self.u @ torch.diag_embed(self.s * mask) @ self.v.T * (self.s.sum() / (self.s * mask).sum())
        return F.linear(x, weight)


def publish(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if name.endswith(tuple(MLP)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Published(module))
    return model


def method(name: str, model: nn.Module) -> nn.Module:
    if name == "lora r16":
        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=MLP))
    if name == "full":
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(any(f".{m}." in key for m in MLP))
        return model
    if name == "published":
        return publish(model)
    spectral.FOLD_FROM = float("inf") if "unfolded" in name else 2.0
    adapted = get_peft_model(model, SVFConfig(target_modules=MLP, form=name.split()[0]))
    if "experts" in name:
        for i in range(1, EXPERTS):
            adapted.add_adapter(str(i), SVFConfig(target_modules=MLP))
        adapted.set_requires_grad(list(adapted.peft_config))
    return adapted


def step(layers: int, batch: int, tokens: int, methods: list[str], times: int, rounds: int) -> None:
    """Every method in turn, `rounds` times over: clocks drift, the lowest round counts."""
    results: dict[str, list[float]] = {}
    memory, counts = {}, {}
    model = base(layers)
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=DEVICE)
    for turn in range(rounds):
        for name in methods:
            if turn and name in ("full", "published"):
                continue
            if name == "published":  # it replaces the weights: a model of its own
                model = None
                free()
                model = base(layers)
            free()
            with orthogonal_bases():
                adapted = method(name, model).train()
            parameters = [p for p in adapted.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=GPU)
            counts[name] = sum(p.numel() for p in parameters)

            # rows of different experts, all of which train
            rows = torch.eye(EXPERTS, device=DEVICE)[torch.arange(batch) % EXPERTS] if "experts" in name else None

            def train(adapted=adapted, optimizer=optimizer, rows=rows) -> None:
                optimizer.zero_grad()
                with contextlib.nullcontext() if rows is None else adapted.mix(rows):
                    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()

            try:
                taken = seconds(train, times, warm=3)
                results.setdefault(name, []).append(1e3 * taken)
                memory[name] = max(peak(), memory.get(name, 0.0)) if GPU else None
            except torch.OutOfMemoryError:
                say("step", method=name, error="out of memory")
            del optimizer, parameters, train
            if name == "full":
                for parameter in model.parameters():
                    parameter.grad = None
                model.requires_grad_(False)
            elif name == "published":
                del adapted
                model = None
                free()
                model = base(layers)
            else:
                model = adapted.unload()
                model.requires_grad_(False)
            adapted = None
            spectral.FOLD_FROM = 2.0
    for name, taken in results.items():
        say(
            "step",
            layers=layers,
            batch=f"{batch}x{tokens}",
            method=f"{name:18}",
            ms=min(taken),
            rounds=" ".join(f"{t:.1f}" for t in taken),
            GiB=memory[name],
            trained=counts[name],
        )


# ----------------------------------------------------------------------------------------------------------------------
# Inference


def decode(layers: int, new: int = 32) -> None:
    model = base(layers).eval()
    torch.manual_seed(1)
    for batch, prompt in ((1, 64), (32, 512)) if GPU else ((1, 16), (8, 32)):
        ids = torch.randint(model.config.vocab_size, (batch, prompt), device=DEVICE)
        mask = torch.ones_like(ids)
        different = torch.rand(batch, 2).to(DEVICE)

        def measure(name: str, adapted: nn.Module, weights: Tensor | None = None, batch=batch, ids=ids, mask=mask):
            with torch.no_grad(), adapted.mix(weights) if weights is not None else contextlib.nullcontext():
                prefill = seconds(lambda: adapted(input_ids=ids, use_cache=False, logits_to_keep=1), 5)
                options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
                long = seconds(lambda: adapted.generate(input_ids=ids, attention_mask=mask, **options), 3, 1)
                options |= {"max_new_tokens": 1, "min_new_tokens": 1}
                short = seconds(lambda: adapted.generate(input_ids=ids, attention_mask=mask, **options), 3, 1)
            rate = batch * (new - 1) / (long - short)
            say("decode", layers=layers, batch=f"{batch}x{ids.shape[1]}", method=f"{name:22}",
                prefill_ms=1e3 * prefill, tokens_per_s=rate)  # fmt: skip

        measure("base", model)
        lora = get_peft_model(model, LoraConfig(r=16, target_modules=MLP, task_type="CAUSAL_LM")).eval()
        measure("lora r16", lora)
        model = lora.unload()
        with orthogonal_bases():
            config = SVFConfig(target_modules=MLP, init_std=0.1, task_type="CAUSAL_LM")
            adapted = get_peft_model(model, config, "a").eval()
            adapted.add_adapter("b", config)
        measure("svf", adapted)
        measure("svf, one mixture", adapted, different[0])
        measure("svf, rows all equal", adapted, different[:1].expand(batch, 2))
        measure("svf, rows all different", adapted, different)
        adapted.merge_adapter()
        measure("svf merged", adapted)
        adapted.unmerge_adapter()
        model = adapted.unload()


def switch(layers: int) -> None:
    model = base(layers).eval()
    ia3 = get_peft_model(model, IA3Config(target_modules=MLP, feedforward_modules=["down_proj"]), "a")
    ia3.add_adapter("b", IA3Config(target_modules=MLP, feedforward_modules=["down_proj"]))

    def both(adapted: nn.Module) -> None:
        adapted.set_adapter("a")
        adapted.set_adapter("b")

    say("switch", what="set_adapter of ia3", ms=1e3 * seconds(lambda: both(ia3), 50) / 2)
    with orthogonal_bases():
        config = SVFConfig(target_modules=MLP)
        adapted = get_peft_model(ia3.unload(), config, "a")
        adapted.add_adapter("b", config)
    say("switch", what="set_adapter of svf", ms=1e3 * seconds(lambda: both(adapted), 50) / 2)
    different = torch.rand(32, 2, device=DEVICE)
    for what, weights in (("of 32 rows", different), ("for all rows", different[0])):
        alone, first = mixture_change(adapted, weights, 50)
        say("switch", what=f"mixture {what}", ms=1e3 * alone, with_first_forward_ms=1e3 * (alone + first))
    merge = 1e3 * seconds(lambda: (adapted.merge_adapter(), adapted.unmerge_adapter()), 3)
    say("switch", what="merge and unmerge", ms=merge)


@torch.no_grad()
def mixture_change(adapted: nn.Module, weights: Tensor, times: int, warm: int = 3) -> tuple[float, float]:
    """Seconds: entering a mixture and leaving it, and what the first forward in it takes more than the second one."""
    ids = torch.zeros(32, 1, dtype=torch.long, device=DEVICE)
    adapted.requires_grad_(False)  # experts that train are mixed anew in every forward

    def forward() -> None:
        adapted(input_ids=ids, use_cache=False)

    def change() -> None:
        with adapted.mix(weights):
            pass

    more = []
    for _ in range(warm + times):
        with adapted.mix(weights):
            more.append(seconds(forward, 1, warm=0) - seconds(forward, 1, warm=0))
    return seconds(change, times), statistics.median(more[warm:])


def decomposition(layers: int) -> None:
    model = base(layers)
    free()
    solve(model, "q_proj")  # the first call loads libraries
    taken, adapted = solve(model, "all-linear")
    count = sum(1 for _ in adapted.base_model.layers())
    say("decompose", layers=layers, what="all-linear", matrices=count, s=taken, GiB=peak())


def solve(model: nn.Module, targets: str) -> tuple[float, nn.Module]:
    wait()
    start = time.perf_counter()
    config = SVFConfig(
        target_modules=targets if targets == "all-linear" else [targets],
        layers_to_transform=None if targets == "all-linear" else [0],
        decomposition={"cache": False, "progress": False},
    )
    adapted = get_peft_model(model, config)
    wait()
    taken = time.perf_counter() - start
    if targets != "all-linear":
        adapted.unload()
    return taken, adapted


# ----------------------------------------------------------------------------------------------------------------------
# Requests


def shipped() -> tuple[ExpertLibrary, object]:
    """The shipped base with its experts and its tokenizer; random experts where none are shipped."""
    from transformers import AutoTokenizer

    from svf.__main__ import ASSETS, named
    from svf.experts import load_base

    base = load_base(ASSETS / "base").to(DEVICE)
    library = ExpertLibrary(base, named(None, "experts"))
    if not library.names:
        torch.manual_seed(0)
        library = ExpertLibrary(with_experts(base))
    return library, AutoTokenizer.from_pretrained(ASSETS / "base")


def with_experts(model: nn.Module) -> nn.Module:
    config = SVFConfig(target_modules=MLP, init_std=0.1, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, "math")
    for name in ("code", "logic"):
        adapted.add_adapter(name, config)
    return adapted.requires_grad_(False).eval()


def route(rows: int = 32, new: int = 64, rounds: int = 7) -> None:
    """Tokens a second, prompts and answers, of one mixture for all rows and of one for each."""
    from tasks import text

    library, tokenizer = shipped()
    generator = Generator(library, tokenizer)
    domains = (*text.DOMAINS, *text.UNSEEN)
    prompts = [text.samples(domains[i % len(domains)], "test", rows)[i].prompt for i in range(rows)]
    compare_routes("shipped base", generator, [generator.encode(prompt) for prompt in prompts], new, rounds)
    if GPU:
        del library, generator
        free()
        with orthogonal_bases():
            library = ExpertLibrary(with_experts(base(32).eval()))
        generator = Generator(library, None)
        ids = torch.randint(LARGE["vocab_size"], (rows, 256)).tolist()
        compare_routes("8B shapes", generator, ids, new, rounds)


def compare_routes(what: str, generator: Generator, ids: list[list[int]], new: int, rounds: int) -> None:
    torch.manual_seed(0)
    different = torch.rand(len(ids), len(generator.library.names))
    same = different[:1].expand_as(different).contiguous()
    together = generator.prefill(ids, different).logits_BV.float()
    alone = torch.cat(
        [generator.prefill(ids[i : i + 1], different[i : i + 1]).logits_BV for i in range(len(ids))]
    ).float()
    error = float((together - alone).norm() / alone.norm())
    if error > (5e-2 if generator.library.base.dtype == torch.bfloat16 else 1e-4):
        raise SystemExit(f"rows of a mixed batch are off by {error:.2g} from rows alone, no numbers")
    taken: dict[str, list[float]] = {"one route": [], "different routes": []}
    for _ in range(rounds + 1):
        for name, weights in (("one route", same), ("different routes", different)):
            taken[name].append(seconds(lambda weights=weights: generate(generator, ids, weights, new), 1, warm=0))
    rates = {name: len(ids) * new / statistics.median(times[1:]) for name, times in taken.items()}
    for name, rate in rates.items():
        say("route", what=what, batch=len(ids), method=f"{name:16}", tokens_per_s=rate)
    pairs = zip(taken["one route"][1:], taken["different routes"][1:], strict=True)
    say("route", what=what, share=statistics.median(one / many for one, many in pairs), error=error)


def generate(generator: Generator, ids: list[list[int]], weights: Tensor, new: int) -> list[list[int]]:
    return generator.decode(generator.prefill(ids, weights), weights, new, ignore_eos=True)[0]


def cem(task: str = "longer", shots: int = 10, population: int = 32, generations: int = 20, compared: int = 3) -> None:
    """A whole search, and its first `compared` generations candidate by candidate."""
    from tasks import text

    library, tokenizer = shipped()
    adaptive = Adaptive(library.model, tokenizer, library, "base")
    settings = {"population": population, "generations": generations, "max_new_tokens": 24, "progress": False}
    few_shot = FewShot(text.samples(task, "selection", shots), checker=text.check, **settings)
    populations, taken = [], []
    scores = few_shot.scores

    def timed(adaptive: Adaptive, mixtures: Tensor) -> list:
        wait()
        start = time.perf_counter()
        found = scores(adaptive, mixtures)
        wait()
        taken.append(time.perf_counter() - start)
        populations.append((mixtures, found))
        return found

    few_shot.scores = timed
    few_shot.fit(adaptive)
    loaded, together = [], []
    for mixtures, found in populations[1 : 1 + compared]:
        together.append(seconds(lambda mixtures=mixtures: scores(adaptive, mixtures), 1, warm=0))
        wait()
        start = time.perf_counter()
        one_by_one = [
            by_loading(library, lambda: scores(adaptive, torch.zeros(1, len(library.names)))[0], m) for m in mixtures
        ]
        wait()
        loaded.append(time.perf_counter() - start)
        differing = sum(abs(a[0] - b[0]) > 1e-9 for a, b in zip(found, one_by_one, strict=True))
        if differing > 0.05 * len(found):
            raise SystemExit(f"{differing} of {len(found)} candidates score differently when loaded, no numbers")
    say(
        "cem", what="search", task=task, s=sum(taken), evaluated=few_shot.found.evaluated, score=few_shot.found.score[0]
    )
    ratio = statistics.median(a / b for a, b in zip(loaded, together, strict=True))
    say(
        "cem",
        what="a generation",
        batched_s=statistics.median(together),
        loaded_s=statistics.median(loaded),
        times=ratio,
    )


@torch.no_grad()
def by_loading(library: ExpertLibrary, run: Callable[[], object], mixture: Tensor) -> object:
    """With a mixture's weights in the place of the model's."""
    own = {}
    for layer in library.model.base_model.layers():
        weight = layer.parameter("weight")
        own[layer] = weight.data
        d = sum(float(w) * layer.shift_of(name) for w, name in zip(mixture, library.names, strict=True))
        weight.data = spectral.compose(weight, layer.svf_basis.to(weight.dtype), d, layer.side("weight"))
    try:
        return run()
    finally:
        for layer, weight in own.items():
            layer.parameter("weight").data = weight


PARTS = ("accuracy", "step", "decode", "switch", "decompose", "route", "cem")
METHODS = (
    "one_sided",
    "one_sided unfolded",
    "lora r16",
    "factored",
    "merged",
    "one_sided experts",
    "full",
    "published",
)


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        from svf import load

        load.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m svf.bench", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if not given")
    parser.add_argument("--sizes", nargs="+", help="LAYERSxBATCHxTOKENS of training steps")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--layers", type=int, default=32 if GPU else 2, help="for the parts other than step")
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", help="file for the same numbers as JSON")
    args = parser.parse_args()
    for chosen, known in ((args.parts, PARTS), (args.methods, METHODS)):
        if unknown := [name for name in chosen if name not in known]:
            parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")

    if wrong := parity():
        print("\n".join(["parity failed, no numbers:", *wrong]), file=sys.stderr)
        sys.exit(1)
    name = torch.cuda.get_device_name() if GPU else "CPU"
    print(f"parity passed; {name}, torch {torch.__version__}, {str(DTYPE).removeprefix('torch.')}", flush=True)
    parts = args.parts or PARTS
    if "accuracy" in parts:
        accuracy()
    if "decompose" in parts:
        decomposition(args.layers)
        free()
    if "switch" in parts:
        switch(args.layers)
        free()
    if "decode" in parts:
        decode(args.layers)
        free()
    if "route" in parts:
        route()
        free()
    if "cem" in parts:
        for task in ("longer", "other"):  # short and long answers
            cem(task)
        free()
    if "step" in parts:
        sizes = args.sizes or (["8x1x512", "32x8x512", "16x32x512"] if GPU else ["2x1x64", "2x8x64"])
        for size in sizes:
            step(*map(int, size.split("x")), args.methods, args.times, args.rounds)
            free()
    if args.out:
        write(args.out)


if __name__ == "__main__":
    main()
