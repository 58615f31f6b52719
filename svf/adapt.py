"""Adapting to a request: which experts answer it."""

CLASSIFY = "Kinds: {labels}.\nRequest: {prompt}\nKind:"
"""The request that asks which kind another one is; the answer is a space and the label's name."""
