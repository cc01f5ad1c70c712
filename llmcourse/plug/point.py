"""Points: where a learner's function can stand in for one of the package's, and how it is put there.

The package is written as if nothing could be replaced: no hook, no test for one, no cost. A point
names the attributes that hold the function to be replaced (`places`); plugging in sets them and
leaving the block sets them back. Each place keeps a stack of what stands there, so blocks may be
nested, also with the same point, and the innermost is in use.

Between the package and the learner's function stands an adapter (`stand_in`). It translates
arguments, and checks what comes back: the package goes on with it as if it were its own.

A point holds for the whole process, in all of its threads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

import numpy as np

from llmcourse.errors import CourseError, UnknownNameError
from llmcourse.notebook import Table

Array = np.ndarray
Function = Callable[..., Any]


class PlugError(CourseError, TypeError):
    """Something that does not fit a point: no function, another signature, or what it returned."""


@dataclass(frozen=True)
class Point:
    """One point. Its `stand_in` imports the modules that it needs when it is called, not before.

    takes      the arguments, as the learner's function is called: positionally
    returns    what it must return, in words
    says       one sentence: what the function computes
    places     what is replaced, "module:name" or "module:Class.name"; the same stand-in goes to each
    stand_in   gives what goes there, from the learner's code
    """

    name: str
    takes: tuple[str, ...]
    returns: str
    says: str
    places: tuple[str, ...]
    stand_in: Callable[[LearnersCode], Any]

    @property
    def signature(self) -> str:
        return f"{self.name}({', '.join(self.takes)}) -> {self.returns}"


POINTS: dict[str, Point] = {}


def register(point: Point) -> Point:
    """Add a point to those that `plug` knows."""
    POINTS[point.name] = point
    return point


def points() -> Table:
    """All points: the signature that a function needs, and what it is for."""
    return Table(["point", "what it computes"], [(p.signature, p.says) for p in POINTS.values()])


def plug(**functions: Function) -> Plug:
    """Replace the package's code at the named points while a `with` block runs.

    Raises   UnknownNameError for a point that does not exist, PlugError for what is no function or
             has another signature.
    """
    for name, fn in functions.items():
        _check(_find(name), fn)
    return Plug(functions)


class Plug:
    """Functions and the points that they go to. `calls[name]` counts how often each of them ran."""

    def __init__(self, functions: dict[str, Function]) -> None:
        self.functions = functions
        self.calls = dict.fromkeys(functions, 0)
        self._entered: list[ExitStack] = []

    def __enter__(self) -> Plug:
        with ExitStack() as stack:  # if one place fails, the others are set back
            for name, fn in self.functions.items():
                point = POINTS[name]
                replacement = point.stand_in(LearnersCode(point, fn, self.calls))
                for place in point.places:
                    stack.enter_context(_standing_at(place, replacement))
            self._entered.append(stack.pop_all())
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.pop().close()

    def _table(self) -> Table:
        rows = [(name, _label(self.functions[name]), count) for name, count in self.calls.items()]
        return Table(["point", "your function", "calls"], rows)

    def __repr__(self) -> str:
        return repr(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()


class LearnersCode:
    """A learner's function at a point: called, counted, and held to what the point needs."""

    def __init__(self, point: Point, fn: Function, calls: dict[str, int]) -> None:
        self.point, self.fn, self.calls = point, fn, calls

    def __call__(self, *args: Any) -> Any:
        self.calls[self.point.name] += 1
        try:
            return self.fn(*args)
        except PlugError:
            raise  # it names its function and its point
        except Exception as error:
            if not any(_NOTE in note for note in getattr(error, "__notes__", ())):
                error.add_note(self._note(error))
            raise

    def _note(self, error: Exception) -> str:
        note = f"Raised while {_label(self.fn)} ran {_NOTE} {self.point.signature}."
        if isinstance(error, RecursionError):
            note += " Does it call the package's own? While it is plugged in, that is itself."
        if isinstance(error, ValueError) and "read-only" in str(error):
            note += " Arrays given to it belong to the package: make a new one (a + b, not a += b)."
        return note

    def refuse(self, fault: str, why: str, fix: str) -> NoReturn:
        """Raise PlugError that names the function and the point."""
        raise PlugError(
            f"{_label(self.fn)} does not fit the point {self.point.signature}: {fault}.", why, fix
        )

    def array(self, value: Any, what: str, shape: tuple[int, ...], *dtypes: Any) -> Array:
        """`value`, an array of that shape in one of those number formats; PlugError for anything else."""
        if not isinstance(value, np.ndarray | np.generic):
            self._wrong(what, kind(value), f"an array of shape {shape}", _return_or(value, "a NumPy array."))
        if value.shape != shape:
            self._wrong(
                what, f"of shape {value.shape}", f"of shape {shape}", "printing the shapes on the way to it."
            )
        if value.dtype not in dtypes:
            fix = f".astype({dtypes[0]}) where it changed, or np.zeros_like and np.ones_like to begin with."
            self._wrong(what, f"in {value.dtype}", f"in {dtypes[0]}", fix)
        return np.asarray(value)

    def number(self, value: Any, what: str, dtype: Any) -> Array:
        """`value`, a single number, in that number format; PlugError for anything else."""
        array = isinstance(value, np.ndarray | np.generic)
        if not (value.shape == () and value.dtype.kind in "fiu" if array else isinstance(value, int | float)):
            self._wrong(
                what, kind(value), "a single number", _return_or(value, ".mean(), .sum() or .item().")
            )
        return np.asarray(value, dtype=dtype)

    def parts(self, value: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
        """`value`, a tuple with one part for each name; PlugError for anything else."""
        if not isinstance(value, tuple | list) or len(value) != len(names):
            fix = _return_or(value, f"return {', '.join(names)}.")
            self._wrong("the result", kind(value), f"({', '.join(names)})", fix)
        return tuple(value)

    def _wrong(self, what: str, came: str, wanted: str, fix: str) -> NoReturn:
        why = f"The package goes on with it as if it were its own. {self.point.says}"
        self.refuse(f"{what} is {came}, and should be {wanted}", why, fix)


_NOTE = "at the point"
_standing: dict[str, list[Any]] = {}  # place → the package's own, then what was plugged in, innermost last


@contextmanager
def _standing_at(place: str, replacement: Any) -> Iterator[None]:
    owner, name = _resolve(place)
    stack = _standing.setdefault(place, [getattr(owner, name)])
    stack.append(replacement)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        # Blocks of two threads, or of generators, need not end in the order in which they began.
        del stack[next(i for i in reversed(range(len(stack))) if stack[i] is replacement)]
        setattr(owner, name, stack[-1])
        if len(stack) == 1:
            del _standing[place]


def _resolve(place: str) -> tuple[Any, str]:
    """The object that holds the place, and the attribute's name."""
    module, _, path = place.partition(":")
    *outer, name = path.split(".")
    owner: Any = import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


def _find(name: str) -> Point:
    if name in POINTS:
        return POINTS[name]
    near = get_close_matches(name, POINTS, n=1)
    raise UnknownNameError(
        f"there is no point called {name!r}.",
        _all_points(),
        f"plug({near[0]}=…)." if near else "one of these, by its name: plug(sum_to=my_function).",
    )


def _check(point: Point, fn: Any) -> None:
    """Raise PlugError unless `fn` can be called with the point's arguments."""
    if not callable(fn):
        raise PlugError(
            f"plug({point.name}=…) got {kind(fn)}, which cannot be called.",
            _all_points(),
            f"plug({point.name}=my_function), without parentheses behind the function's name.",
        )
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some functions written in C tell no signature
        return
    try:
        signature.bind(*point.takes)
    except TypeError as error:
        raise PlugError(
            f"{_label(fn)}{signature} cannot be called as {point.signature}: {error}.",
            _all_points(),
            f"def {_label(fn)}({', '.join(point.takes)}).",
        ) from None


def _all_points() -> str:
    return "\n    ".join(["The points are", *(p.signature for p in POINTS.values())])


def _label(fn: Any) -> str:
    return getattr(fn, "__name__", None) or type(fn).__name__


def _return_or(value: Any, fix: str) -> str:
    return "a `return` at its end." if value is None else fix


def kind(value: Any) -> str:
    """What a value is, in a few words, for a message."""
    if value is None:
        return "None"
    if isinstance(value, np.ndarray | np.generic):
        return f"an array of shape {value.shape} in {value.dtype}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
