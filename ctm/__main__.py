"""`python -m ctm export best.ckpt maze.safetensors`: a model alone, as a small file that `ctm.load` reads."""

import argparse
import sys
from pathlib import Path

from ctm.checkpoint import export


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ctm", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="export")
    command = commands.add_parser("export", help="a checkpoint's model as safetensors, matrices in bf16")
    command.add_argument("source", help="a checkpoint of train.py")
    command.add_argument("target", help="the .safetensors file to write")
    arguments = parser.parse_args()
    try:
        export(arguments.source, arguments.target)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {arguments.target} ({Path(arguments.target).stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
