"""Continuous batching: requests with mixtures of their own join and leave a running batch between two tokens.

A newcomer's prompt is read alone, a chunk at a time, as the model itself would read it; then its keys and values move
into a slot of the batch, where every row has its own length and its own mixture of experts. Where a row ends, the last
one moves into its slot. So nothing is padded, and no row waits for the end of another one.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from svf.adapt import Adaptive, Route
from svf.generate import Request

# Shapes: R rows of the batch, S slots, H key-value heads, L tokens that fit a slot, D width of a head, V vocabulary


LONGEST = 4096
"""Tokens that a slot has room for, if it is not said how many."""


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
class Job:
    """A request in work. `tell` is called in the engine's thread with every `Piece`, or once with an exception."""

    request: Request
    prompt: Sequence[int]
    """The request's tokens."""
    max_tokens: int
    tell: Callable[[Piece | Exception], None]
    route: Route | None = None
    """What it is answered with; found by the model's strategy if not given."""
    temperature: float = 0.0
    """0: always the best token."""
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    deadline: float = float("inf")
    """On the clock of `time.monotonic`."""
    cancelled: bool = False
    """Nobody wants the answer any more; may be set at any time."""
    tokens: list[int] = field(default_factory=list)
    """The answer so far, with the token that ended it."""

    def fail(self, problem: Exception) -> None:
        """Ends it with an exception."""
        self.cancelled = True
        self.tell(problem)


class Engine:
    """Answers requests with one model in one thread, the one that calls `run`.

    Args:
        adaptive: the model, its experts, and what decides between them; of full attention, on one device.
        slots: rows that run together.
        context: tokens of a prompt and its answer, for which every slot has memory; if not given what the model can
            read, up to 4,096.
        waiting: requests that may wait for a slot.
        chunk: tokens of prompts that are read between two tokens of the running rows.

    Raises:
        ValueError: for a model that cannot read so much, or does not keep the keys and values of all its tokens.
    """

    def __init__(
        self, adaptive: Adaptive, slots: int = 16, context: int | None = None, waiting: int = 64, chunk: int = 256
    ):
        self.adaptive, self.library, self.model = adaptive, adaptive.library, adaptive.library.base
        self.slots, self.most_waiting, self.chunk = slots, waiting, chunk
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or context or LONGEST
        self.context = context or min(limit, LONGEST)
        if not 1 < self.context <= limit:
            raise ValueError(f"context {context} is not from 2 to {limit}, what the model can read")
        self.ends = set(adaptive.generator.eos)
        self.device = adaptive.generator.device
        self.rows: list[Row] = []
        self.newcomer: Newcomer | None = None
        self.waiting: deque[Job] = deque()
        self.closing = self.left = False
        self.changed = threading.Condition()
        self.batch = Batch(slots, self.context, self._try_out())

    @torch.no_grad()
    def _try_out(self) -> Cache:
        """What one token leaves in the model's own cache."""
        attention = getattr(self.model.config, "_attn_implementation", "sdpa")
        if attention not in ("sdpa", "eager"):
            raise ValueError(f"rows of their own lengths need attention sdpa or eager, not {attention}")
        cache = DynamicCache(config=self.model.config)
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._forward([self.library.weights()], input_ids=token, past_key_values=cache)
        if other := {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}:
            raise ValueError(f"only models of full attention can be served, not one with {', '.join(sorted(other))}")
        return cache

    # From other threads

    def submit(self, job: Job) -> None:
        """Queues a request.

        Raises:
            Closed: after `close`.
            Full: where too many wait already.
            ValueError: where prompt and answer together are more than fits, or the prompt is empty.
        """
        if not job.prompt:
            raise ValueError("the prompt is empty")
        if len(job.prompt) + job.max_tokens > self.context:
            raise ValueError(
                f"a prompt of {len(job.prompt)} tokens and an answer of {job.max_tokens} are more than the "
                f"{self.context} that fit"
            )
        with self.changed:
            if self.closing:
                raise Closed("the server is shutting down")
            if len(self.waiting) >= self.most_waiting:
                raise Full(f"{len(self.waiting)} requests are waiting already; try again later")
            self.waiting.append(job)
            self.changed.notify()

    def close(self, at_once: bool = False) -> None:
        """No more requests; `run` returns when those taken are answered, or `at_once`, leaving them."""
        with self.changed:
            self.closing, self.left = True, at_once
            self.changed.notify()

    # In its own thread

    def run(self) -> None:
        """Works until `close`."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closing or self._all())
                if self.left or not self._all():
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
            for row in self.rows:
                row.job.fail(problem)
            self.rows.clear()

    def _all(self) -> list[Job]:
        newcomer = [self.newcomer.job] if self.newcomer else []
        with self.changed:
            return [*(row.job for row in self.rows), *newcomer, *self.waiting]

    def _drop(self) -> None:
        """Leaves what nobody waits for any more."""
        now = time.monotonic()
        for job in self._all():
            if now > job.deadline and not job.cancelled:
                job.fail(TimeoutError("the request took longer than its time limit"))
        with self.changed:
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
        if self.newcomer and self.newcomer.job.cancelled:
            self.newcomer = None
        for i in reversed(range(len(self.rows))):
            if self.rows[i].job.cancelled:
                self._leave(i)

    def _find_routes(self) -> None:
        """Routes, all in one pass, of those whose turn may come next."""
        with self.changed:
            lost = [job for job in list(self.waiting)[: self.slots - len(self.rows)] if job.route is None]
        try:
            self._route(lost)
        except Exception:  # perhaps because of one of them
            for job in lost:
                try:
                    self._route([job])
                except Exception as problem:
                    job.fail(problem)
            self._drop()

    def _route(self, jobs: Sequence[Job]) -> None:
        for job, route in zip(jobs, self.adaptive.route([job.request for job in jobs]), strict=True):
            job.route = route

    def _read(self) -> None:
        """Goes on with the next prompts, up to a chunk."""
        left = self.chunk
        while left > 0 and len(self.rows) < self.slots:
            if self.newcomer is None:
                with self.changed:
                    if not self.waiting or self.waiting[0].route is None:
                        return
                    self.newcomer = Newcomer(self.waiting.popleft(), DynamicCache(config=self.model.config))
            one, job = self.newcomer, self.newcomer.job
            piece = job.prompt[one.read : one.read + left]
            try:
                ids = torch.tensor([piece], device=self.device)
                logits = self._forward([job.route.weights], input_ids=ids, past_key_values=one.cache)
            except Exception as problem:
                job.fail(problem)
                self.newcomer = None
                return
            one.read += len(piece)
            left -= len(piece)
            if one.read == len(job.prompt):
                self.batch.put(len(self.rows), one.cache)
                self.rows.append(Row(job, self.adaptive.generator.tokenizer))
                self.newcomer = None
                self._accept([len(self.rows) - 1], choose(logits, self.rows[-1:]))

    def _write(self) -> None:
        """One token in every row."""
        ids = torch.tensor([[row.job.tokens[-1]] for row in self.rows], device=self.device)
        positions = self.batch.next(len(self.rows))
        logits = self._forward(
            [row.job.route.weights for row in self.rows],
            input_ids=ids,
            position_ids=positions[:, None],
            attention_mask=self.batch.mask(self.model.dtype),
            past_key_values=self.batch,
        )
        self._accept(range(len(self.rows)), choose(logits, self.rows))

    def _forward(self, mixtures: Sequence[Tensor], **inputs: Any) -> Tensor:
        """Logits (R, V) of what follows every row, each under its own mixture."""
        with self.library.mix(self.library.batch(mixtures)):
            return self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].float()

    def _accept(self, indices: Sequence[int], tokens: Sequence[int]) -> None:
        """A new token in some rows, of which those leave that end with it."""
        for i, token in reversed(list(zip(indices, tokens, strict=True))):
            job, text = self.rows[i].job, self.rows[i].text
            job.tokens.append(token)
            piece = Piece("" if token in self.ends else text.add(token))
            if token in self.ends or text.stopped:
                piece.finish = "stop"
            elif len(job.tokens) == job.max_tokens:
                piece.finish = "length"
            if piece.finish:
                piece.text += text.end()
                self._leave(i)
            if piece.text or piece.finish:
                job.tell(piece)

    def _leave(self, i: int) -> None:
        last = self.rows.pop()
        if i < len(self.rows):
            self.rows[i] = last
            self.batch.move(len(self.rows), i)


@dataclass(eq=False)
class Newcomer:
    """A request whose prompt is being read."""

    job: Job
    cache: Cache
    read: int = 0


class Row:
    """A request in the batch."""

    def __init__(self, job: Job, tokenizer: Any):
        self.job = job
        self.text = Text(tokenizer, job.stop)
        self.random = torch.Generator()
        if job.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(job.seed)


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
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)[
            :, None, None
        ]

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
    drawing = [i for i, row in enumerate(rows) if row.job.temperature > 0]
    if not drawing:
        return best.tolist()
    settings = [(rows[i].job.temperature, rows[i].job.top_p) for i in drawing]
    chance = torch.stack([torch.rand((), dtype=torch.float64, generator=rows[i].random) for i in drawing])
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


# ----------------------------------------------------------------------------------------------------------------------
# What a batch's answers are compared with

TIE = 1e-4
"""Between the two best logits: round-off may choose either."""


class Alone:
    """What a model answers to one prompt by itself, greedily, through its own `generate`."""

    def __init__(self, model: Adaptive, prompt: str, weights: torch.Tensor, max_tokens: int):
        library, generator = model.library, model.generator
        ids = torch.tensor([generator.encode(prompt)], device=generator.device)
        with library.mix(weights[None]), torch.no_grad():
            found = library.base.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=generator.eos or None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        self.tokens = found.sequences[0, ids.shape[1] :].tolist()
        best = torch.cat(found.logits).topk(2).values
        self.margins = (best[:, 0] - best[:, 1]).tolist()
        self.text = generator.text(self.tokens)
        self.finish = "stop" if self.tokens[-1] in generator.eos else "length"
        self._starts = [
            generator.text(self.tokens[:n]).rstrip("\N{REPLACEMENT CHARACTER}") for n in range(len(self.tokens))
        ]

    def compare(self, answer: str) -> str:
        """An answer to the same prompt: "same", "tie" where it parts from this one at a near tie, else "wrong"."""
        if answer == self.text:
            return "same"
        parts = sum(answer.startswith(start) for start in self._starts) - 1
        # of a character of several tokens, four at most, only the last one shows: it can part at any of them
        same = [n for n in range(max(0, parts - 3), parts + 1) if self._starts[n] == self._starts[parts]]
        return "tie" if min(self.margins[n] for n in same) < TIE else "wrong"
