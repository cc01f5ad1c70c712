"""A kernel's Python source, rewritten so that Python itself can run it as Triton would.

Triton never runs a kernel as Python: its compiler walks the syntax tree and gives some of it a meaning of
its own. Where that meaning differs from Python's, the tree is changed here into a call of a runtime that
does what the compiler does:

    i = 0                          i is a tensor afterwards, not a Python number
    x: tl.constexpr = …            x stays what it is
    for i in range(0, n, B)        i is an int32 (or wider) tensor; in tl.static_range it is a constant
    if …, while …, … if … else …   the value of a scalar tensor decides; a block cannot
    a and b, not a                 element by element on blocks, and both sides are computed
    x is None                      looks through constexpr
    assert …                       tl.device_assert
    x.sum(0)                       a @triton.jit function that is a method of tensors
    break, try, lambda, …          refused, as the compiler refuses them

Line numbers and file name are kept, so that counters and tracebacks point at the reader's own source.
"""

from __future__ import annotations

import ast
import textwrap
from types import CodeType, FunctionType
from typing import Any, Protocol

NAME = "__llmcourse_runtime__"

STATIC_CALLS = frozenset({"static_assert", "static_print"})
"""Calls that Triton's compiler answers itself. The runtime is asked what to call in their place."""


class Runtime(Protocol):
    """What rewritten code calls."""

    def assigned(self, value: Any) -> Any: ...
    def constant(self, value: Any) -> Any: ...
    def truth(self, value: Any) -> bool: ...
    def again(self, value: Any) -> bool: ...
    def both(self, *values: Any) -> Any: ...
    def either(self, *values: Any) -> Any: ...
    def negate(self, value: Any) -> Any: ...
    def same(self, left: Any, right: Any) -> bool: ...
    def loop(self, function: Any, *args: Any, **kwargs: Any) -> Any: ...
    def check(self, test: Any, message: Any = "") -> Any: ...
    def method(self, owner: Any, name: str) -> Any: ...
    def static(self, function: Any) -> Any: ...
    def value_of(self, owner: Any) -> Any: ...
    def refuse(self, what: str) -> Any: ...


def rewrite(
    lines: list[str], first_line: int, file: str, methods: frozenset[str], syntax: frozenset[str]
) -> tuple[CodeType, frozenset[str]]:
    """The code of the one function in these source lines, and the names of globals that it may use.

    first_line   of `lines` in the file
    methods      names of methods of tensors that are `@triton.jit` functions
    syntax       the statements and expressions, by the names of their `ast` classes, that the compiler knows
    """
    tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, first_line - 1)
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    function.decorator_list, function.returns = [], None
    arguments = function.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    names = frozenset(node.id for node in ast.walk(function) if isinstance(node, ast.Name))
    rewriter = _Rewriter(methods, syntax | _INSIDE)
    function.body = [rewriter.visit(statement) for statement in function.body]
    module = ast.fix_missing_locations(ast.Module([function], []))
    compiled = compile(module, file, "exec")
    code = next(c for c in compiled.co_consts if isinstance(c, CodeType) and c.co_name == function.name)
    return code, names


def build(code: CodeType, namespace: dict[str, Any], original: FunctionType) -> FunctionType:
    """A function of rewritten code that has the original's defaults."""
    made = FunctionType(code, namespace, original.__name__, original.__defaults__)
    made.__kwdefaults__ = original.__kwdefaults__
    return made


_INSIDE = frozenset({"Starred", "FormattedValue"})
"""Expressions that the compiler takes as parts of others only."""


class _Rewriter(ast.NodeTransformer):
    def __init__(self, methods: frozenset[str], syntax: frozenset[str]) -> None:
        self.methods, self.syntax = methods, syntax

    def visit(self, node: ast.AST) -> Any:
        name = type(node).__name__
        if isinstance(node, ast.stmt | ast.expr) and name not in self.syntax:
            refused = _call("refuse", ast.Constant(name), at=node)
            return ast.copy_location(ast.Expr(refused), node) if isinstance(node, ast.stmt) else refused
        return super().visit(node)

    # ── names get values ─────────────────────────────────────────────────────────────────────────

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        node.value = _call("assigned", node.value, at=node.value)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name):
            return node
        read = ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
        result = ast.copy_location(ast.BinOp(read, node.op, node.value), node)
        return ast.copy_location(ast.Assign([node.target], _call("assigned", result, at=node)), node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        constant = "constexpr" in ast.unparse(node.annotation)
        value = _call("constant" if constant else "assigned", self.visit(node.value), at=node.value)
        return ast.copy_location(ast.Assign([node.target], value), node)

    # ── decisions ────────────────────────────────────────────────────────────────────────────────

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        node.test = _call("truth", node.test, at=node.test)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        node.test = _call("truth", node.test, at=node.test)
        return node

    def visit_While(self, node: ast.While) -> ast.AST:
        self.generic_visit(node)
        node.test = _call("again", node.test, at=node.test)
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        self.generic_visit(node)
        parts = [node.test, *([node.msg] if node.msg else [])]
        return ast.copy_location(ast.Expr(_call("check", *parts, at=node)), node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        none = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        later = [ast.copy_location(ast.Lambda(none, value), value) for value in node.values]
        return _call("both" if isinstance(node.op, ast.And) else "either", *later, at=node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return _call("negate", node.operand, at=node) if isinstance(node.op, ast.Not) else node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) == 1 and isinstance(node.ops[0], ast.Is | ast.IsNot):
            same = _call("same", node.left, node.comparators[0], at=node)
            if isinstance(node.ops[0], ast.Is):
                return same
            return ast.copy_location(ast.UnaryOp(ast.Not(), same), node)
        if len(node.ops) == 1:
            return node
        # a < b < c: each operand is computed once, whatever it costs
        operands = [node.left, *node.comparators]
        names = [f"{NAME}{i}" for i in range(len(operands))]
        links = [
            ast.Compare(ast.Name(a, ast.Load()), [op], [ast.Name(b, ast.Load())])
            for a, op, b in zip(names, node.ops, names[1:], strict=False)
        ]
        none = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        chain = _call("both", *[ast.Lambda(none, link) for link in links], at=node)
        taken = ast.arguments(
            posonlyargs=[], args=[ast.arg(n) for n in names], kwonlyargs=[], kw_defaults=[], defaults=[]
        )
        return ast.copy_location(ast.Call(ast.Lambda(taken, chain), operands, []), node)

    # ── loops and calls ──────────────────────────────────────────────────────────────────────────

    def visit_For(self, node: ast.For) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.iter, ast.Call):
            call = node.iter
            call.args, call.func = [call.func, *call.args], _runtime("loop", call)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        name = getattr(function, "attr", getattr(function, "id", ""))
        if name in STATIC_CALLS:
            node.func = _call("static", function, at=node)
        elif isinstance(function, ast.Attribute) and name in self.methods:
            node.func = _call("method", function.value, ast.Constant(name), at=node)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "value" and isinstance(node.ctx, ast.Load):
            return _call("value_of", node.value, at=node)
        return node


def _runtime(name: str, at: ast.AST) -> ast.expr:
    return ast.copy_location(ast.Attribute(ast.Name(NAME, ast.Load()), name, ast.Load()), at)


def _call(name: str, *args: ast.expr, at: ast.AST) -> ast.Call:
    return ast.copy_location(ast.Call(_runtime(name, at), list(args), []), at)
