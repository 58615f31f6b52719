"""Sampling from a causal language model and the log-probabilities of what it said. Knows no trainer.

Rows are padded on the left up to the end of their prompts and on the right behind their answers, so that all answers
begin in one column. What was sampled is kept as ids and never tokenised again.

Shape letters: B rows, T tokens of prompt and answer with padding, N tokens of the longest answer, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase


class Rows(NamedTuple):
    """Prompts and answers."""

    ids: Tensor
    """(B, T)."""
    mask: Tensor
    """(B, T), false at padding."""
    n: int
    """N, how many of the last columns are answers."""

    @property
    def answers(self) -> Tensor:
        """(B, N)."""
        return self.ids[:, self.ids.shape[1] - self.n :]

    @property
    def answered(self) -> Tensor:
        """(B, N), false at padding."""
        return self.mask[:, self.ids.shape[1] - self.n :]

    @property
    def prompt_lengths(self) -> Tensor:
        return self.mask[:, : self.ids.shape[1] - self.n].sum(1)

    def take(self, rows: Tensor) -> "Rows":
        """Some rows, without the columns that they leave empty."""
        ids, mask = self.ids[rows], self.mask[rows]
        used = mask.any(0)
        n = max(1, int(used[len(used) - self.n :].sum()))
        first = int(used.int().argmax())
        last = len(used) - self.n + n
        return Rows(ids[:, first:last], mask[:, first:last], n)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a prompt; its beginning is marked once, also where a template has written the mark already."""
    marked = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not marked).input_ids


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer, the tokenizer's own one first."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *of_model) if i is not None))


def rows(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int, device=None) -> Rows:
    """Rows of ids, put together on the host."""
    before, n = max(map(len, prompts)), max(1, *map(len, answers))
    ids = torch.full((len(prompts), before + n), pad)
    mask = torch.zeros(len(prompts), before + n, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        row = slice(before - len(prompt), before + len(answer))
        ids[i, row] = torch.tensor([*prompt, *answer])
        mask[i, row] = True
    return Rows(ids.to(device), mask.to(device), n)


def mixed(model: nn.Module, mix: Tensor | None) -> AbstractContextManager:
    """The block in which every row has its own expert; no block where `mix` is None."""
    return nullcontext() if mix is None else model.mix(mix)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    pad: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    times: int = 1,
    mix: Tensor | None = None,
) -> Rows:
    """Answers to every prompt. A prompt is read once, whatever `times` is.

    Args:
        model: any causal language model of Transformers, with an adapter or without.
        prompts: ids.
        ends: ids that end an answer; the end is part of it.
        pad: the id of padding.
        max_new_tokens: an answer is cut off behind so many.
        temperature: 0 for the likeliest token.
        times: answers to every prompt, in rows next to each other.
        mix: weights of experts for every prompt (prompts, experts).

    Returns:
        Rows, `times` for every prompt.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    start = rows(prompts, [[]] * len(prompts), pad, device)
    ids, mask = start.ids[:, :-1], start.mask[:, :-1]
    with mixed(model, mix):
        out = model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask), use_cache=True, logits_to_keep=1
        )
    cache, logits = out.past_key_values, out.logits[:, -1]
    if times > 1:
        cache.batch_repeat_interleave(times)
        ids, mask, logits = (part.repeat_interleave(times, 0) for part in (ids, mask, logits))
        mix = None if mix is None else mix.repeat_interleave(times, 0)
    going = torch.ones(len(ids), dtype=torch.bool, device=device)
    stop = torch.tensor(list(ends), device=device)
    place = mask.sum(1, keepdim=True)
    tokens, keep = [], []
    with mixed(model, mix):
        while True:
            token = _choose(logits, temperature)
            tokens.append(torch.where(going, token, pad))
            keep.append(going)
            going = going & ~torch.isin(token, stop)
            if len(tokens) == max_new_tokens or not going.any():
                break
            mask = torch.cat([mask, keep[-1][:, None]], dim=1)
            out = model(
                input_ids=tokens[-1][:, None], attention_mask=mask.long(), position_ids=place,
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            logits, place = out.logits[:, -1], place + 1
    model.train(was_training)
    width = ids.shape[1]
    answers, answered = torch.stack(tokens, dim=1), torch.stack(keep, dim=1)
    return Rows(torch.cat([ids, answers], 1), torch.cat([mask[:, :width], answered], 1), len(tokens))


def _choose(logits_BV: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    return (logits_BV.float() / temperature).softmax(-1).multinomial(1)[:, 0]


def log_probabilities(
    model: nn.Module, rows: Rows, temperature: float = 1.0, mix: Tensor | None = None, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the answers' tokens (B, N), and the entropies they were drawn with (B, N) where asked for.

    Both are zero at padding, and in fp32.
    """
    with mixed(model, mix):
        out = model(
            input_ids=rows.ids, attention_mask=rows.mask.long(), position_ids=positions(rows.mask), use_cache=False,
            logits_to_keep=rows.n + 1,
        )  # fmt: skip
    logits = out.logits[:, :-1].float()
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    log_p = -F.cross_entropy(logits.flatten(0, 1), rows.answers.flatten(), reduction="none")
    log_p = log_p.view(rows.answers.shape) * rows.answered
    if not entropy:
        return log_p, None
    with torch.no_grad():
        log_all = logits.log_softmax(-1)
        return log_p, -(log_all.exp() * log_all).sum(-1) * rows.answered
