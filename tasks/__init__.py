"""Tasks: data, metrics, losses and pictures, one file each; and the harness that runs them (cli.py, run.py)."""
