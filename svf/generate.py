"""Batched reading and writing with a mixture of experts per row.

Rows are padded on the left and their positions are counted without padding, so that a row comes out as it would alone,
up to the rounding of products of another size. Rows that have ended leave the batch.

Shape letters: B rows, T tokens of the longest prompt, V vocabulary.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache

from svf.experts import ExpertLibrary
from svf.rollout import encode, end_tokens, positions

Request = str | Sequence[Mapping[str, str]]
"""A prompt, or a conversation: messages with `role` and `content`."""

WORTH = 0.25
"""From this share of tokens on, a prefix that rows of one mixture have in common is read once for all of them."""


@dataclass(frozen=True, eq=False)
class Prefill:
    """Prompts as the model has read them."""

    cache: Cache
    """Keys and values of every layer."""
    mask_BT: Tensor
    """0 at padding."""
    logits_BV: Tensor
    """Of the token that follows each prompt."""

    def __len__(self) -> int:
        return len(self.mask_BT)

    def rows(self, index: Tensor) -> "Prefill":
        """Some rows, also several times over; nothing is shared that writing changes."""
        cache, index = _fork(self.cache), index.to(self.mask_BT.device)
        cache.batch_select_indices(index)
        return Prefill(cache, self.mask_BT[index], self.logits_BV[index])


class Generator:
    """A library's model and a tokenizer: reads prompts (`prefill`), writes answers (`decode`)."""

    def __init__(self, library: ExpertLibrary, tokenizer):
        self.library, self.tokenizer = library, tokenizer

    @property
    def device(self) -> torch.device:
        return self.library.base.get_input_embeddings().weight.device

    @property
    def eos(self) -> list[int]:
        """Ids of tokens that end an answer, the tokenizer's own one first."""
        return end_tokens(self.library.base, self.tokenizer)

    @property
    def context(self) -> int | None:
        """Tokens that the model has positions for, of a prompt and its answer together; None where it has no limit."""
        return getattr(self.library.base.config.get_text_config(), "max_position_embeddings", None)

    def check_room(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Raises a ValueError where a prompt and its answer are more tokens than the model has positions for."""
        longest = max(map(len, ids), default=0)
        if self.context and longest and longest + max_new_tokens > self.context:
            raise ValueError(
                f"a request of {longest} tokens and an answer of up to {max_new_tokens} are more than the "
                f"{self.context} tokens that the model has positions for: shorten it, or lower max_new_tokens"
            )

    def encode(self, request: Request) -> list[int]:
        """Token ids of a prompt, or of a conversation in the tokenizer's chat template.

        Raises:
            ValueError: for an empty prompt, or a conversation where the tokenizer has no chat template.
        """
        if not isinstance(request, str):
            if not self.tokenizer.chat_template:
                raise ValueError("the tokenizer has no chat template; give prompts as strings instead of messages")
            request = self.tokenizer.apply_chat_template(list(request), add_generation_prompt=True, tokenize=False)
        if not (ids := encode(self.tokenizer, request)):
            raise ValueError("a prompt is empty; it needs at least one token")
        return ids

    def continuation(self, before: str, text: str) -> list[int]:
        """Token ids of a text as they are after another one."""
        before_ids, ids = (self.tokenizer(part, add_special_tokens=False).input_ids for part in (before, before + text))
        if ids[: len(before_ids)] != before_ids or len(ids) == len(before_ids):
            return self.tokenizer(text, add_special_tokens=False).input_ids
        return ids[len(before_ids) :]

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    # Reading

    @torch.no_grad()
    def prefill(
        self,
        ids: Sequence[Sequence[int]],
        weights: Tensor,
        past: Prefill | None = None,
        prefix: tuple[Sequence[int], Prefill] | None = None,
        base: Prefill | None = None,
    ) -> Prefill:
        """Reads prompts. Keys and values depend on the mixture, so only those of the same one are ever used again.

        Args:
            ids: of B prompts.
            weights: a mixture for each, (B, experts) or (B, layers, experts).
            past: what these rows have read before, under their mixtures.
            prefix: ids and one row that has read them under the one mixture of all rows; used where all begin so.
            base: these prompts as the base has read them: rows whose mixture is not the base read again.
        """
        if base is not None:
            return self._read_again(base, ids, weights)
        if past is not None:
            return self._read(ids, weights, past)
        if prefix is not None and all(len(row) > len(prefix[0]) and row[: len(prefix[0])] == prefix[0] for row in ids):
            return self._read(
                [row[len(prefix[0]) :] for row in ids], weights, prefix[1].rows(torch.zeros(len(ids)).long())
            )
        shared = common_prefix([list(row[:-1]) for row in ids])
        if shared and len(ids) > 1:
            flat = F.pad(weights.flatten(1), (0, 1))  # without experts there is nothing to tell rows apart by
            _, group_B = flat.unique(dim=0, return_inverse=True)
            mixtures = weights[[group_B.tolist().index(group) for group in range(int(group_B.max()) + 1)]]
            saved = len(shared) * (len(ids) - len(mixtures))
            if saved >= WORTH * sum(map(len, ids)):
                once = self._read([shared] * len(mixtures), mixtures)
                return self._read([row[len(shared) :] for row in ids], weights, once.rows(group_B))
        return self._read(ids, weights)

    def _read_again(self, base: Prefill, ids: Sequence[Sequence[int]], weights: Tensor) -> Prefill:
        again = weights.flatten(1).any(1).nonzero()[:, 0]
        if len(again) == 0:
            return base
        new = self._read([ids[i] for i in again.tolist()], weights[again], width=base.mask_BT.shape[1])
        if len(again) == len(ids):
            return new
        again = again.to(self.device)
        cache = _fork(base.cache)
        for layer, other in zip(cache.layers, new.cache.layers, strict=True):
            layer.keys = layer.keys.index_copy(0, again, other.keys)
            layer.values = layer.values.index_copy(0, again, other.values)
        mask, logits = base.mask_BT, base.logits_BV
        return Prefill(cache, mask.index_copy(0, again, new.mask_BT), logits.index_copy(0, again, new.logits_BV))

    def _read(self, ids, weights: Tensor, past: Prefill | None = None, width: int | None = None) -> Prefill:
        width = width or max(map(len, ids))
        tokens, mask = torch.zeros(len(ids), width, dtype=torch.long), torch.zeros(len(ids), width, dtype=torch.long)
        for i, row in enumerate(ids):
            tokens[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        cache = DynamicCache(config=self.library.base.config) if past is None else _fork(past.cache)
        if past is not None:
            mask = torch.cat([past.mask_BT, mask], dim=1)
        with self.library.mix(weights):
            logits = self._forward(tokens, mask, cache, keep=1)
        return Prefill(cache, mask, logits[:, -1])

    def _forward(self, tokens: Tensor, mask: Tensor, cache: Cache, keep: int) -> Tensor:
        return self.library.base(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions(mask)[:, -tokens.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits

    # Writing

    @torch.no_grad()
    def decode(
        self,
        start: Prefill,
        weights: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> tuple[list[list[int]], list[float]]:
        """Answers token by token: the likeliest, or drawn where `temperature` is above 0.

        Returns:
            Token ids, ends included, and the mean log-probability of an answer's tokens.
        """
        random = torch.Generator(self.device).manual_seed(seed) if temperature > 0 else None
        written = torch.full((len(start), max_new_tokens), -1, device=self.device)
        log_p = torch.zeros(len(start), max_new_tokens, device=self.device)
        eos = torch.tensor([] if ignore_eos else self.eos, dtype=torch.long, device=self.device)
        cache, mask, logits = _fork(start.cache), start.mask_BT, start.logits_BV
        tokens = alive = torch.arange(len(start), device=self.device)  # rows of `written` that are still in the batch
        step = 0
        while step < max_new_tokens:
            going = torch.ones(len(alive), dtype=torch.bool, device=self.device)
            with self.library.mix(weights[alive.to(weights.device)]):
                while step < max_new_tokens:
                    if step:
                        mask = F.pad(mask, (0, 1), value=1)
                        logits = self._forward(tokens[:, None], mask, cache, keep=1)[:, -1]
                    tokens = _choose(logits, temperature, random)
                    written[alive, step] = torch.where(going, tokens, -1)
                    chosen = logits.gather(1, tokens[:, None])[:, 0].float() - logits.float().logsumexp(-1)
                    log_p[alive, step] = torch.where(going, chosen, 0.0)
                    step += 1
                    going &= ~torch.isin(tokens, eos)
                    left = int(going.sum())
                    if left <= 0.75 * len(alive):  # copying the cache has to pay
                        break
            if not left:
                break
            rows = going.nonzero()[:, 0]
            alive, tokens, mask = alive[rows], tokens[rows], mask[rows]
            cache.batch_select_indices(rows)
        mean = log_p.sum(1) / (written >= 0).sum(1).clamp(min=1)
        return [[token for token in row if token >= 0] for row in written.tolist()], mean.tolist()

    # Memory

    def batches(self, lengths: Sequence[int], new_tokens: int) -> list[list[int]]:
        """Which rows to run together: as many as half of the free memory holds, of similar lengths where not all."""
        if not lengths:
            return []
        limit = self.rows_that_fit(max(lengths) + new_tokens)
        if limit >= len(lengths):
            return [list(range(len(lengths)))]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        return [order[i : i + limit] for i in range(0, len(order), limit)]

    def rows_that_fit(self, tokens: int) -> int:
        """Rows of so many tokens that half of the free memory holds, at least one. Estimated, and not sparingly."""
        base = self.library.base
        config, size = base.config.get_text_config(), base.get_input_embeddings().weight.element_size()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys = 2 * config.num_hidden_layers * heads * width * size
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        inside = 4 * (4 * inner + 8 * config.hidden_size)  # what one layer holds for a moment, in fp32
        shifts = 0
        if self.library.names:
            adapted = self.library.model.base_model.layers()
            shifts = 4 * sum(layer.wanted(name) for layer in adapted for name in layer.names())
        row = tokens * (2 * keys + inside) + shifts + 12 * config.vocab_size
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        else:
            free = psutil.virtual_memory().available
        return max(1, free // 2 // row)


def common_prefix(rows: Sequence[Sequence[int]]) -> Sequence[int]:
    """What all rows begin with."""
    first, last = min(rows), max(rows)
    same = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(same, min(len(first), len(last)))]


def _fork(cache: Cache) -> Cache:
    """A cache that grows on its own: layers replace their tensors when they grow, they do not write into them."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


def _choose(logits_BV: Tensor, temperature: float, random: torch.Generator | None) -> Tensor:
    if random is None:
        return logits_BV.argmax(-1)
    return (logits_BV.float() / temperature).softmax(-1).multinomial(1, generator=random)[:, 0]
