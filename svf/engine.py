"""Continuous batching: requests with mixtures of their own join and leave a running batch between two tokens.

A newcomer's prompt is read alone, a piece at a time, as the model itself would read it; then its keys and values move
into a slot of the batch, where every row has its own length and its own mixture of experts. Where a row ends, the last
one moves into its slot. So nothing is padded, and no row waits for another one's end.
"""

import contextlib
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

# Shapes: R rows in the batch, S slots, H key-value heads, L tokens a slot can hold, D head width, V vocabulary


class Full(Exception):
    """Too many requests wait already."""


class Closed(Exception):
    """The engine takes no more requests."""


@dataclass
class Piece:
    """A part of an answer as it becomes certain; the last one says why it ends: "stop" or "length"."""

    text: str
    finish: str | None = None


@dataclass(eq=False)
class Request:
    """What to answer, and how. `tell` is called in the engine's thread with every `Piece`, or once with an exception."""

    prompt: Sequence[int]
    max_tokens: int
    tell: Callable[[Piece | Exception], None]
    mixture: Mapping[str, float] | None = field(default_factory=dict)
    """Expert -> weight; empty: the base. None: to be found by the engine's `route`."""
    question: Any = None
    """What `route` sees of it."""
    temperature: float = 0.0
    """0: always the best token."""
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    deadline: float = float("inf")
    """On the clock of `time.monotonic`."""
    cancelled: bool = False
    """Nobody wants the answer any more; may be set at any time."""
    route: Any = None
    """What `route` answered."""
    tokens: list[int] = field(default_factory=list)
    """The answer so far, with the token that ended it."""


class Engine:
    """Answers requests with one model in one thread, the one that calls `run`.

    Args:
        model: a causal language model of full attention, as it is or with SVF experts.
        tokenizer: its own; used in the engine's thread only.
        route: questions of requests without a mixture -> for each a route with its `mixture`, expert -> weight.
        slots: rows that run together.
        context: tokens of prompt and answer; the model's own limit if not given.
        waiting: requests that may wait for a slot.
        chunk: tokens of prompts that are read between two tokens of the running rows.

    Raises:
        ValueError: for a model whose cache holds something other than all keys and values.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        route: Callable[[list[Any]], Sequence[Any]] | None = None,
        slots: int = 16,
        context: int | None = None,
        waiting: int = 64,
        chunk: int = 256,
    ):
        self.model, self.tokenizer, self.route = model, tokenizer, route
        self.slots, self.most_waiting, self.chunk = slots, waiting, chunk
        limit = getattr(model.config, "max_position_embeddings", None) or context
        if limit is None:
            raise ValueError("the model does not say how many tokens it can read; give context")
        if context is not None and not 1 < context <= limit:
            raise ValueError(f"context {context} is not from 2 to {limit}, what the model can read")
        self.context = context or limit
        ends = [getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id]
        self.ends = {end for some in ends for end in (some if isinstance(some, list) else [some]) if end is not None}
        self.device = model.get_input_embeddings().weight.device
        self.rows: list[Row] = []
        self.newcomer: Newcomer | None = None
        self.waiting: deque[Request] = deque()
        self.closing = False
        self.changed = threading.Condition()
        with torch.no_grad():
            self.batch = Batch(slots, self.context, self._try_out())

    def _try_out(self) -> Cache:
        """What one token leaves in the model's own cache."""
        attention = getattr(self.model.config, "_attn_implementation", "sdpa")
        if attention not in ("sdpa", "eager"):
            raise ValueError(f"rows of their own lengths need attention sdpa or eager, not {attention}")
        cache = DynamicCache(config=self.model.config)
        self._forward([{}], input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), past_key_values=cache)
        if other := {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}:
            raise ValueError(f"only models of full attention can be served, not one with {', '.join(sorted(other))}")
        return cache

    # From other threads

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            Closed: after `close`.
            Full: where too many wait already.
            ValueError: where prompt and answer together exceed the context, or the prompt is empty.
        """
        if not request.prompt:
            raise ValueError("the prompt is empty")
        if len(request.prompt) + request.max_tokens > self.context:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_tokens} of an answer are more than the "
                f"{self.context} that fit"
            )
        with self.changed:
            if self.closing:
                raise Closed("the server is shutting down")
            if len(self.waiting) >= self.most_waiting:
                raise Full(f"{len(self.waiting)} requests wait already")
            self.waiting.append(request)
            self.changed.notify()

    def close(self, at_once: bool = False) -> None:
        """No more requests; `run` returns when those taken are answered, or `at_once`."""
        with self.changed:
            self.closing = True
            if at_once:
                for request in self._all():
                    request.cancelled = True
            self.changed.notify()

    # In its own thread

    def run(self) -> None:
        """Works until `close`."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closing or self._all())
                if not self._all():
                    return
            self.step()

    @torch.no_grad()
    def step(self) -> None:
        """Reads a chunk of waiting prompts, and goes on by one token in every row."""
        self._drop()
        self._find_routes()
        self._read()
        try:
            if self.rows:
                self._write()
        except Exception as problem:  # of this batch; the next one may well succeed
            traceback.print_exc()
            for row in self.rows:
                row.request.tell(problem)
            self.rows.clear()

    def _all(self) -> list[Request]:
        newcomer = [self.newcomer.request] if self.newcomer else []
        return [*(row.request for row in self.rows), *newcomer, *self.waiting]

    def _drop(self) -> None:
        """Leaves what nobody waits for any more."""
        now, gone = time.monotonic(), set()
        for request in self._all():
            if request.cancelled:
                gone.add(request)
            elif now > request.deadline:
                gone.add(request)
                request.tell(TimeoutError("the time limit of the request is over"))
        if not gone:
            return
        with self.changed:
            self.waiting = deque(request for request in self.waiting if request not in gone)
        if self.newcomer and self.newcomer.request in gone:
            self.newcomer = None
        for i in reversed(range(len(self.rows))):
            if self.rows[i].request in gone:
                self._leave(i)

    def _find_routes(self) -> None:
        """Routes, in one pass, of those whose turn may come next."""
        free = self.slots - len(self.rows)
        with self.changed:
            lost = [request for request in list(self.waiting)[:free] if request.mixture is None]
        if lost:
            try:
                self._route(lost)
            except Exception:  # perhaps because of one of them
                for request in lost:
                    try:
                        self._route([request])
                    except Exception as problem:
                        traceback.print_exc()
                        request.cancelled = True
                        request.tell(problem)
            self._drop()

    def _route(self, requests: Sequence[Request]) -> None:
        routes = self.route([request.question for request in requests])
        for request, route in zip(requests, routes, strict=True):
            request.route, request.mixture = route, route.mixture

    def _read(self) -> None:
        """Goes on with prompts, up to a chunk."""
        left = self.chunk
        while left > 0 and len(self.rows) < self.slots:
            if self.newcomer is None:
                with self.changed:
                    if not self.waiting or self.waiting[0].mixture is None:
                        return
                    self.newcomer = Newcomer(self.waiting.popleft(), DynamicCache(config=self.model.config))
            one = self.newcomer
            piece = one.request.prompt[one.read : one.read + left]
            try:
                ids = torch.tensor([piece], device=self.device)
                logits = self._forward([one.request.mixture], input_ids=ids, past_key_values=one.cache)
            except Exception as problem:
                traceback.print_exc()
                self.newcomer = None
                one.request.tell(problem)
                continue
            one.read += len(piece)
            left -= len(piece)
            if one.read == len(one.request.prompt):
                self.newcomer = None
                row = Row(one.request, self.tokenizer)
                self.batch.put(len(self.rows), one.cache)
                self.rows.append(row)
                self._accept([len(self.rows) - 1], choose(logits, [row]))

    def _write(self) -> None:
        """One token for every row."""
        ids = torch.tensor([[row.request.tokens[-1]] for row in self.rows], device=self.device)
        positions = self.batch.next(len(self.rows))
        logits = self._forward(
            [row.request.mixture for row in self.rows],
            input_ids=ids,
            position_ids=positions[:, None],
            attention_mask=self.batch.mask(self.model.dtype),
            past_key_values=self.batch,
        )
        self._accept(range(len(self.rows)), choose(logits, self.rows))

    def _forward(self, mixtures: Sequence[Mapping[str, float]], **inputs: Any) -> Tensor:
        """Logits (R, V) of the last token of every row, each under its own mixture."""
        names = tuple(getattr(self.model, "peft_config", ()))
        weights = torch.tensor([[float(one.get(name, 0.0)) for name in names] for one in mixtures])
        last = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        with self.model.mix(weights) if names else contextlib.nullcontext():
            return self.model(**inputs, **last, use_cache=True).logits[:, -1].float()

    def _accept(self, indices: Sequence[int], tokens: Sequence[int]) -> None:
        """A new token in some rows, of which those leave that end with it."""
        for i, token in reversed(list(zip(indices, tokens, strict=True))):
            request, text = self.rows[i].request, self.rows[i].text
            request.tokens.append(token)
            ended = token in self.ends
            piece = Piece("" if ended else text.add(token))
            if ended or text.stopped:
                piece.finish = "stop"
            elif len(request.tokens) == request.max_tokens:
                piece.finish = "length"
            if piece.finish:
                piece.text += text.end()
                self._leave(i)
            if piece.text or piece.finish:
                request.tell(piece)

    def _leave(self, i: int) -> None:
        last = self.rows.pop()
        if i < len(self.rows):
            self.rows[i] = last
            self.batch.move(len(self.rows), i)


@dataclass(eq=False)
class Newcomer:
    """A request whose prompt is being read."""

    request: Request
    cache: Cache
    read: int = 0


class Row:
    """A request in the batch."""

    def __init__(self, request: Request, tokenizer: Any):
        self.request = request
        self.text = Text(tokenizer, request.stop)
        self.generator = torch.Generator()
        if request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(request.seed)


class Batch(Cache):
    """Keys and values (S, H, L, D) of every layer; row i holds `lengths[i]` tokens and is written at their end."""

    def __init__(self, slots: int, length: int, like: Cache):
        super().__init__(layers=[])
        self.keys = [layer.keys.new_zeros(slots, *self._room(layer.keys, length)) for layer in like.layers]
        self.values = [layer.values.new_zeros(slots, *self._room(layer.values, length)) for layer in like.layers]
        self.lengths = torch.zeros(slots, dtype=torch.long)
        self.slots = torch.arange(slots, device=self.keys[0].device)
        self.positions = self.slots[:0]
        self.longest = 0

    @staticmethod
    def _room(one: Tensor, length: int) -> tuple[int, int, int]:
        return one.shape[1], length, one.shape[3]

    def __len__(self) -> int:
        return len(self.keys)

    def put(self, row: int, cache: Cache) -> None:
        """A prompt's keys and values into a slot, of which nothing older remains."""
        length = cache.get_seq_length()
        for slots, found in ((self.keys, "keys"), (self.values, "values")):
            for slot, layer in zip(slots, cache.layers, strict=True):
                slot[row, :, :length] = getattr(layer, found)[0]
                slot[row, :, length:] = 0
        self.lengths[row] = length

    def move(self, source: int, target: int) -> None:
        for slot in (*self.keys, *self.values):
            slot[target] = slot[source]
        self.lengths[target] = self.lengths[source]

    def next(self, rows: int) -> Tensor:
        """Makes room for one more token in the first rows, and says at which positions (R,)."""
        self.positions = self.lengths[:rows].to(self.slots.device, copy=True)
        self.lengths[:rows] += 1
        self.longest = int(self.lengths[:rows].max())
        return self.positions

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to the attention (R, 1, 1, L): nothing where a row has tokens, the least number elsewhere."""
        hidden = torch.arange(self.longest, device=self.slots.device) > self.positions[:, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(
            hidden, torch.finfo(dtype).min
        )[:, None, None]

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows = len(keys)
        found = []
        for slots, new in ((self.keys[layer], keys), (self.values[layer], values)):
            slots[self.slots[:rows], :, self.positions] = new[:, :, 0]
            found.append(slots[:rows, :, : self.longest])
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.longest - 1


def choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of every row: the best, or one drawn by its own generator, whatever else is in the batch.

    Draws are from the fewest best tokens that together have a probability of `top_p`.
    """
    best = logits.argmax(-1)
    drawing = [i for i, row in enumerate(rows) if row.request.temperature > 0]
    if not drawing:
        return best.tolist()
    settings = [(rows[i].request.temperature, rows[i].request.top_p) for i in drawing]
    chance = torch.stack([torch.rand((), dtype=torch.float64, generator=rows[i].generator) for i in drawing])
    temperature, top_p = torch.tensor(settings, dtype=torch.float64, device=logits.device).T[..., None]
    some = logits[drawing].double()
    p, tokens = ((some - some.amax(-1, keepdim=True)) / temperature).softmax(-1).sort(descending=True, stable=True)
    kept = p.cumsum(-1) - p < top_p
    kept[:, 0] = True
    total = (p * kept).cumsum(-1)
    place = torch.searchsorted(total, chance.to(total)[:, None] * total[:, -1:], right=True)
    place = place.minimum(kept.sum(-1, keepdim=True) - 1)
    best[drawing] = tokens.gather(-1, place)[:, 0]
    return best.tolist()


class Text:
    """Tokens -> text as it becomes certain: whole characters only, and nothing that may become a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.start = self.read = 0  # of the last part that was decoded: it shows how the next one joins on
        self.held = ""
        self.stopped = False

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decoded(self, whole: bool) -> str:
        """What new tokens add; nothing yet where a character may be incomplete, unless the `whole` is wanted."""
        text = self._decode(self.tokens[self.start :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not whole:
            return ""
        known = self._decode(self.tokens[self.start : self.read])
        self.start, self.read = self.read, len(self.tokens)
        return text[len(known) :]

    def add(self, token: int) -> str:
        """What is certain with one more token. `stopped` says whether a stop string ends it."""
        self.tokens.append(token)
        return self._release(self._decoded(whole=False), end=False)

    def end(self) -> str:
        """What was held back, where no more tokens come."""
        return "" if self.stopped else self._release(self._decoded(whole=True), end=True)

    def _release(self, text: str, end: bool) -> str:
        self.held += text
        found = [place for place in map(self.held.find, self.stop) if place >= 0]
        if found:
            self.stopped = True
            released, self.held = self.held[: min(found)], ""
            return released
        lengths = [n for stop in self.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])]
        keep = 0 if end else max(lengths, default=0)
        released, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return released
