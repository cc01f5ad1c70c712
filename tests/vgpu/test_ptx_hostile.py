"""PTX may come from anybody: reading it takes time in proportion to its length, or ends in a PtxError."""

import contextlib
import re

import numpy as np
import pytest
from cpu_time import least

from llmcourse.vgpu.corpus.cases import KERNELS
from llmcourse.vgpu.faults import PtxError
from llmcourse.vgpu.nvrtc import compile_source
from llmcourse.vgpu.ptx import parse

HEAD = ".version 9.0\n.target sm_80\n.address_size 64\n"
ENTRY = HEAD + ".visible .entry k(.param .u64 p)\n{\n%s\nret;\n}\n"
N = 100_000
TEXTS = {
    "registers by the billion": ENTRY % ".reg .b32 %r<1000000000>;",
    "many declarations of many registers": ENTRY
    % (".reg .b32 " + ",".join(f"%r{i}<99999>" for i in range(9999)) + ";"),
    "entries without an end": HEAD + ".entry x(" * (N // 9),
    "entries without a body": HEAD + ".visible .entry k" * (N // 17),
    "functions without a name": HEAD + ".func (" * (N // 7),
    "prefixes": HEAD + ".visible " * (N // 9),
    "comments that never end": HEAD + "/* " * (N // 3),
    "blanks in an array's size": ENTRY % (".shared .align 4 .b8 x[" + " " * N + "y];"),
    "blanks after a name": ENTRY % (".shared .b8 x" + " " * N + "!;"),
    "braces": ENTRY % ("{" * N),
    "operands in braces": ENTRY % ("mov.b32 " + "{," * (N // 2) + ";"),
    "operands in brackets": ENTRY % ("mov.b32 " + "[," * (N // 2) + ";"),
    "negations": ENTRY % ("mov.b32 " + "!" * N + ";"),
    "a long number": ENTRY % ("mov.b32 %r1, " + "9" * N + ";"),
    "calls that double": HEAD
    + "".join(f".func f{i}() {{ call f{i + 1},(); call f{i + 1},(); }}\n" for i in range(40))
    + ".func f40() { ret; }\n.entry k() { call f0,(); ret; }\n",
    "a deep chain of calls": HEAD
    + "".join(f".func f{i}() {{ call f{i + 1},(); }}\n" for i in range(3000))
    + ".func f3000() { ret; }\n.entry k() { call f0,(); ret; }\n",
    "a function in many kernels": HEAD
    + "".join(f".entry k{i}() {{ call f,(); ret; }}\n" for i in range(2000))
    + ".func f() {"
    + "add.s32 a,b,c;" * 2000
    + "}\n",
    "a variable of terabytes": ENTRY % ".shared .align 4 .b8 x[99999999999999];",
    "no alignment": ENTRY % ".shared .align 0 .b8 x[4];",
}


@pytest.mark.parametrize("what", TEXTS)
def test_no_text_takes_long(what):
    def read() -> None:
        try:
            parse(TEXTS[what])
        except PtxError as error:
            assert len(str(error).splitlines()) == 3  # noqa: PT017

    assert least(read, within=8) < 8  # a quadratic parser would need minutes


def test_the_limit_is_the_callers():
    text = ENTRY % (".reg .b32 %r<50>;\n" + "add.s32 %r1, %r1, 1;\n" * 50)
    assert len(parse(text, 200).kernels["k"].code) == 51
    with pytest.raises(PtxError, match="more than 60 instructions"):
        parse(text, 60)


def test_a_branch_to_nowhere_is_named():
    with pytest.raises(PtxError, match=r"\$L9"):
        parse(ENTRY % "bra $L9;")


@pytest.mark.parametrize("file", ["softmax.cu", "warps.cu", "local_constant.cu"])
def test_changed_ptx_is_read_or_refused(file):
    text = compile_source((KERNELS / file).read_text()).ptx
    random = np.random.default_rng(len(file))
    for _ in range(40):
        at, length = int(random.integers(len(text))), int(random.integers(1, 40))
        numbers = list(re.finditer(r"\d+", text))
        number = numbers[random.integers(len(numbers))]
        changed = (
            text[:at] + text[at + length :],
            text[:at] + text[at : at + length] * 3 + text[at:],
            text[:at] + "{}[]();,.%@!|+-:"[random.integers(16)] + text[at:],
            text[: number.start()] + str(10 ** int(random.integers(12))) + text[number.end() :],
        )
        for candidate in changed:
            with contextlib.suppress(PtxError):
                parse(candidate)
