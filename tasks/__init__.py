"""Tasks: data, metrics, losses and figures, one file each, and the harness that runs them."""
