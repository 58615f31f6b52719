"""Which parameters of its parts a module's own code reads: to wrap such a part changes nothing, or half of the model.

`nn.MultiheadAttention` does so with `out_proj.weight`, `nn.TransformerEncoder` with `layers.0.linear1.weight`, fused
state-space layers with their projections. Found in the source of the class, through local names, loops, indices and
its other methods; not in functions elsewhere that are handed a part.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import FunctionType

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

Path = tuple[str, ...]
"""Names of attributes and indices from a module on; ANY for an index that only the running code knows."""

ANY = "*"
HARMLESS = re.compile("dtype|device|shape|size|ndim|dim|numel|requires_grad|is_.*")
"""What may be asked of a parameter that is adapted."""
LOOKS = {"isinstance", "hasattr", "id", "type"}
ELSEWHERE = re.compile(
    r"__init__|__setstate__|extra_repr|_?(re)?set_.*|.*init_weights|_?(tie|load|resize|prune|save)_.*"
)
"""Methods that do not compute outputs."""


def reader(model: nn.Module, path: str) -> str | None:
    """Name of the class of a module above the one that holds a parameter which reads that parameter itself, if any."""
    around, names = model, path.replace(".base_layer.", ".").split(".")
    for i in range(len(names) - 1):
        if any(_is_read(tuple(names[i:]), by) for by in reads(type(around))):
            return type(around).__name__
        around = getattr(around, names[i])
        around = around.get_base_layer() if isinstance(around, BaseTunerLayer) else around
    return None


def _is_read(parameter: Path, by: Path) -> bool:
    n = len(parameter)
    if len(by) < n or any(a not in (b, ANY) for a, b in zip(by, parameter, strict=False)):
        return False
    return len(by) == n or not HARMLESS.fullmatch(by[n])


@functools.cache
def reads(kind: type) -> frozenset[Path]:
    """Everything that the methods of a class read of `self`, as deep as it is named there."""
    methods: dict[str, _Method] = {}
    for base in kind.__mro__:
        if base in (nn.Module, object) or base.__name__ in ("PreTrainedModel", "Sequential", "ModuleList"):
            continue
        for name, member in vars(base).items():
            if not ELSEWHERE.fullmatch(name) and (method := _parsed(member)) is not None:
                methods[name if name not in methods else f"{base.__name__}.{name}"] = method
    changed = True
    while changed:  # until no name in any method can stand for anything new
        changed = any([method.follow(methods) for method in methods.values()])
    return frozenset(path for method in methods.values() for path in method.reads())


def _parsed(member: object) -> "_Method | None":
    if isinstance(member, staticmethod | classmethod):
        return None
    member = getattr(member, "fget", None) or getattr(member, "func", None) or member  # properties
    function = inspect.unwrap(member) if callable(member) else member
    if not isinstance(function, FunctionType):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    return _Method(tree) if isinstance(tree, ast.FunctionDef) and tree.args.args else None


class _Method:
    """One method: what its local names can stand for, in whatever order its lines run."""

    def __init__(self, tree: ast.FunctionDef):
        self.arguments = [argument.arg for argument in tree.args.args]
        self.names: dict[str, set[Path]] = {self.arguments[0]: {()}}
        self.nodes = list(ast.walk(tree))
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}

    def paths(self, node: ast.AST | None) -> set[Path]:
        """What an expression can stand for."""
        match node:
            case ast.Name(name):
                return self.names.get(name, set())
            case ast.Attribute(value, name):
                return {(*path, name) for path in self.paths(value)}
            case ast.Subscript(value, index):
                known = isinstance(index, ast.Constant) and isinstance(index.value, int | str)
                return {(*path, str(index.value) if known else ANY) for path in self.paths(value)}
            case ast.Call(ast.Name("getattr"), [value, ast.Constant(str(name)), *_]):
                return {(*path, name) for path in self.paths(value)}
            case ast.Call(ast.Name("getattr"), [value, *_]):
                return {(*path, ANY) for path in self.paths(value)}
            case ast.IfExp(_, one, other):
                return self.paths(one) | self.paths(other)
            case ast.BoolOp(_, values):
                return set().union(*map(self.paths, values))
            case ast.NamedExpr(_, value):
                return self.paths(value)
        return set()

    def follow(self, methods: dict[str, "_Method"]) -> bool:
        """Takes in what assignments, loops and calls give names to; whether that was anything new."""
        changed = False
        for node in self.nodes:
            match node:
                case ast.Assign(targets, value):
                    pairs = [pair for target in targets for pair in _pairs(target, value)]
                    changed |= any([self._stand(target, self.paths(value)) for target, value in pairs])
                case ast.AnnAssign(target, _, value) | ast.NamedExpr(target, value):
                    changed |= self._stand(target, self.paths(value))
                case ast.For(target, items) | ast.comprehension(target, items):
                    changed |= any([self._stand(name, paths) for name, paths in self._elements(target, items)])
                case ast.Call(ast.Attribute(value, name), given, keywords) if name in methods and () in self.paths(
                    value
                ):
                    called = methods[name]
                    handed = [*zip(called.arguments[1:], given, strict=False), *((k.arg, k.value) for k in keywords)]
                    changed |= any([called._add(argument, self.paths(value)) for argument, value in handed])
        return changed

    def _elements(self, target: ast.AST, items: ast.AST) -> Iterator[tuple[ast.AST, set[Path]]]:
        """Names that a loop gives to the elements of what it runs over."""
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        match items:
            case ast.Call(ast.Name("enumerate"), [inner, *_]) if len(parts) == 2:
                yield from self._elements(parts[1], inner)
            case ast.Call(ast.Name("zip"), several) if len(parts) == len(several):
                for part, inner in zip(parts, several, strict=True):
                    yield from self._elements(part, inner)
            case ast.Call(ast.Name("reversed" | "list" | "tuple" | "iter"), [inner]):
                yield from self._elements(target, inner)
            case ast.Call(ast.Attribute(inner, "values" | "children"), []):
                yield from self._elements(target, inner)
            case ast.Call(ast.Attribute(inner, "items" | "named_children"), []) if len(parts) == 2:
                yield from self._elements(parts[1], inner)
            case ast.Tuple(several) | ast.List(several):
                for inner in several:
                    yield target, self.paths(inner)
            case _:
                yield target, {(*path, ANY) for path in self.paths(items)}

    def _stand(self, target: ast.AST, paths: set[Path]) -> bool:
        return isinstance(target, ast.Name) and self._add(target.id, paths)

    def _add(self, name: str | None, paths: set[Path]) -> bool:
        known = self.names.setdefault(name or "", set())
        new = {path for path in paths if len(path) < 10} - known  # a name that goes round in a loop ends somewhere
        known |= new
        return bool(new)

    def reads(self) -> Iterator[Path]:
        """The whole of every expression, where it is used and not just given another name or looked at."""
        for node in self.nodes:
            written = isinstance(getattr(node, "ctx", None), ast.Store)
            if isinstance(node, ast.expr) and not written and not self._is_part(node):
                yield from self.paths(node)

    def _is_part(self, node: ast.AST) -> bool:
        match self.parents.get(node):
            case ast.Attribute() | ast.NamedExpr() | ast.IfExp() | ast.BoolOp():
                return True
            case ast.Subscript(value):
                return value is node
            case ast.Assign(targets):
                return all(isinstance(part, ast.Name) for target in targets for part, _ in _pairs(target, node))
            case ast.AnnAssign(target):
                return isinstance(target, ast.Name)
            case ast.Tuple() as pair if isinstance(self.parents.get(pair), ast.Assign):
                return True
            case ast.Call(ast.Name(name), [first, *_]):
                return name in LOOKS or (name == "getattr" and first is node)
            case ast.Compare(_, [ast.Is() | ast.IsNot()]):
                return True
        return False


def _pairs(target: ast.AST, value: ast.AST) -> list[tuple[ast.AST, ast.AST]]:
    """Names and values of `a = x` and `a, b = x, y`."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)]
