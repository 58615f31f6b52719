"""Spectral bases: which directions an expert rescales, found once per matrix and kept.

A basis is the singular vectors of a matrix's shorter side and its singular values, from the eigenvectors of the Gram
matrix in fp64. Matrices are independent of each other: they are read one at a time, split among the ranks of a
distributed run, and each is cached in a file named by the content of its weight, so that a killed run goes on where
it was, and any set of target modules finds what another has paid for.

The identity of a basis is that of the weights and of the solver, never of computed factors: those differ in their last
bits between machines and thread counts, harmlessly.
"""

import copy
import functools
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

SOLVER = "fp64-1"
"""Name and version of what bases are: full fp64 singular vectors, largest value first. Part of the basis hash."""

CACHE_FROM = 512
"""Matrices of fewer directions are decomposed anew each time: that is faster than reading a file."""


@dataclass
class DecompositionOptions:
    """How bases are made. They do not depend on any of this, and it is not saved with an expert."""

    solver: Literal["eigh", "svd"] = "eigh"
    """Gram matrix and eigenvectors, or a full singular value decomposition; both in fp64."""
    device: str | None = None
    """Where to compute; a GPU where there is one, or else where the weight is."""
    cache: str | bool = True
    """A folder; true for $SVF_CACHE or ~/.cache/svf; false for none."""
    checkpoint: str | None = None
    """Folder of the unquantised weights, for a quantised base."""
    progress: bool = True
    """A progress bar with the time left, where it takes long."""

    @classmethod
    def of(cls, options: "Mapping[str, Any] | DecompositionOptions | None") -> "DecompositionOptions":
        """Raises ValueError on a name that is not an option."""
        if isinstance(options, cls):
            return options
        options, names = options or {}, [f.name for f in fields(cls)]
        if unknown := [name for name in options if name not in names]:
            raise ValueError(f"decomposition has no option {unknown[0]!r}; there are {', '.join(names)}")
        chosen = cls(**options)
        if chosen.solver not in ("eigh", "svd"):
            raise ValueError(f"decomposition solver {chosen.solver!r} is none of eigh, svd")
        return chosen

    @property
    def folder(self) -> Path | None:
        if self.cache is False:
            return None
        if self.cache is True:
            return Path(os.environ.get("SVF_CACHE", Path.home() / ".cache" / "svf"))
        return Path(self.cache)


class Basis(NamedTuple):
    """Singular vectors of the shorter side (..., N, K), largest first, and the singular values (..., K)."""

    vectors: Tensor
    values: Tensor


@dataclass
class Matrix:
    """One weight to decompose: its name, shape (..., n_out, n_in) as a matrix, and how to get it."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    """The weight as it is stored; its bytes are the identity."""
    as_matrix: Callable[[Tensor], Tensor] = field(default=lambda weight: weight)
    """The stored weight as (..., n_out, n_in)."""
    transposed: bool = False
    """Whether it is stored as (n_in, n_out): of the same bytes, another basis where it is square."""

    @property
    def directions(self) -> int:
        return min(self.shape[-2:])

    @property
    def cost(self) -> float:
        """In arbitrary units of time."""
        return float(torch.Size(self.shape[:-2]).numel()) * self.directions**2 * (8 * self.directions + sum(self.shape))


# ----------------------------------------------------------------------------------------------------------------------
# Solving


def solve(
    weight: Tensor,
    solver: str = "eigh",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float64,
) -> Basis:
    """The basis of one matrix or a stack of them, in fp64.

    Args:
        weight: (..., n_out, n_in), any float dtype.
        solver: "eigh" or "svd".
        device: where to compute; as it is, or on a GPU where there is one, if not given.
        dtype: of the vectors that are returned.

    Returns:
        On the device where it was computed, values in fp64. The side is the shorter one; the input side where both are
        equal.
    """
    if device is None and torch.cuda.is_available() and not weight.is_cuda:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    if weight.ndim > 2:  # one at a time: a stack of experts would not fit in fp64
        parts = [solve(part, solver, device, dtype) for part in weight]
        return Basis(*(torch.stack(column) for column in zip(*parts, strict=True)))
    w = weight.detach().to(device=device or weight.device, dtype=torch.float64)
    inputs = side_of(w.shape) == "in"
    if solver == "svd":
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        return Basis((vh.mT if inputs else u).to(dtype).contiguous(), s)
    squares, vectors = torch.linalg.eigh(w.mT @ w if inputs else w @ w.mT)
    return Basis(vectors.flip(-1).to(dtype).contiguous(), squares.flip(-1).clamp(min=0).sqrt())


def side_of(shape: tuple[int, ...]) -> str:
    """Which side of a matrix (..., n_out, n_in) its basis spans: "in" or "out"."""
    return "in" if shape[-2] >= shape[-1] else "out"


# ----------------------------------------------------------------------------------------------------------------------
# Identity


def digest(weight: Tensor) -> str:
    """SHA-256 over shape, dtype and bytes of a stored weight."""
    weight = weight.detach().cpu().contiguous()
    seen = hashlib.sha256(f"{tuple(weight.shape)} {str(weight.dtype).removeprefix('torch.')} ".encode())
    seen.update(weight.flatten().view(torch.uint8).numpy())
    return seen.hexdigest()


def digests(matrices: list[Matrix]) -> list[str]:
    """`digest` of every matrix, in threads (hashing releases the interpreter) that hold one matrix each: together no
    more bytes than the largest one takes in fp64, which solving it needs anyway."""
    if not matrices:
        return []
    first = matrices[0].load()
    at_once = max(1, 8 // first.element_size())
    del first
    with ThreadPoolExecutor(min(at_once, 4, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda matrix: digest(matrix.load()), matrices))


def basis_hash(digest_by_name: Mapping[str, str]) -> str:
    """Identity of the bases of a set of weights: SHA-256 over the solver and every weight's name and digest."""
    lines = [SOLVER, *(f"{name} {digest_by_name[name]}" for name in sorted(digest_by_name))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Cache


def _file(folder: Path, weight_digest: str, matrix: Matrix) -> Path:
    return folder / f"{SOLVER}-{weight_digest}{'-T' if matrix.transposed else ''}.safetensors"


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Bases have the precision of their weights: 16 bit for 16-bit ones."""
    return dtype if dtype in (torch.bfloat16, torch.float16, torch.float64) else torch.float32


def _write(path: Path, basis: Basis) -> None:
    """Written aside, then renamed: a file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"vectors": basis.vectors.cpu(), "values": basis.values.cpu()}, aside)
    os.replace(aside, path)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        ValueError: where it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as problem:
        raise ValueError(f"{path} is damaged ({problem}); remove it, or get it again") from None


def _read(path: Path, top_k: int | None) -> Basis:
    with opened(path) as file:
        vectors, values = file.get_slice("vectors"), file.get_tensor("values")
        return Basis(vectors[..., : top_k or values.shape[-1]].contiguous(), values[..., : top_k or None])


def _ranks() -> tuple[int, int]:
    """(rank, number of ranks) of a distributed run, also where only torchrun's environment says so."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _clean(folder: Path) -> None:
    """Removes what runs that were killed more than an hour ago left half-written."""
    for aside in folder.glob(f"{SOLVER}-*.tmp"):
        if time.time() - aside.stat().st_mtime > 3600:
            aside.unlink(missing_ok=True)


def fill(matrices: list[Matrix], options: DecompositionOptions, known: list[str] | None = None) -> list[str]:
    """Decomposes what the cache lacks, each rank its share, one matrix in memory at a time. Returns the digests.

    Args:
        matrices: what to decompose; small ones (`CACHE_FROM`) are left out, they are not cached.
        options: with a cache folder.
        known: digests of the matrices, where they are known already.

    Raises:
        ValueError: where `options.cache` is false.
    """
    folder = options.folder
    if folder is None:
        raise ValueError("there is no cache to fill; set decomposition cache to a folder")
    known = known or digests(matrices)
    rank, ranks = _ranks()
    cached = [pair for pair in zip(matrices, known, strict=True) if pair[0].directions >= CACHE_FROM]
    share = sorted(cached, key=lambda pair: -pair[0].cost)[rank::ranks]
    missing = [(matrix, key) for matrix, key in share if not _file(folder, key, matrix).exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
    with _progress([matrix for matrix, _ in missing], options.progress and rank == 0) as advance:
        for matrix, key in missing:
            _solve_into(_file(folder, key, matrix), matrix, options)
            advance(matrix)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return known


def _solve_into(path: Path, matrix: Matrix, options: DecompositionOptions) -> None:
    if path.exists():  # another run may have been here meanwhile
        return
    _write(path, _solved(matrix, options))


def _solved(matrix: Matrix, options: DecompositionOptions) -> Basis:
    """Its weight is let go of before the next one is read.

    Raises:
        ValueError: where it is not finite.
    """
    weight = matrix.load()
    if not torch.isfinite(weight).all():
        raise ValueError(f"{matrix.name} has values that are not finite; it cannot be decomposed")
    return solve(matrix.as_matrix(weight), options.solver, options.device, _kept_dtype(weight.dtype))


def bases(
    matrices: list[Matrix], options: DecompositionOptions, known: list[str], top_k: list[int | None]
) -> Iterator[Basis]:
    """The basis of every matrix, from the cache or decomposed now; vectors in the weight's precision, values in fp64.

    Args:
        matrices: all the same on every rank of a distributed run.
        options: see there.
        known: digests of the matrices.
        top_k: how many directions of each, the largest first; None for all.
    """
    folder = options.folder
    if folder is not None:
        fill(matrices, options, known)
    alone = [matrix for matrix in matrices if folder is None or matrix.directions < CACHE_FROM]
    with _progress(alone, options.progress) as advance:
        for matrix, key, kept in zip(matrices, known, top_k, strict=True):
            if folder is not None and matrix.directions >= CACHE_FROM:
                _solve_into(_file(folder, key, matrix), matrix, options)  # a rank without a shared disk
                yield _read(_file(folder, key, matrix), kept)
                continue
            vectors, values = _solved(matrix, options)
            yield Basis(vectors[..., :kept].contiguous(), values[..., :kept])
            del vectors, values
            advance(matrix)


@contextmanager
def _progress(matrices: list[Matrix], wanted: bool) -> Iterator[Callable[[Matrix], None]]:
    """A bar with the time left, for work of more than a few seconds."""
    total = sum(matrix.cost for matrix in matrices)
    if not wanted or total < 2e10:
        yield lambda matrix: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"), TimeElapsedColumn())
    columns = (*columns, TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, speed_estimate_period=math.inf) as bar:  # a matrix may take longer than its 30 s
        task = bar.add_task("Decomposing", total=total, done=f"0/{len(matrices)}")
        bar.advance(task, 0)  # the start counts as a sample, so that the first matrix tells the time left
        count = 0

        def advance(matrix: Matrix) -> None:
            nonlocal count
            count += 1
            bar.update(task, advance=matrix.cost, done=f"{count}/{len(matrices)}")

        yield advance


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoint_tensors(folder: str | Path, model: nn.Module | None = None) -> dict[str, Callable[[], Tensor]]:
    """Name of every tensor of a checkpoint folder -> how to read it, alone.

    Args:
        folder: with safetensors files.
        model: of Transformers, also on the meta device, to have its parameters by their own names where they are stored
            otherwise: the experts of a layer one by one, for example.

    Raises:
        FileNotFoundError: where there is no safetensors file.
    """
    found: dict[str, Callable[[], Tensor]] = {}
    for path in sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []:
        with opened(path) as file:
            found.update({name: functools.partial(_tensor, path, name) for name in file.keys()})  # noqa: SIM118
    if not found:
        raise FileNotFoundError(f"{folder} holds no safetensors file; give the folder of a checkpoint")
    return found | _converted(found, model) if isinstance(model, PreTrainedModel) else found


def _converted(tensors: Mapping[str, Callable[[], Tensor]], model: PreTrainedModel) -> dict[str, Callable[[], Tensor]]:
    """Parameters that Transformers makes of several tensors of a checkpoint, or of one with another name."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parts: dict[str, list[tuple[str, str | None]]] = {}
    for stored in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters)
        if name != stored:
            parts.setdefault(name, []).append((stored, pattern))

    def load(name: str) -> Tensor:
        (stored, pattern), *_ = parts[name]
        if pattern is None:
            return tensors[stored]()
        converter = copy.deepcopy(by_pattern[pattern])
        for stored, pattern in parts[name]:
            converter.add_tensor(name, stored, pattern, tensors[stored])
        made = converter.convert(name, model=model, config=model.config)[name]
        return made[0] if isinstance(made, list) else made

    return {name: functools.partial(load, name) for name in parts}


def in_checkpoint(matrix: Matrix, tensors: Mapping[str, Callable[[], Tensor]]) -> Matrix:
    """The same matrix, read from a checkpoint instead of from a model.

    Raises:
        KeyError: where the checkpoint does not hold it under its name (with or without the outermost module's).
    """
    for name in (matrix.name, matrix.name.partition(".")[2], *(f"{p}.{matrix.name}" for p in ("model", "transformer"))):
        if name in tensors:
            return replace(matrix, load=tensors[name])
    raise KeyError(f"the checkpoint has no tensor {matrix.name}")


def _tensor(path: Path, name: str) -> Tensor:
    with opened(path) as file:
        return file.get_tensor(name)
