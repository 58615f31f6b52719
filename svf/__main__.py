"""python -m svf decompose | merge | export | convert | serve: work with checkpoints and experts, without a program."""

import argparse
import shutil
import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel

from svf import experts
from svf.adapt import Adaptive
from svf.decompose import DecompositionOptions


def decompose(args: argparse.Namespace) -> None:
    if args.checkpoint_dtype is not None and args.checkpoint_dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {args.checkpoint_dtype} is none of float32, bfloat16, float16")
    targets = args.targets[0] if len(args.targets) == 1 else args.targets
    if isinstance(targets, str) and targets != "all-linear" and targets.isidentifier():
        targets = [targets]
    options = DecompositionOptions(args.solver, args.device, args.cache or True)
    dtype = getattr(torch, args.checkpoint_dtype) if args.checkpoint_dtype else None
    found = experts.fill_cache(args.model, targets, options, dtype)
    print(f"basis {found} in {options.folder}")


def with_expert(args: argparse.Namespace) -> PeftModel:
    expert = Path(args.expert)
    base = args.base or experts.Expert.load(expert).config.base_model_name_or_path
    if not base:
        raise ValueError(f"{expert} does not say its base; give it with --base")
    return PeftModel.from_pretrained(experts.load_base(experts.base_folder(base)), expert)


def merge(args: argparse.Namespace) -> None:
    model = with_expert(args)
    model.merge_and_unload().save_pretrained(args.out)
    base = Path(args.base or model.peft_config["default"].base_model_name_or_path)
    for path in [p for pattern in ("token*", "*.model", "vocab*", "merges*", "special*") for p in base.glob(pattern)]:
        shutil.copy(path, args.out)
    print(f"merged checkpoint in {args.out}")


def export(args: argparse.Namespace) -> None:
    kept = experts.export_lora(with_expert(args), args.out, args.rank)
    width = max(map(len, kept))
    for name, share in kept.items():
        print(f"{name:{width}}  {share:7.2%}")
    print(f"LoRA of rank {args.rank} in {args.out}; energy of the change kept: {sum(kept.values()) / len(kept):.2%}")


def convert(args: argparse.Namespace) -> None:
    expert = experts.convert_published(args.file, args.base)
    expert.save(args.out)
    print(f"expert of {len(expert.z)} matrices in {args.out}")


def adaptive(args: argparse.Namespace) -> Adaptive:
    """The base, its experts and the strategy that a command was given."""
    folder = experts.base_folder(args.base)
    model = experts.load_base(folder).to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    named = dict(one.rpartition("=")[::2] if "=" in one else (Path(one).name, one) for one in args.experts)
    if len(named) < len(args.experts):
        raise ValueError(f"two experts of one name among {', '.join(args.experts)}: give them as NAME=FOLDER")
    return Adaptive(model, tokenizer, named, args.strategy)


def serve(args: argparse.Namespace) -> None:
    try:
        from svf import serve as server
    except ModuleNotFoundError as problem:
        if problem.name not in ("starlette", "uvicorn"):
            raise
        raise ValueError("serving needs starlette and uvicorn: pip install 'continuous-thought[serve]'") from None
    server.serve(lambda: adaptive(args), **{name: value for name, value in vars(args).items() if name in SETTINGS})


SETTINGS = ("host", "port", "slots", "context", "waiting", "max_bytes", "max_seconds")
"""Options of `serve` that are handed on where they are given."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m svf", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(required=True, metavar="command")

    def command(run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = command(decompose, "Find the bases of a checkpoint once, matrix by matrix; go on where a killed run stopped.")
    sub.add_argument("model", help="folder, or name on the Hub")
    sub.add_argument("--targets", nargs="+", default=["all-linear"], help="module names, a pattern, or all-linear")
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
            sub.add_argument("--rank", type=int, default=16)
    sub = command(convert, "Read policy_params.pt or learnable_params.pt of the published implementation.")
    sub.add_argument("file")
    sub.add_argument("out", help="folder to write")
    sub.add_argument("--base", required=True, help="folder or name of the model that it was trained for")
    sub = command(serve, "Answer over HTTP as OpenAI's servers do, with models base, base+svf:NAME and base+svf:auto.")
    adaptive_options(sub)
    sub.argument_default = argparse.SUPPRESS
    sub.add_argument("--host", help="127.0.0.1 if not given; beyond this machine only with a key in $SVF_API_KEY")
    sub.add_argument("--port", type=int, help="8000 if not given; 0: any that is free")
    sub.add_argument("--slots", type=positive, help="requests that are answered together")
    sub.add_argument("--context", type=positive, help="tokens of prompt and answer; all that the model can read")
    sub.add_argument("--waiting", type=positive, help="requests that may wait; further ones get status 429")
    sub.add_argument("--max-bytes", type=positive, help="of a request")
    sub.add_argument("--max-seconds", type=float, help="from a request's arrival to the end of its answer")
    return top


def adaptive_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--base", required=True, help="folder or name of the base model")
    sub.add_argument("--experts", nargs="*", default=[], help="folders or names; NAME=FOLDER to call one otherwise")
    sub.add_argument("--strategy", default="prompt", help="prompt, classifier, base, or the name of an expert")
    sub.add_argument("--device", help="a GPU where there is one, if not given")


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def main() -> None:
    args = parser().parse_args()
    try:
        args.run(args)
    except (ValueError, KeyError, OSError) as problem:
        print(f"error: {problem.args[0] if isinstance(problem, KeyError) else problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
