"""The learner's process: runs a notebook's cells, then answers calls of the functions they defined.

    python -m llmcourse.grading.learner FD SETTINGS

FD is one end of a socket pair, whose other end is the judge (`process`); SETTINGS is a JSON object.
There is no kernel: IPython's shell runs the cells here, in the main thread, one request at a time.

    {"do": "cell", "id", "source"}                        → {"outputs", "cut", "error"}
    {"do": "call", "name", "args", "watch", "grads"}      → {"call": Call.as_plain()}
    {"do": "defines", "name"}                             → {"defines": bool}

Each request has a number `n`, which its answer repeats. While a call runs, a function among its
arguments (an oracle, which stays with the judge) is called by {"ask": id, "args", "kwargs"}, answered
by {"value"} or {"raised", "message"}.

**Nothing here is trusted.** The learner's code shares this process and can replace anything in it. What
a function returns, and how often it asks an oracle, is judged elsewhere, whatever it does here. What is
noted here about a call (written arguments, costs) is evidence of a mistake, and no proof against deceit.

Imports are few: forty submissions start this process forty times.
"""

from __future__ import annotations

import builtins
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NoReturn

from llmcourse.grading.channel import Channel, ChannelError, MessageTooLarge
from llmcourse.grading.limits import CHANNEL_LOST, MB, Limits, end_with_parent, limit_this_process
from llmcourse.grading.outputs import Shown
from llmcourse.grading.perform import NO_FUNCTION, Call, Failure, failure, perform
from llmcourse.grading.plain import plain
from llmcourse.grading.shell import Shell, cell_failure

EXCHANGE = 200  # frames for a question to the judge, kept free where the learner has used up their own


class Forbidden:
    """A finder that refuses the modules that a lab asks the learner to do without."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = tuple(modules)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        for module in self.modules:
            if fullname == module or fullname.startswith(module + "."):
                raise ModuleNotFoundError(
                    f"{module} is not available when this lab is graded: the lab is about doing without it",
                    name=fullname,
                )


class Learner:
    """The shell in which the cells run, and the answers to the judge's requests."""

    def __init__(self, channel: Channel, output_chars: int) -> None:
        self.channel, self.output_chars = channel, output_chars
        self.pid = os.getpid()
        self.shell = Shell.start()
        self.functions: dict[str, FunctionType] = {}  # each name's last: `f = f(x)` undoes no exercise
        self.call_number = 0  # of the call that runs; 0 when none does
        self.asking = threading.Lock()  # one question at a time
        # A forked child runs on in the same cell; what it says must not be taken for an answer.
        os.register_at_fork(after_in_child=channel.close)

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    def serve(self) -> NoReturn:
        """Answer requests until the judge closes the channel, then end, threads and all."""
        try:
            self.channel.send({"hello": self.pid})
            while True:
                request = self.channel.receive(make_callable=self._remote)
                answer = getattr(self, f"do_{request['do']}")(request)
                if os.getpid() != self.pid:
                    break
                with self.asking:  # a thread that the call left behind may wait for an oracle's value
                    self._answer(request["n"], answer)
        except ChannelError:
            pass
        os._exit(CHANNEL_LOST)

    def _answer(self, n: int, answer: dict[str, Any]) -> None:
        try:
            self.channel.send({"n": n} | answer)
        except MessageTooLarge as error:
            self.channel.send({"n": n} | failed_call(Failure("MessageTooLarge", f"the result is {error}")))

    def do_cell(self, request: dict[str, Any]) -> dict[str, Any]:
        shown, error = self.shell.run(request["id"], request["source"], self.output_chars)
        named = list(self.shell.user_ns.items())
        self.functions |= {name: value for name, value in named if type(value) is FunctionType}
        return shown.as_plain() | {"error": None if error is None else vars(cell_failure(error))}

    def do_defines(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"defines": callable(self._function(request["name"]))}

    def do_call(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["name"]
        if (fn := self._function(name)) is None:
            return failed_call(Failure("NameError", f"{NO_FUNCTION} {name}"))
        if not callable(fn):
            return failed_call(Failure("TypeError", f"{name} is a {type(fn).__name__}, not a function"))
        self.shell.show_in(Shown(0))
        self.call_number = request["n"]
        try:
            return {"call": perform(fn, request["args"], request["watch"], request["grads"]).as_plain()}
        except BaseException as error:  # an interrupt, or what perform itself could not stand
            return failed_call(failure(error, fn))
        finally:
            self.call_number = 0

    def _function(self, name: str) -> Any:
        """What the notebook calls `name`; a function, if the name has ever been one."""
        found = self.shell.user_ns.get(name)
        return found if callable(found) else self.functions.get(name, found)

    # ── the judge's functions ────────────────────────────────────────────────────────────────────

    def _remote(self, number: int) -> Callable[..., Any]:
        """A function of the judge's, for the learner's to call."""

        def oracle(*args: Any, **kwargs: Any) -> Any:
            limit = sys.getrecursionlimit()
            sys.setrecursionlimit(limit + EXCHANGE)
            try:
                with self.asking:
                    return self._ask(number, args, kwargs)
            finally:
                sys.setrecursionlimit(limit)

        return oracle

    def _ask(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.call_number:
            raise RuntimeError("this function was an argument of a call that is over")
        question = {
            "n": self.call_number,
            "ask": number,
            "args": plain(args, "an argument"),
            "kwargs": plain(kwargs, "an argument"),
        }
        self.channel.send(question)
        answer = self.channel.receive(make_callable=self._remote)
        if "raised" in answer:
            raise exception(answer["raised"], answer["message"])
        return answer["value"]


def failed_call(error: Failure) -> dict[str, Any]:
    return {"call": Call((), error=error).as_plain()}


def exception(kind: str, message: str) -> Exception:
    """What the judge's function raised: the built-in exception of that name, or a RuntimeError with it."""
    known = getattr(builtins, kind, None)
    if isinstance(known, type) and issubclass(known, Exception):
        try:
            return known(message)
        except TypeError:  # some want more than a message
            pass
    return type(kind, (RuntimeError,), {})(message)


# ── start ────────────────────────────────────────────────────────────────────────────────────────


def main() -> NoReturn:
    fd, settings = int(sys.argv[1]), json.loads(sys.argv[2])
    sys.argv = [""]
    os.set_inheritable(fd, False)
    limits = Limits(**settings["limits"])
    if not settings["sandboxed"]:
        end_with_parent()  # the sandbox sees to it else
    channel = Channel(socket.socket(fileno=fd), limits.message_mb * MB)
    learner = Learner(channel, limits.output_chars)
    sys.meta_path.insert(0, Forbidden(settings["forbidden"]))  # type: ignore[arg-type]
    limit_this_process(limits, sandboxed=settings["sandboxed"], own_user=settings["own_user"])
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    sys.path.insert(0, "")  # as in a notebook: a module that a cell wrote (%%writefile) can be imported
    learner.serve()


if __name__ == "__main__":
    main()
