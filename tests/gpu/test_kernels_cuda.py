"""The memory-bound kernels compiled for the GPU: against float64 on random odd shapes, with guard bands.

Inputs lie between NaNs, so that a read beyond them shows in the result; what the wrappers allocate lies
between NaNs too, which must still be there afterwards.

Compiling takes most of the time, and Triton compiles for block sizes and for whether numbers are multiples
of 16, not for shapes: so the random shapes are odd ones from a few blocks.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from against_float64 import DTYPES, check, error

from llmcourse.kernels import add_rms_norm as add_norm
from llmcourse.kernels import cross_entropy as ce
from llmcourse.kernels import layer_norm as ln
from llmcourse.kernels import rms_norm as rms
from llmcourse.kernels import rope as rope_file
from llmcourse.kernels import softmax as softmax_file
from llmcourse.kernels import swiglu as swiglu_file
from llmcourse.kernels.launch import Plan
from llmcourse.kernels.vector_add import vector_add

BAND = 512  # elements of NaN on either side; a multiple of 16 bytes, so that alignment is as usual


def banded(shape, dtype, fill=math.nan):
    """(tensor, the buffer that it lies in)."""
    n = math.prod(shape)
    whole = torch.full((n + 2 * BAND,), fill, device="cuda", dtype=dtype)
    return whole[BAND : BAND + n].view(shape), whole


def random_input(*shape, dtype, scale=1.0, apart=False):
    """Random numbers between NaNs; `apart` leaves NaN columns between the rows as well."""
    width = shape[-1] + (5 if apart else 0)
    inside, _ = banded((*shape[:-1], width), dtype)
    view = inside[..., : shape[-1]]
    return view.copy_(torch.randn(shape, device="cuda") * scale)


@contextlib.contextmanager
def guarded(monkeypatch):
    """Every float tensor allocated in this block lies between NaNs, which are checked at its end."""
    made = []

    def around(original, fill):
        def allocate(*shape, **options):
            shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            dtype, device = options.get("dtype", torch.float32), torch.device(options.get("device", "cpu"))
            if device.type != "cuda" or not dtype.is_floating_point or 0 in shape:
                return original(shape, **options)
            inside, whole = banded(tuple(shape), dtype)
            if fill is not None:
                inside.fill_(fill)
            made.append(whole)
            return inside

        return allocate

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", around(torch.empty, None))
        patch.setattr(torch, "zeros", around(torch.zeros, 0.0))
        yield
    assert made
    for whole in made:
        assert whole[:BAND].isnan().all()
        assert whole[-BAND:].isnan().all()


def shapes(seed, count=4):
    """Odd shapes whose rows fill blocks of 64 and of 1024 columns, several rows a program and one."""
    r = random.Random(seed)
    narrow = [(r.randint(1, 70), 2 * r.randint(17, 31) + 1) for _ in range(count)]
    wide = [(r.randint(1, 70), 2 * r.randint(257, 511) + 1) for _ in range(count)]
    return [*narrow, *wide]


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(dtype, monkeypatch):
    others = {
        torch.float32: [(1, 1), (3, 20_001)],
        torch.float16: [(3, 8192), (2, 65_536)],
        torch.bfloat16: [(5, 3000), (2, 16_384), (2, 262_144)],
    }
    for apart in (False, True):
        for rows, columns in [*shapes(1), *others[dtype]]:
            x = random_input(rows, columns, dtype=dtype, scale=3, apart=apart)
            with guarded(monkeypatch):
                check(softmax_file.softmax, lambda x: torch.softmax(x, -1), [x])


@pytest.mark.parametrize("columns", [16_385, 65_536, 262_144])
def test_every_rung_of_wide_softmax_gives_the_same(columns):
    x = torch.randn(300, columns, device="cuda", dtype=torch.bfloat16) * 3
    exact = torch.softmax(x.double(), -1)
    for plan in (
        Plan("online", block=4096, warps=8),
        Plan("online", block=16384, warps=32),
        Plan("split", block=8192, warps=8),
        Plan("split", block=16384, warps=16),
    ):
        for _ in range(3):  # programs that wait for each other: again and again
            assert error(softmax_file.softmax(x, plan=plan), exact) < 5e-3


def test_softmax_of_special_rows():
    x = torch.randn(4, 20_000, device="cuda")
    x[0], x[1, :15_000], x[3, 5] = -math.inf, -math.inf, math.nan
    for plan in (Plan("row", block=32768, warps=32), Plan("online", block=4096), Plan("split", block=4096)):
        out = softmax_file.softmax(x, plan=plan)
        assert error(out, torch.softmax(x.double(), -1)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", [False, True])
def test_softmax_in_cuda(dtype, apart):
    pytest.importorskip("cuda.core")
    from llmcourse.kernels.softmax_cuda import softmax_cuda

    odd = [(1, 1), (7, 2999)]
    for rows, columns in [*shapes(2), *odd, (5, 8192), (3, 16384), (2, 70_001), (2, 131_072), (0, 7)]:
        x = (
            random_input(rows, columns, dtype=dtype, scale=3, apart=apart)
            if rows
            else torch.empty(0, 7).cuda()
        )
        check(softmax_cuda, lambda x: torch.softmax(x, -1), [x], backward=False)


def exact_rms(x, w):
    return F.rms_norm(x, x.shape[-1:], w, 1e-6)


def exact_layer(x, w, b=None):
    return F.layer_norm(x, x.shape[-1:], w, b, 1e-5)


def exact_add(x, r, w):
    h = x + r
    return exact_rms(h, w), h


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype, monkeypatch):
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5}[dtype]
    odd = shapes(3, count=3)
    cases = {
        torch.float32: [*odd, (2, 70_001)],
        torch.float16: [*odd[3:], (20, 4096)],
        torch.bfloat16: [*odd[3:], (1000, 1024), (50, 8192), (3, 32_768)],
    }
    for apart in (False, True):
        for rows, columns in cases[dtype]:
            x, r = (random_input(rows, columns, dtype=dtype, apart=apart) for _ in range(2))
            w, b = (random_input(columns, dtype=dtype) for _ in range(2))
            with guarded(monkeypatch):
                check(rms.rms_norm, exact_rms, [x, w], tolerance=tolerance)
                check(ln.layer_norm, exact_layer, [x, w, b], tolerance=tolerance)
                check(add_norm.add_rms_norm, exact_add, [x, r, w], tolerance=tolerance)
                if columns < 100:
                    check(ln.layer_norm, exact_layer, [x, w], tolerance=tolerance)


def test_pipelined_backward_plans_give_the_same():
    x, dy, w = (torch.randn(s, device="cuda").bfloat16() for s in ((999, 2048), (999, 2048), (2048,)))
    _, s = rms.forward(x, w, 1e-6, rms.forward_plan(2048), False)
    expected = rms.backward(x, w, s, dy)
    _, mean, scale = ln.forward(x, w, None, 1e-5, ln.forward_plan(2048), False)
    expected_ln = ln.backward(x, w, mean, scale, dy)
    for stages, rows, warps, programs in ((1, 1, 4, 7), (2, 2, 8, 132), (3, 1, 8, 264), (3, 2, 16, 1)):
        plan = Plan("row", rows, 2048, warps, programs, stages)
        for a, b in zip(rms.backward(x, w, s, dy, plan=plan), expected, strict=True):
            assert error(a, b) < 4e-3
        for a, b in zip(ln.backward(x, w, mean, scale, dy, plan=plan), expected_ln, strict=True):
            assert error(a, b) < 4e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise(dtype, monkeypatch):
    for rows, columns in [(1, 1), *shapes(4), (3, 8999)]:
        x, y = (random_input(rows, columns, dtype=dtype) for _ in range(2))
        check(vector_add, lambda x, y: x + y, [x, y])
        packed = random_input(rows, 2 * columns, dtype=dtype, scale=2, apart=True)
        exact = lambda x: F.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]  # noqa: E731
        with guarded(monkeypatch):
            check(swiglu_file.swiglu, exact, [packed])
            check(swiglu_file.swiglu, lambda g, u: F.silu(g) * u, list(packed.chunk(2, -1)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(dtype):
    sizes = [(2, 5, 33, 12), (2, 32, 65, 128), (1, 40, 7, 256)]
    chosen = {torch.float32: sizes[:1], torch.float16: sizes[2:], torch.bfloat16: [(1, 1, 1, 2), *sizes]}
    for batch, heads, length, head_dim in chosen[dtype]:
        angles = torch.rand(80, head_dim // 2, device="cuda") * 6
        cos, sin = angles.cos(), angles.sin()
        positions = torch.randint(0, 80, (batch, length), device="cuda")
        for p in (None, positions, positions.int()):
            c, s = (t.double()[:length] if p is None else t.double()[p.long()][:, None] for t in (cos, sin))

            def exact(x, c=c, s=s):
                a, b = x.chunk(2, -1)
                return torch.cat((a * c - b * s, b * c + a * s), -1)

            for x in (
                random_input(batch, heads, length, head_dim, dtype=dtype),
                random_input(batch, length, heads, head_dim, dtype=dtype, apart=True).transpose(1, 2),
            ):
                t = (cos, sin, p)
                check(lambda x, t=t: rope_file.rope(x, *t), exact, [x])
                check(lambda x, t=t: rope_file.rope_naive(x, *t), exact, [x], backward=False)
    outside = torch.tensor([[0, 80, -1]], device="cuda")
    out = rope_file.rope(torch.randn(1, 2, 3, head_dim, device="cuda"), cos, sin, outside)
    assert out.isnan().all(-1).all(1).tolist() == [[False, True, True]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype, monkeypatch):
    for rows, columns in [(1, 1), *shapes(5, count=2), (9, 128_257)]:
        x = random_input(rows, columns, dtype=dtype, scale=3, apart=True)
        t = torch.randint(0, columns, (rows,), device="cuda")
        if rows > 1:
            t[rows // 2] = -100
        for reduction in ("mean", "sum", "none"):
            with guarded(monkeypatch):
                check(
                    lambda x, r=reduction, t=t: ce.cross_entropy(x, t, reduction=r),
                    lambda x, r=reduction, t=t: F.cross_entropy(x, t, reduction=r), [x],
                )  # fmt: skip
        made = x.clone().requires_grad_() * 1
        (g,) = torch.autograd.grad(ce.cross_entropy(made, t, inplace=True), made)
        leaf = x.double().requires_grad_()
        (exact,) = torch.autograd.grad(F.cross_entropy(leaf, t), leaf)
        assert error(g, exact) < (1e-5 if dtype == torch.float32 else 1e-2)
        naive = ce.cross_entropy_naive(x, t)
        assert error(naive, F.cross_entropy(x.double(), t)) < 1e-5
    outside = torch.tensor([columns] * 9, device="cuda")
    assert ce.cross_entropy(x, outside).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy(dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    x, w = (torch.randn(s, device="cuda").to(dtype) * 0.3 for s in ((77, 64), (1001, 64)))
    t = torch.randint(0, 1001, (77,), device="cuda")
    t[3] = -100
    for chunk in (None, 1, 20):
        for sum_dtype in {torch.float32, dtype}:
            check(
                lambda *xw, c=chunk, s=sum_dtype: ce.linear_cross_entropy(*xw, t, chunk_rows=c, sum_dtype=s),
                lambda x, w: F.cross_entropy(x @ w.T, t), [x, w],
                tolerance={torch.bfloat16: 4e-2, torch.float16: 6e-3, torch.float32: 2e-5}[dtype],
            )  # fmt: skip


@pytest.mark.parametrize("columns", [20_001, 128_256])
def test_every_plan_of_loss_and_gradient_gives_the_same(columns):
    x = torch.randn(200, columns, device="cuda", dtype=torch.bfloat16) * 2
    t = torch.randint(0, columns, (200,), device="cuda")
    t[3], t[4], t[5] = -100, columns - 1, columns
    exact = torch.softmax(x.double(), -1)
    known = [i for i in range(200) if i not in (3, 5)]
    exact[known, t[known]] -= 1
    exact[3], exact[5] = 0, math.nan
    losses = F.cross_entropy(x.double(), t.where(t < columns, 0), reduction="none")
    losses[5] = math.nan
    for plan in (
        ce.step_plan(columns),
        Plan("online", block=4096, warps=8),
        Plan("online", block=8192, warps=16),
    ):
        for _ in range(3):
            over, loss = x.clone(), torch.empty(200, device="cuda")
            ce.losses_and_gradient(over, t, loss, -100, plan)
            assert error(loss, losses) < 1e-5
            assert error(over, exact) < 1e-2


def test_linear_cross_entropy_holds_one_chunk_of_logits():
    x = torch.randn(4096, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(64_000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    t = torch.randint(0, 64_000, (4096,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ce.linear_cross_entropy(x, w, t, chunk_rows=256).backward()
    peak = torch.cuda.max_memory_allocated() - before
    logits = 4096 * 64_000 * 2
    chunk = logits // 16
    gradients = 64_000 * 256 * (4 + 2) + 4096 * 256 * 2 * 2
    assert peak < chunk + gradients + (8 << 20)
    assert peak < logits / 2


def test_offsets_beyond_two_to_the_31_elements():
    x = torch.randn(33, 1 << 26, device="cuda", dtype=torch.bfloat16)  # 2.2·10⁹ elements, 4.4 GB
    y = softmax_file.softmax(x)
    assert error(y[-1:], torch.softmax(x[-1:].double(), -1)) < 1e-2
    t = torch.full((33,), 3, device="cuda")
    loss = ce.cross_entropy(x, t, reduction="none")
    assert error(loss[-1], F.cross_entropy(x[-1:].double(), t[-1:])) < 1e-5


def test_all_of_it_under_torch_compile():
    """The wrappers trace into one graph: no breaks, and the same numbers and gradients."""
    x, r = (torch.randn(40, 512, device="cuda") for _ in range(2))
    w, b = torch.randn(512, device="cuda"), torch.randn(512, device="cuda")
    t = torch.randint(0, 512, (40,), device="cuda")
    angles = torch.rand(10, 32, device="cuda")

    def everything(x, r, w, b):
        h, stream = add_norm.add_rms_norm(x, r, w)
        h = ln.layer_norm(rms.rms_norm(h, w), w, b)
        h = torch.cat((swiglu_file.swiglu(h), h[:, 256:]), -1)
        h = rope_file.rope(h.view(1, 4, 10, 512)[..., :64].contiguous(), angles.cos(), angles.sin()).sum() + h
        h = softmax_file.softmax(vector_add(h, stream.contiguous()))
        return ce.cross_entropy(h, t)

    def loss_and_gradients(function):
        leaves = [v.detach().clone().requires_grad_() for v in (x, r, w, b)]
        loss = function(*leaves)
        return [loss, *torch.autograd.grad(loss, leaves)]

    expected = loss_and_gradients(everything)
    got = loss_and_gradients(torch.compile(everything, fullgraph=True))
    for a, e in zip(got, expected, strict=True):
        assert error(a, e) < 1e-4


def test_in_a_cuda_graph_and_on_another_stream():
    x, w = torch.randn(64, 1000, device="cuda"), torch.randn(1000, device="cuda")
    softmax_file.softmax(x)
    wide = torch.randn(8, 40_000, device="cuda")
    softmax_file.softmax(wide)
    rms.rms_norm(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a, b, c = softmax_file.softmax(x), rms.rms_norm(x, w), softmax_file.softmax(wide)
    for _ in range(3):
        x.normal_()
        wide.normal_()
        graph.replay()
        assert error(a, torch.softmax(x.double(), -1)) < 1e-6
        assert error(b, exact_rms(x.double(), w.double())) < 1e-6
        assert error(c, torch.softmax(wide.double(), -1)) < 1e-6
