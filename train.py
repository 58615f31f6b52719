"""The one entry. `python train.py task=maze key=value ...` trains, tests and writes a run folder.

    python train.py task=maze                                   # fit with configs/maze.yaml
    python train.py task=maze model.ctm.ticks=50 overlay=fast   # keys of the configuration, and a file of them
    python train.py test task=maze ckpt_path=last               # or best, or a path
    python train.py fit --config configs/maze.yaml --model.ctm.ticks 50     # LightningCLI's form: the same parser
    python train.py analyze task=maze ckpt_path=best            # figures, animations and a report of what it does
    python train.py repeat task=maze seeds=0,1,2                # over seeds: mean and 95 % interval; also a grid

This file only spells the words out as LightningCLI's arguments; `tasks/cli.py` is the command line.
"""

import os
import sys

if not os.environ.get("WANDB_MODE") and "WANDB_SWEEP_ID" not in os.environ:
    os.environ["WANDB_MODE"] = "offline"  # before wandb is imported: it would ask at a prompt
os.environ.setdefault("WANDB_SILENT", "true")


def main() -> None:
    if sys.argv[1:2] == ["repeat"]:
        from tasks.repeat import repeat

        return repeat(sys.argv[2:])
    from tasks import cli
    from tasks.run import UserError, fail

    try:
        # Written back rather than passed on: the other processes of a distributed run are started from sys.argv.
        sys.argv[1:] = cli.spell(sys.argv[1:]) if "LOCAL_RANK" not in os.environ else sys.argv[1:]
    except UserError as error:
        fail(str(error))
    cli.main()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
