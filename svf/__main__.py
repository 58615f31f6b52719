"""python -m svf decompose | merge | export | convert | transfer | adapt | eval | serve: see --help of each."""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from peft import PeftModel

from svf import experts
from svf.adapt import Adaptive, FewShot
from svf.config import SVFConfig
from svf.decompose import DecompositionOptions
from svf.search import METHODS

ASSETS = Path(__file__).parent / "assets"


def decompose(args: argparse.Namespace) -> None:
    if args.checkpoint_dtype is not None and args.checkpoint_dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {args.checkpoint_dtype} is none of float32, bfloat16, float16")
    if args.targets is None and args.target_parameters is None:
        args.targets = ["all-linear"]
    targets = args.targets[0] if args.targets is not None and len(args.targets) == 1 else args.targets
    if isinstance(targets, str) and targets != "all-linear" and targets.isidentifier():
        targets = [targets]
    options = DecompositionOptions(args.solver, args.device, args.cache or True)
    dtype = getattr(torch, args.checkpoint_dtype) if args.checkpoint_dtype else None
    config = SVFConfig(target_modules=targets, target_parameters=args.target_parameters)
    found = experts.fill_cache(args.model, config, options, dtype)
    print(f"basis {found} in {options.folder}")


TOKENIZER = ("token*", "*.model", "vocab*", "merges*", "special*", "chat_template*")


def with_expert(args: argparse.Namespace) -> tuple[PeftModel, Path]:
    """The expert on its base, and the folder of the base."""
    expert = Path(args.expert)
    config = experts.check_folder(expert)
    base = args.base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{expert} does not say its base; give it with --base")
    folder = experts.base_folder(base)
    return PeftModel.from_pretrained(experts.load_base(folder), expert), folder


def new_folder(path: str) -> None:
    """Raises ValueError where there is something already."""
    if Path(path).exists() and not (Path(path).is_dir() and not any(Path(path).iterdir())):
        raise ValueError(f"{path} is there already; give another folder")


def merge(args: argparse.Namespace) -> None:
    new_folder(args.out)
    model, base = with_expert(args)
    model.merge_and_unload(safe_merge=True).save_pretrained(args.out)
    for path in [path for pattern in TOKENIZER for path in base.glob(pattern) if path.is_file()]:
        shutil.copy(path, args.out)
    print(f"merged checkpoint in {args.out}")


def export(args: argparse.Namespace) -> None:
    new_folder(args.out)
    kept = experts.export_lora(with_expert(args)[0], args.out, args.rank)
    width = max(map(len, kept))
    for name, share in kept.items():
        print(f"{name:{width}}  {share:7.2%}")
    print(f"LoRA of rank {args.rank} in {args.out}; energy of the change kept: {sum(kept.values()) / len(kept):.2%}")


def convert(args: argparse.Namespace) -> None:
    new_folder(args.out)
    expert = experts.convert_published(args.file, args.base)
    expert.save(args.out)
    print(f"expert of {len(expert.z)} matrices in {args.out}")


def transfer(args: argparse.Namespace) -> None:
    new_folder(args.out)
    base = experts.base_folder(args.to, weights=False)
    expert = experts.transfer(
        experts.Expert.load(experts.expert_folder(args.expert)), experts.skeleton(base), args.shuffle
    )
    expert.config.base_model_name_or_path = args.to
    expert.save(args.out)
    order = "in order" if args.shuffle is None else f"its layers shuffled with seed {args.shuffle}"
    print(f"expert of {len(expert.z)} matrices for {args.to} in {args.out}, {order}")


def adapt(args: argparse.Namespace) -> None:
    if args.save:
        new_folder(args.save)
    if (args.strategy == "few_shot") != (args.examples is not None):
        raise ValueError("few_shot needs --examples FILE, and no other strategy takes them")
    if args.save and args.strategy != "few_shot":
        raise ValueError("--save keeps the mixture that few_shot finds; use it with --strategy few_shot")
    strategy = args.strategy
    if strategy == "few_shot":
        strategy = FewShot(
            read_examples(args.examples),
            per_layer=args.per_layer,
            method=args.method,
            population=args.population,
            generations=args.generations,
            seed=args.seed,
            max_new_tokens=args.max_new_tokens,
        )
    adaptive = load(args, strategy, ("base", "prompt", "classifier", "few_shot"))
    if args.save:
        adaptive.library.expert(strategy.fit(adaptive).best).save(args.save)
        print(f"mixture in {args.save}", file=sys.stderr)
    answers = adaptive.generate(args.prompt, args.max_new_tokens, args.temperature, args.seed)
    for prompt, answer in zip(args.prompt, answers, strict=True):
        route = answer.route
        if args.json:
            weights = dict(zip(adaptive.library.names, route.weights.movedim(-1, 0).tolist(), strict=True))
            shown = {"label": route.label, "reason": route.reason, "weights": weights, "scores": dict(route.scores)}
            print(json.dumps({"prompt": prompt, "answer": answer.text, "route": shown}))
        else:
            print(f"{prompt}{answer.text}\n    [{route.label}: {route.reason}]")


def load(args: argparse.Namespace, strategy, known: tuple[str, ...]) -> Adaptive:
    """Base, experts and strategy; what the strategy can be called, besides experts, is in `known`."""
    given = {name: experts.expert_folder(folder) for name, folder in named(args.experts, "experts").items()}
    if args.strategy not in (*known, *given):
        raise ValueError(f"strategy {args.strategy!r} is none of {', '.join((*known, *given))}")
    folder = experts.base_folder(args.base)
    tokenizer = load_tokenizer(folder)
    return Adaptive(experts.load_base(folder).to(device(args)), tokenizer, given, strategy)


def serve(args: argparse.Namespace) -> None:
    try:
        from svf import serve as server
    except ModuleNotFoundError as problem:
        if problem.name not in ("starlette", "uvicorn"):
            raise
        raise ValueError("serving needs starlette and uvicorn: pip install 'continuous-thought[serve]'") from None
    settings = {name: value for name, value in vars(args).items() if name in SERVE}
    server.serve(lambda: load(args, args.strategy, ROUTING), **settings)


ROUTING = ("base", "prompt", "classifier")
SERVE = ("host", "port", "slots", "context", "waiting", "max_bytes", "max_seconds")
"""Options that are handed on to the server where they are given."""


def evaluate(args: argparse.Namespace) -> None:
    from svf import evaluate as evaluation  # brings the tasks along
    from tasks import text

    given, loras = named(args.experts, "experts"), named(args.lora, "loras")
    possible = [
        s for s in evaluation.STRATEGIES if (s != "classifier" or experts.DISPATCH in given) and (s != "lora" or loras)
    ]
    folder = experts.base_folder(args.base)
    settings = evaluation.Settings(
        base=str(folder),
        experts={name: str(path) for name, path in given.items()},
        loras={name: str(path) for name, path in loras.items()},
        tasks=args.tasks or [*text.DOMAINS, *text.UNSEEN],
        strategies=args.strategies or possible,
        seeds=list(range(args.seeds)),
        n=args.n,
        shots=args.shots,
        population=args.population,
        generations=args.generations,
        max_new_tokens=args.max_new_tokens,
        method=args.method,
        transfer=args.transfer,
        root=args.root,
    )
    tokenizer = load_tokenizer(folder)
    run = evaluation.Evaluation(settings, Path(args.out), tokenizer, device(args), args.allow_code_execution)
    run.run(lambda line: print(line, flush=True))
    print(f"\n{run.table()}\n\nall cells in {args.out}")


def named(given: list[str] | None, kind: str) -> dict[str, str]:
    """NAME=FOLDER or FOLDER, called by its last part; the shipped ones where none is given."""
    if given is None:
        return {path.parent.name: str(path.parent) for path in sorted((ASSETS / kind).glob("*/adapter_config.json"))}
    found: dict[str, str] = {}
    for one in given:
        name, _, folder = one.rpartition("=")
        name = name or Path(folder).name
        if name in found:
            raise ValueError(f"two of {', '.join(given)} are called {name}; write NAME=FOLDER")
        found[name] = folder
    return found


def read_examples(path: str) -> list[tuple]:
    """(prompt, check) of every line {"prompt": ..., "answer": ...}; right is what equals the answer but for spaces."""
    found = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            prompt, answer = entry["prompt"], str(entry["answer"]).strip()
        except (json.JSONDecodeError, TypeError, KeyError):
            raise ValueError(f'{path}, line {number}: not of the form {{"prompt": ..., "answer": ...}}') from None
        found.append((prompt, lambda text, answer=answer: text.strip() == answer))
    return found


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def device(args: argparse.Namespace) -> str:
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


class Parser(argparse.ArgumentParser):
    """Says an error in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="python -m svf", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(required=True, metavar="command")

    def command(run, text: str, name: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name or run.__name__, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = command(decompose, "Find the bases of a checkpoint once, matrix by matrix; go on where a killed run stopped.")
    sub.add_argument("model", help="folder, or name on the Hub")
    sub.add_argument("--targets", nargs="+", help="module names, a pattern, or all-linear (which it is if not given)")
    sub.add_argument(
        "--target-parameters", nargs="+", metavar="NAME", help="3-D weights of experts, as mlp.experts.gate_up_proj"
    )
    sub.add_argument("--cache", help="folder; $SVF_CACHE or ~/.cache/svf if not given")
    sub.add_argument("--solver", default="eigh", choices=["eigh", "svd"])
    sub.add_argument("--device", help="a GPU where there is one, if not given")
    sub.add_argument(
        "--dtype", dest="checkpoint_dtype", help="that the model will be loaded in; as stored if not given"
    )
    for run, text in (
        (merge, "Write the adapted model as a plain checkpoint."),
        (export, "Write an expert as a LoRA, and how much of it that keeps."),
    ):
        sub = command(run, text)
        sub.add_argument("expert", help="folder of an expert")
        sub.add_argument("out", help="folder to write")
        sub.add_argument("--base", help="folder or name; what the expert says if not given")
        if run is export:
            sub.add_argument("--rank", type=positive, default=16)
    sub = command(convert, "Read policy_params.pt or learnable_params.pt of the published implementation.")
    sub.add_argument("file")
    sub.add_argument("out", help="folder to write")
    sub.add_argument("--base", required=True, help="folder or name of the model that it was trained for")
    sub = command(transfer, "Write an expert for another model of the same shapes, in order or shuffled.")
    sub.add_argument("expert", help="folder, or name on the Hub")
    sub.add_argument("out", help="folder to write")
    sub.add_argument("--to", required=True, help="folder or name of the other model")
    sub.add_argument("--shuffle", type=int, metavar="SEED", help="give every layer the numbers of another one")

    sub = command(adapt, "Answer requests, each with a mixture of experts of its own.")
    model_options(sub)
    sub.add_argument("--strategy", default="prompt", help="base, prompt, classifier, few_shot, or an expert's name")
    sub.add_argument("--prompt", nargs="+", required=True)
    sub.add_argument("--examples", help='few_shot: a file with a line {"prompt": ..., "answer": ...} for each')
    sub.add_argument("--per-layer", action="store_true", help="few_shot: weights by layer")
    sub.add_argument("--save", help="few_shot: folder to write the mixture to, as an expert")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--temperature", type=temperature, default=0.0)
    sub.add_argument("--json", action="store_true", help="one line of JSON for every answer")

    sub = command(evaluate, "All strategies on all tasks, over seeds; goes on where a stopped run ended.", "eval")
    model_options(sub)
    sub.add_argument("--lora", nargs="*", help="folders, or NAME=FOLDER; what few-shot is compared with")
    sub.add_argument("--tasks", nargs="+", help="all domains and unseen tasks if not given")
    sub.add_argument("--strategies", nargs="+", help="all that are possible if not given")
    sub.add_argument("--seeds", type=positive, default=5, help="how many")
    sub.add_argument("--n", type=positive, default=200, help="test items of a task and seed")
    sub.add_argument("--shots", type=positive, default=10, help="selection examples")
    sub.add_argument("--transfer", action="store_true", help="the experts are another model's, of the same shapes")
    sub.add_argument("--root", default="data", help="folder of published sets, NAME/test.jsonl")
    sub.add_argument("--allow-code-execution", action="store_true", help="run what the model writes, in a sandbox")
    sub.add_argument("--out", default="evaluation.json")

    sub = command(serve, "Answer over HTTP as OpenAI's servers do, with models base, base+svf:NAME and base+svf:auto.")
    base_options(sub)
    routing_option(sub)
    sub.argument_default = argparse.SUPPRESS
    sub.add_argument("--host", help="127.0.0.1 if not given; beyond this machine only with a key in $SVF_API_KEY")
    sub.add_argument("--port", type=int, help="8000 if not given; 0: any that is free")
    sub.add_argument("--slots", type=positive, help="requests that are answered together")
    sub.add_argument("--context", type=positive, help="tokens of a prompt and its answer")
    sub.add_argument("--waiting", type=positive, help="requests that may wait; further ones get status 429")
    sub.add_argument("--max-bytes", type=positive, help="of a request")
    sub.add_argument("--max-seconds", type=seconds, help="from a request's arrival to the end of its answer")
    return top


def base_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--base", default=str(ASSETS / "base"), help="folder or name; the shipped one if not given")
    sub.add_argument("--experts", nargs="*", help="folders or names, or NAME=FOLDER; the shipped ones if not given")
    sub.add_argument("--device", help="a GPU where there is one, if not given")


def routing_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--strategy", default="prompt", help="of base+svf:auto: prompt, classifier, base, or an expert")


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def temperature(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no finite number from 0 on")
    return float(text)


def seconds(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no finite number above 0")
    return float(text)


def model_options(sub: argparse.ArgumentParser) -> None:
    base_options(sub)
    sub.add_argument("--max-new-tokens", type=positive, default=24)
    sub.add_argument("--method", choices=list(METHODS), default="cem", help="few_shot: how to search")
    sub.add_argument("--population", type=positive, default=32)
    sub.add_argument("--generations", type=positive, default=20)


def main() -> None:
    args = parser().parse_args()
    try:
        args.run(args)
    except (ValueError, KeyError, OSError, RuntimeError) as problem:
        print(f"error: {problem.args[0] if isinstance(problem, KeyError) else problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
