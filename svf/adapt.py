"""A model that adapts itself (Transformer², arXiv 2501.06252): look at a request, mix experts for it, answer.

    library = ExpertLibrary(model, ["experts/math", "experts/code"])
    adaptive = Adaptive(model, tokenizer, library, "prompt")
    for answer in adaptive.generate(["3 + 4 =", "reverse abc:"]):
        print(answer.text, answer.route.label, answer.route.reason)

A first pass routes the requests (`prompt`, `classifier`, `few_shot`, or any callable), a second one answers all of them
in one batch, every row with its own mixture.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from svf import search
from svf.experts import DISPATCH, ExpertLibrary, Mixture
from svf.generate import Generator, Prefill, Request, common_prefix
from svf.search import Found, Method

CLASSIFY = "Kinds: {labels}.\nRequest: {prompt}\nKind:"
"""What a request is classified with; the answer is one of the labels, after a space."""
OTHER = "other"
"""The kind of requests that no expert is for."""


@dataclass(frozen=True, eq=False)
class Route:
    """The mixture that a request is answered with, and why."""

    weights: Tensor
    """(experts,) in the library's order, or (layers, experts)."""
    label: str
    reason: str
    scores: Mapping[str, float] = field(default_factory=dict)
    """Probability of every kind, where the request was classified."""


@dataclass(frozen=True, eq=False)
class Answer:
    text: str
    route: Route
    ids: list[int]
    """Tokens of the text, the end among them where it was reached."""


class Strategy(Protocol):
    """What decides about routes. Any callable of a list of requests does too, see `Adaptive`."""

    def route(self, adaptive: "Adaptive", requests: Sequence[Request]) -> list[Route]: ...


# ----------------------------------------------------------------------------------------------------------------------
# The model


class Adaptive:
    """A base model, experts and a strategy: answers every request with a mixture of its own.

    Args:
        model: the base, or the library's model.
        tokenizer: the model's.
        library: an `ExpertLibrary` of this model, or what one is made from.
        strategy: "base" (no expert), "prompt" (the base names the kind of request), "classifier" (the expert
            "dispatch" does), the name of an expert, weights by name, a `Strategy` such as `FewShot(examples)`, or a
            callable that takes the list of requests and gives for each a `Route`, the name of an expert, weights by
            name, or None for the base.

    Raises:
        ValueError: for an unknown strategy, or a library of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        library: ExpertLibrary | Mapping[str, Any] | Sequence[Any] = (),
        strategy: "str | Mapping[str, float] | Strategy | Callable[[list[Request]], Sequence[Any]]" = "prompt",
    ):
        if not isinstance(library, ExpertLibrary):
            library = ExpertLibrary(model, library)
        if model is not library.model and model is not library.base:
            raise ValueError("the library is one of another model; give Adaptive its `library.model`")
        library.model.eval()
        self.library, self.tokenizer = library, tokenizer
        self.generator = Generator(library, tokenizer)
        self.strategy = _strategy(strategy, library)
        self._ids: list[list[int]] = []  # the requests in work, and the same as the base has read them
        self._read: Prefill | None = None

    def route(self, requests: Sequence[Request]) -> list[Route]:
        """First pass: the mixture of every request.

        Raises:
            ValueError: for routes that are not one for each request, or an expert that there is not.
        """
        routes = self.strategy.route(self, list(requests)) if requests else []
        if len(routes) != len(requests):
            raise ValueError(f"the strategy gave {len(routes)} routes for {len(requests)} requests")
        return routes

    def generate(
        self, requests: Sequence[Request], max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[Answer]:
        """Both passes: an answer for every request, with its route. What does not fit into memory goes in batches.

        Args:
            requests: prompts, or conversations (lists of messages), which the tokenizer's chat template renders.
            max_new_tokens: where an answer is cut off.
            temperature: 0 for the likeliest token every time, otherwise tokens are drawn.
            seed: of the drawing.

        Raises:
            ValueError: for a request that leaves no room for `max_new_tokens` in the model's context.
        """
        if isinstance(requests, str) or (requests and isinstance(requests[0], Mapping)):
            raise ValueError("give a list of requests, also for one")
        ids = [self.generator.encode(request) for request in requests]
        self.generator.check_room(ids, max_new_tokens)
        answers: dict[int, Answer] = {}
        for rows in self.generator.batches([len(row) for row in ids], max_new_tokens):
            try:
                self._ids = [ids[i] for i in rows]
                routes = self.route([requests[i] for i in rows])
                weights = self.library.batch([route.weights for route in routes])
                start = self.generator.prefill(self._ids, weights, base=self._read)
            finally:
                self._ids, self._read = [], None
            written, _ = self.generator.decode(start, weights, max_new_tokens, temperature, seed + len(answers))
            for i, route, found in zip(rows, routes, written, strict=True):
                answers[i] = Answer(self.generator.text(found), route, found)
        return [answers[i] for i in range(len(requests))]

    def read(self) -> Tensor:
        """For strategies: the base reads the requests in work. Those routed to the base are then not read again.

        Returns:
            Logits (requests, vocabulary) of the token after each.
        """
        if not self._ids:
            raise ValueError("there are no requests in work; call this from a strategy while `generate` runs")
        if self._read is None:
            self._read = self.generator.prefill(
                self._ids, self.library.batch([self.library.weights()] * len(self._ids))
            )
        return self._read.logits_BV

    def check(self, examples: Sequence[Any], max_new_tokens: int = 64, checker: "Checker | None" = None) -> "Report":
        """Answers examples and tells which ones rightly. For a report: those that few-shot chose by are refused.

        Args:
            examples: (prompt, check) pairs, or anything with `prompt` and `check`.
            max_new_tokens: where an answer is cut off.
            checker: see `FewShot`.

        Raises:
            ValueError: where an example was one to choose the mixture by.
        """
        chosen_by = {_key(prompt_of(example)) for example in getattr(self.strategy, "examples", ())}
        prompts = [prompt_of(example) for example in examples]
        if both := [prompt for prompt in prompts if _key(prompt) in chosen_by]:
            raise ValueError(
                f"{len(both)} examples chose the mixture and cannot report on it, the first is {both[0]!r}"
            )
        answers = self.generate(prompts, max_new_tokens)
        return Report(answers, check_all(examples, [answer.text for answer in answers], checker))


@dataclass(frozen=True)
class Report:
    answers: list[Answer]
    right: list[bool]

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


# ----------------------------------------------------------------------------------------------------------------------
# Examples: (prompt, check) pairs, or anything with `prompt` and `check`

Checker = Callable[[Sequence[Any], Sequence[str]], Sequence[bool]]
"""Checks many completions at once, one for every example."""


def prompt_of(example: Any) -> Request:
    return example[0] if isinstance(example, tuple) else example.prompt


def check_all(examples: Sequence[Any], texts: Sequence[str], checker: Checker | None = None) -> list[bool]:
    if checker is not None:
        return [bool(right) for right in checker(examples, texts)]
    checks = [example[1] if isinstance(example, tuple) else example.check for example in examples]
    return [bool(check(text)) for check, text in zip(checks, texts, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# Strategies


@dataclass
class Fixed:
    """The same mixture for all."""

    mixture: Mixture
    label: str

    def route(self, adaptive: Adaptive, requests: Sequence[Request]) -> list[Route]:
        weights = adaptive.library.weights(self.mixture)
        return [Route(weights, self.label, "asked for") for _ in requests]


@dataclass
class Custom:
    """Any callable: list of requests -> for each a `Route`, the name of an expert, weights, or None for the base."""

    choose: Callable[[list[Request]], Sequence[Any]]

    def route(self, adaptive: Adaptive, requests: Sequence[Request]) -> list[Route]:
        return [self._route(adaptive.library, chosen) for chosen in self.choose(list(requests))]

    def _route(self, library: ExpertLibrary, chosen: Any) -> Route:
        if isinstance(chosen, Route):
            return chosen
        name = getattr(self.choose, "__name__", type(self.choose).__name__)
        if isinstance(chosen, str) and chosen not in (*library.names, "base"):
            return Route(library.weights(), OTHER, f"{name} says {chosen!r}, for which there is no expert")
        label = chosen if isinstance(chosen, str) else "base" if chosen is None else "mixture"
        return Route(library.weights(chosen), label, f"{name} says so")


@dataclass
class Classify:
    """The kind of a request is the label that `by` finds likeliest after `CLASSIFY`, its expert answers.

    Labels are scored as if nothing else could be written: at every token, the probability is shared out among the
    tokens that some label goes on with. So they sum to one, and a label does not lose by being longer. Of a request
    that does not fit into the model's context together with `CLASSIFY`, tokens in the middle are left out.
    """

    by: str | None = None
    """The expert that classifies; the base itself if not given."""

    def __post_init__(self) -> None:
        self._prefixes: dict[tuple, tuple[list[int], Prefill] | None] = {}

    def route(self, adaptive: Adaptive, requests: Sequence[Request]) -> list[Route]:
        library = adaptive.library
        labels = [*library.kinds, OTHER]
        found = self.probabilities(adaptive, requests, labels)
        routes = []
        for row in found.tolist():
            best = max(range(len(labels)), key=row.__getitem__)
            label, scores = labels[best], dict(zip(labels, row, strict=True))
            reason = f"{self.by or 'the base'} takes it for {label} ({row[best]:.0%})"
            routes.append(Route(library.weights(None if label == OTHER else label), label, reason, scores))
        return routes

    def probabilities(self, adaptive: Adaptive, requests: Sequence[Request], labels: Sequence[str]) -> Tensor:
        """(requests, labels), each row sums to one.

        Raises:
            ValueError: where the labels leave no room for a request, or one is the beginning of another and the model
                has no token that ends an answer.
        """
        generator, library = adaptive.generator, adaptive.library
        named = ", ".join(labels)
        answers = [[*generator.continuation("Kind:", f" {label}"), *generator.eos[:1]] for label in labels]
        for (label, ids), (other, more) in permutations(zip(labels, answers, strict=True), 2):
            if more[: len(ids)] == ids:
                raise ValueError(
                    f"{label!r} and {other!r} cannot be told apart, since this model has no token that ends an "
                    "answer: give one of the experts a name that begins otherwise"
                )
        asked = self._asked(generator, named, requests, max(map(len, answers)))
        common = common_prefix([ids[: len(ids) - len(generator.eos[:1])] for ids in answers])
        asked = [[*ids, *common] for ids in asked]
        answers = [tuple(ids[len(common) :]) for ids in answers]
        weights = library.weights(self.by)
        found = torch.zeros(len(requests), len(labels))
        for rows in generator.batches([len(ids) for ids in asked], max(map(len, answers))):
            mixtures = weights.expand(len(rows), -1)
            prefix = self._prefix(generator, named, weights)
            start = generator.prefill([asked[i] for i in rows], mixtures, prefix=prefix)
            found[rows] = _constrained(generator, start, mixtures, answers).cpu()
        return found

    def _asked(self, generator: Generator, labels: str, requests: Sequence[Request], longest: int) -> list[list[int]]:
        """What each request is classified with; `longest`: tokens of a label."""
        asked = [generator.encode(CLASSIFY.format(labels=labels, prompt=_said(request))) for request in requests]
        room = (generator.context or math.inf) - longest
        if all(len(ids) <= room for ids in asked):
            return asked
        template = self._template(generator, labels)
        before, after = (len(common_prefix([ids[::way] for ids in template])) for way in (1, -1))
        if room <= before + after:
            raise ValueError(
                f"the names of the experts leave no room for a request in the model's context of {generator.context} "
                "tokens: use fewer experts or shorter names, or another strategy"
            )
        middle = before + (room - before - after) // 2
        return [ids[:middle] + ids[middle + max(0, len(ids) - room) :] for ids in asked]

    def _template(self, generator: Generator, labels: str) -> list[list[int]]:
        """`CLASSIFY` for requests that have nothing in common."""
        return [generator.encode(CLASSIFY.format(labels=labels, prompt=text)) for text in ("a", "1", "(")]

    def _prefix(self, generator: Generator, labels: str, weights: Tensor) -> tuple[list[int], Prefill] | None:
        """What all requests begin with, read once for as long as labels and experts are the same."""
        key = generator.library, generator.library.changes, labels
        if key not in self._prefixes:
            ids = common_prefix(self._template(generator, labels))
            self._prefixes = {key: (ids, generator.prefill([ids], weights[None])) if ids else None}
        return self._prefixes[key]


def _constrained(generator: Generator, start: Prefill, weights: Tensor, answers: Sequence[tuple[int, ...]]) -> Tensor:
    """Probabilities (rows, answers) where nothing else can be written; no answer is the beginning of another."""
    log = torch.zeros(len(start), len(answers), device=start.logits_BV.device)
    begun = dict.fromkeys(answer[:n] for answer in answers for n in range(len(answer)))
    for prefix in begun:
        going_on = [i for i, answer in enumerate(answers) if answer[: len(prefix)] == prefix]
        tokens = list(dict.fromkeys(answers[i][len(prefix)] for i in going_on))
        if len(tokens) == 1:
            continue
        read = generator.prefill([prefix] * len(start), weights, past=start) if prefix else start
        shares = read.logits_BV[:, tokens].float().log_softmax(-1)
        for i in going_on:
            log[:, i] += shares[:, tokens.index(answers[i][len(prefix)])]
    return log.exp()


@dataclass
class FewShot:
    """One mixture for all requests, the one that answers a few examples best: a search over the weights of experts.

    A candidate's score is the share of examples that it answers rightly. Ties go to the base, which is left only for
    more right answers, then to the candidate that is surer of its right ones (the mean probability of a token of them,
    0 for wrong ones), then to the one seen first. The first ones are the base and every single expert. A population is
    a batch: one row for every candidate and example.
    """

    examples: Sequence[Any]
    """(prompt, check) pairs, or anything with `prompt` and `check`."""
    per_layer: bool = False
    """Weights by layer instead of one for each expert."""
    experts: Sequence[str] | None = None
    """Which to mix; all but the one that classifies if not given."""
    method: Method = "cem"
    population: int = 32
    generations: int = 20
    seed: int = 0
    max_new_tokens: int = 64
    progress: bool = True
    checker: Checker | None = None
    """Checks many completions at once; the examples' own `check` one by one if not given."""
    found: Found | None = field(default=None, init=False, repr=False)
    """What the search has come to, once it ran; `best` is a mixture in the order that the library had then, see
    `mixture`."""

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("few-shot needs examples")
        self._names: tuple[str, ...] = ()  # whose weights `found.best` holds, and of which layers
        self._layers: tuple[str, ...] = ()
        self._checked: dict[tuple[int, str], bool] = {}

    def route(self, adaptive: Adaptive, requests: Sequence[Request]) -> list[Route]:
        found = self.found or self.fit(adaptive)
        weights = self.mixture(adaptive.library)
        right, parts = found.score[0] * len(self.examples), ", ".join(_parts(adaptive.library, weights)) or "the base"
        reason = f"{right:.0f} of {len(self.examples)} examples right: {parts}"
        return [Route(weights, "few_shot", reason) for _ in requests]

    def mixture(self, library: ExpertLibrary) -> Tensor:
        """The mixture found, (experts,) or (layers, experts), by name in the library's order of now.

        Experts that the library did not have when it was found get weight 0.

        Raises:
            ValueError: before `fit`, or where an expert of the mixture, or a layer of it, is not there any more.
        """
        if self.found is None:
            raise ValueError("few-shot has found no mixture yet; call fit first")
        best = self.found.best
        needed = [name for i, name in enumerate(self._names) if best[..., i].any()]
        if gone := [name for name in needed if name not in library.names]:
            raise ValueError(
                f"the mixture that few-shot found needs the expert {gone[0]!r}, which the library does not have any "
                "more; add it again, or call fit"
            )
        if best.ndim > 1 and library.layers != self._layers:
            raise ValueError("few-shot's weights by layer were found for other adapted layers; call fit again")
        weights = torch.zeros(*best.shape[:-1], len(library.names))
        for name in needed:
            weights[..., library.names.index(name)] = best[..., self._names.index(name)]
        return weights

    def fit(self, adaptive: Adaptive) -> Found:
        """Searches. The mixture found is `found.best`; `library.expert(found.best)` is an ordinary expert.

        Raises:
            ValueError: for unknown experts, or a population too small for the base and every expert.
        """
        library = adaptive.library
        names = list(library.kinds if self.experts is None else self.experts)
        if not names:
            raise ValueError("there are no experts to mix; add some to the library")
        columns = library.weights(dict.fromkeys(names, 1.0)).nonzero()[:, 0]
        layers = len(library.layers) if self.per_layer else 1

        def mixtures(candidates: Tensor) -> Tensor:
            """(candidates, numbers) -> (candidates, layers, experts)."""
            whole = torch.zeros(len(candidates), layers, len(library.names))
            whole[..., columns] = candidates.view(len(candidates), layers, len(names))
            return whole if self.per_layer else whole[:, 0]

        def evaluate(candidates: Tensor) -> list[search.Score]:
            whole = mixtures(candidates)
            found = zip(whole, self.scores(adaptive, whole), strict=True)
            return [(right, sure if mixture.any() else 1.0) for mixture, (right, sure) in found]

        corners = torch.cat([torch.zeros(1, len(names)), torch.eye(len(names))])
        found = search.maximize(
            evaluate,
            first=corners.repeat(1, layers),
            mean=torch.full((layers * len(names),), 1 / len(names)),
            method=self.method,
            population=self.population,
            generations=self.generations,
            seed=self.seed,
            progress=self.progress,
        )
        found.best = mixtures(found.best[None])[0]
        self.found, self._names, self._layers = found, library.names, library.layers
        return found

    def scores(self, adaptive: Adaptive, mixtures: Tensor) -> list[search.Score]:
        """(share of right answers, mean probability of a token of right answers) of every mixture."""
        generator, n = adaptive.generator, len(self.examples)
        ids = [generator.encode(prompt_of(example)) for example in self.examples] * len(mixtures)
        generator.check_room(ids, self.max_new_tokens)
        weights = mixtures.repeat_interleave(n, dim=0)
        texts, sure = [""] * len(ids), torch.zeros(len(ids))
        for rows in generator.batches([len(row) for row in ids], self.max_new_tokens):
            start = generator.prefill([ids[i] for i in rows], weights[rows])
            answers, log_p = generator.decode(start, weights[rows], self.max_new_tokens)
            for i, answer in zip(rows, answers, strict=True):
                texts[i] = generator.text(answer)
            sure[rows] = torch.tensor(log_p).exp()
        right = self._right(texts)
        parts = zip(right.view(-1, n).mean(1).tolist(), (right * sure).view(-1, n).mean(1).tolist(), strict=True)
        return list(parts)

    def _right(self, texts: list[str]) -> Tensor:
        """1 or 0 for every answer; equal ones are checked once, since checks may run programs."""
        n = len(self.examples)
        keys = [(i % n, text) for i, text in enumerate(texts)]
        new = [key for key in dict.fromkeys(keys) if key not in self._checked]
        found = check_all([self.examples[i] for i, _ in new], [text for _, text in new], self.checker)
        self._checked |= zip(new, found, strict=True)
        return torch.tensor([float(self._checked[key]) for key in keys])


def _strategy(given: Any, library: ExpertLibrary) -> Strategy:
    if isinstance(given, str):
        if given == "base":
            return Fixed(None, "base")
        if given == "prompt":
            return Classify()
        if given == "classifier":
            if DISPATCH not in library.names:
                raise ValueError(f"strategy 'classifier' needs an expert named {DISPATCH!r} in the library")
            return Classify(DISPATCH)
        if given in library.names:
            return Fixed(given, given)
        known = ", ".join(("base", "prompt", "classifier", *library.names))
        raise ValueError(f"strategy {given!r} is none of {known}; few-shot is FewShot(examples)")
    if isinstance(given, Mapping):
        library.weights(given)
        return Fixed(given, "mixture")
    if hasattr(given, "route"):
        return given
    if callable(given):
        return Custom(given)
    raise ValueError(f"{given!r} is no strategy: give a name, weights by name, a callable, or an object with `route`")


def _said(request: Request) -> str:
    """What a request asks for: the prompt, or the last message of the user."""
    if isinstance(request, str):
        return request
    said = [message["content"] for message in request if message["role"] == "user"]
    if not said:
        raise ValueError("a conversation without a message of the user cannot be classified")
    return said[-1]


def _key(request: Request) -> str:
    return request if isinstance(request, str) else json.dumps([dict(message) for message in request], sort_keys=True)


def _parts(library: ExpertLibrary, weights: Tensor) -> list[str]:
    """0.6 math, 0.4 code; the mean over layers where they differ."""
    mean = weights.mean(0) if weights.ndim > 1 else weights
    return [f"{weight:.2f} {name}" for name, weight in zip(library.names, mean.tolist(), strict=True) if weight]
