"""Costs are counted to the byte: against numbers derived by hand, torch's profiler and each other."""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from llmcourse.autograd import Tensor
from llmcourse.autograd import memory as autograd_memory
from llmcourse.errors import CourseError, GraphError, MissingPackageError, UnknownNameError
from llmcourse.grading.cost import COUNTERS, CostError, Count, counter, register

F = torch.nn.functional
BUILT_IN = (
    "saved_bytes",
    "saved_bytes_numpy",
    "largest_intermediate",
    "launches",
    "leaked_bytes",
    "traced_peak_bytes",
)


def cost(name: str, run: Callable[[], object], arguments: tuple[object, ...] = ()) -> dict[str, int]:
    """What `run()` costs, its result held until the block ends."""
    with counter(name)(arguments=arguments) as count:
        result = run()
    del result
    return count.values


# ── attention: the S × S matrix is there, or it is not ───────────────────────────────────────────

B, H, S, D = 1, 2, 64, 8
SQUARE, ROWS = 4 * B * H * S * S, 4 * B * H * S * D


def qkv(requires_grad: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, S, D, generator=generator, requires_grad=requires_grad) for _ in range(3)]


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
def test_the_largest_intermediate_of_naive_attention_is_the_square_and_of_the_fused_one_is_not(mode) -> None:
    q, k, v = qkv()
    with MODES[mode]():
        naive = cost("largest_intermediate", lambda: naive_attention(q, k, v))
        fused = cost("largest_intermediate", lambda: fused_attention(q, k, v))
    assert naive == {"largest_intermediate": SQUARE, "peak_bytes": 2 * SQUARE}  # scores and softmax
    assert fused == {"largest_intermediate": ROWS, "peak_bytes": ROWS + 4 * B * H * S}  # and one sum a row


def test_the_backward_pass_counts_too() -> None:
    for attention, largest in ((naive_attention, SQUARE), (fused_attention, ROWS)):
        y = attention(*qkv())
        gradient = torch.ones_like(y)
        assert (
            cost("largest_intermediate", lambda y=y, g=gradient: y.backward(g))["largest_intermediate"]
            == largest
        )


def test_attention_saves_the_softmax_and_the_fused_one_only_its_output_and_a_sum_a_row() -> None:
    for attention, saved in ((naive_attention, SQUARE), (fused_attention, ROWS + 4 * B * H * S)):
        args = tuple(qkv())
        values = cost("saved_bytes", lambda f=attention, a=args: f(*a), args)
        assert values == {"saved_bytes": saved, "saved_argument_bytes": 3 * ROWS}


@pytest.mark.parametrize("mode", MODES)
def test_attention_takes_three_launches_and_the_fused_one_takes_one(mode) -> None:
    q, k, v = qkv()
    with MODES[mode]():
        naive = cost("launches", lambda: naive_attention(q, k, v))
        fused = cost("launches", lambda: fused_attention(q, k, v))
    assert naive == {
        "launches": 3,  # scores, softmax, weighted sum; the transpose moves nothing
        "bytes_read": 2 * ROWS + SQUARE + (SQUARE + ROWS),
        "bytes_written": SQUARE + SQUARE + ROWS,
    }
    assert fused == {"launches": 1, "bytes_read": 3 * ROWS, "bytes_written": ROWS + 4 * B * H * S}


def allocator_peak(run: Callable[[], object]) -> int:
    """The most that torch's own allocator had given out at one time, by torch's profiler."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        result = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


def test_the_peak_is_the_one_that_torchs_profiler_sees() -> None:
    def forward() -> torch.Tensor:
        return naive_attention(*args)

    def both() -> None:
        naive_attention(*args).sum().backward()

    for run, requires_grad in ((forward, False), (forward, True), (both, True)):
        args = qkv(requires_grad)
        ours = cost("largest_intermediate", run)["peak_bytes"]
        args = qkv(requires_grad)
        assert ours == pytest.approx(allocator_peak(run), abs=64)  # the scalars of a sum's gradient


# ── saved for backward ───────────────────────────────────────────────────────────────────────────

N = 1000
BYTES = 8 * N


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.rand(N, dtype=torch.float64, requires_grad=True) for _ in range(2))


# operation: (bytes of its own, bytes of the arguments) by hand
SAVED = {
    "add": (lambda a, b: a + b, 0, 0),
    "mul": (lambda a, b: a * b, 0, 2 * BYTES),
    "square": (lambda a, b: a * a, 0, BYTES),
    "exp": (lambda a, b: a.exp(), BYTES, 0),
    "exp, then a product with it": (lambda a, b: a.exp() * b, BYTES, BYTES),
    "log of a sum": (lambda a, b: (a + b).log(), BYTES, 0),
    "product of two elements": (lambda a, b: a[3] * b[4], 0, 2 * BYTES),
    "product of a view of a result": (lambda a, b: (a + 1)[:3] * b[:3], BYTES, BYTES),
    "matmul": (lambda a, b: a.view(10, 100) @ b.view(100, 10), 0, 2 * BYTES),
    "softmax": (lambda a, b: a.softmax(-1), BYTES, 0),
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_bytes_equal_the_hand_derived_ones(name: str) -> None:
    operation, own, given = SAVED[name]
    a, b = vectors()
    values = cost("saved_bytes", lambda: operation(a, b), (a, b))
    assert values == {"saved_bytes": own, "saved_argument_bytes": given}
    assert cost("saved_bytes", lambda: operation(a, b)) == {
        "saved_bytes": own + given,
        "saved_argument_bytes": 0,
    }


def layers(t):
    """A small network in operations that torch and llmcourse.autograd both have."""
    x, w, u = t
    return ((x @ w).tanh() @ u).softmax(-1).exp().sum()


def test_llmcourse_autograd_keeps_as_much_as_torch() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s) for s in ((7, 16), (16, 32), (32, 5))]
    ours = [Tensor(a, requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    a = cost("saved_bytes_numpy", lambda: layers(ours), (ours,))
    b = cost("saved_bytes", lambda: layers(theirs), (theirs,))
    assert list(a.values()) == list(b.values())
    assert a == {
        "saved_bytes_numpy": 8 * (7 * 32 + 2 * 7 * 5),
        "saved_argument_bytes_numpy": 8 * (7 * 16 + 16 * 32 + 32 * 5),
    }
    assert cost("saved_bytes_numpy", lambda: layers(ours))["saved_bytes_numpy"] == sum(a.values())


def test_saved_bytes_of_numpy_count_the_most_at_one_time() -> None:
    x = Tensor(np.ones(N), requires_grad=True)

    def twice() -> None:
        for _ in range(2):
            x.exp().sum().backward()

    assert cost("saved_bytes_numpy", twice)["saved_bytes_numpy"] == BYTES


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_saves_only_the_input_and_gives_the_same_gradients(reentrant: bool) -> None:
    torch.manual_seed(0)
    block = torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32), torch.nn.Tanh()
    )
    x = torch.randn(16, 32, requires_grad=True)

    def both(run: Callable[[], torch.Tensor]) -> tuple[dict[str, int], torch.Tensor]:
        x.grad = None
        with counter("saved_bytes")(arguments=(x, block)) as count:
            y = run()
        y.sum().backward()
        return count.values, x.grad

    plain, expected = both(lambda: block(x))
    less, got = both(lambda: checkpoint(block, x, use_reentrant=reentrant))
    assert plain == {
        "saved_bytes": 4 * 16 * (64 + 32),
        "saved_argument_bytes": 4 * (32 * 64 + 64 * 32 + 16 * 32),
    }
    assert less == {"saved_bytes": 0, "saved_argument_bytes": 4 * 16 * 32}
    torch.testing.assert_close(got, expected)


def test_accumulated_micro_batches_save_the_most_of_one_of_them() -> None:
    a, b = vectors()

    def micro_batches() -> None:
        for part in range(4):
            (a[part * 250 : (part + 1) * 250].exp() * 2).sum().backward()

    assert cost("saved_bytes", micro_batches, (a, b))["saved_bytes"] == BYTES // 4
    assert cost("saved_bytes", lambda: (a.exp() * 2).sum().backward(), (a, b))["saved_bytes"] == BYTES


def test_memory_that_two_operations_share_is_held_until_both_let_go() -> None:
    a, _ = vectors()

    def shared() -> list[torch.Tensor]:
        y = a.exp()
        y.sin()  # kept y too, and is gone
        return [y, a.exp()]

    assert cost("saved_bytes", shared, (a,)) == {"saved_bytes": 2 * BYTES, "saved_argument_bytes": 0}


def test_tensors_hidden_from_autograd_are_seen_by_what_the_call_keeps_alive() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.y = a.exp()  # not save_for_backward
            return ctx.y.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.y

    a, _ = vectors()

    def offloaded() -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return a.exp()

    for run in (lambda: Hidden.apply(a), offloaded):
        assert cost("saved_bytes", run)["saved_bytes"] == 0
        assert cost("leaked_bytes", run)["leaked_bytes"] == 2 * BYTES  # the result and the copy
    assert cost("leaked_bytes", lambda: a.exp())["leaked_bytes"] == BYTES


def test_gradients_of_gradients_are_right_under_the_counter() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    with counter("saved_bytes")():
        (g,) = torch.autograd.grad((x**4).sum(), x, create_graph=True)
        (gg,) = torch.autograd.grad(g.sum(), x)
    torch.testing.assert_close(gg, 12 * x.detach() ** 2)


def test_a_saved_tensor_changed_in_place_is_still_noticed() -> None:
    """Hooks switch torch's own check off; without ours the gradient would be wrong in silence."""
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with counter("saved_bytes")():
        y = x.exp()
    y.mul_(2)
    with pytest.raises(GraphError, match="modified by an in-place operation"):
        y.sum().backward()


def test_arguments_are_known_by_their_memory() -> None:
    array = np.ones(N)
    whole = torch.ones(N, dtype=torch.float64, requires_grad=True)

    def product() -> torch.Tensor:
        return torch.from_numpy(array[5:]) * whole[5:] * whole[5:]

    # The tensor made of an array begins where the view of it begins; its argument may be another view.
    # The second product keeps the first one's result and `whole`.
    own, from_array = BYTES - 40, BYTES - 40
    assert cost("saved_bytes", product, ({"x": [array[::2]]}, whole[1:2])) == {
        "saved_bytes": own,
        "saved_argument_bytes": from_array + BYTES,
    }
    assert cost("saved_bytes", product, (whole, "text", 3, None)) == {
        "saved_bytes": own + from_array,
        "saved_argument_bytes": BYTES,
    }


def test_sparse_tensors_are_counted_by_their_parts() -> None:
    dense = torch.eye(10, requires_grad=True)
    sparse = torch.eye(10).to_sparse()
    values = cost("saved_bytes", lambda: torch.sparse.mm(sparse, dense), (dense,))
    assert values["saved_bytes"] == 10 * (2 * 8 + 4)  # two indices and a value for each element
    assert cost("largest_intermediate", lambda: dense.detach().to_sparse())["largest_intermediate"] == 160


# ── operations ───────────────────────────────────────────────────────────────────────────────────


def test_views_make_no_memory_and_launch_nothing() -> None:
    x = torch.ones(N)

    def views() -> list[torch.Tensor]:
        square = x.view(10, 100)
        return [
            square.T,
            square[3:, ::2],
            x.expand(50, N),
            square.detach(),
            x.unfold(0, 5, 1),
            x.reshape(4, 250),
        ]

    assert cost("largest_intermediate", views) == {"largest_intermediate": 0, "peak_bytes": 0}
    assert cost("launches", views) == {"launches": 0, "bytes_read": 0, "bytes_written": 0}


# operation: (launches, bytes read, bytes written) by hand, for two float32 vectors of N elements
TRAFFIC = {
    "add": (lambda a, b: a + b, 1, 8 * N, 4 * N),
    "the same input twice": (lambda a, b: a * a, 1, 4 * N, 4 * N),
    "a chain": (lambda a, b: (a * 2 + b).relu(), 3, 16 * N, 12 * N),
    "in place": (lambda a, b: a.add_(b), 1, 8 * N, 4 * N),
    "into a given tensor": (lambda a, b: torch.mul(a, 2, out=b), 1, 4 * N, 4 * N),
    "copy": (lambda a, b: a.copy_(b), 1, 4 * N, 4 * N),
    "fill": (lambda a, b: a.zero_(), 1, 0, 4 * N),
    "a slice is set": (lambda a, b: a[:10].fill_(3.0), 1, 0, 40),
    "broadcast": (lambda a, b: a.view(10, 100) + b[:100], 1, 4 * N + 400, 4 * N),
    "an expanded input": (lambda a, b: a[:1].expand(N) + b, 1, 4 + 4 * N, 4 * N),
    "overlapping windows": (lambda a, b: a.unfold(0, 3, 1).contiguous(), 1, 4 * N, 12 * (N - 2)),
    "uninitialised": (lambda a, b: torch.empty_like(a), 0, 0, 0),
    "zeros": (lambda a, b: torch.zeros(N), 1, 0, 4 * N),
    "cast": (lambda a, b: a.double(), 1, 4 * N, 8 * N),
    "a cast to its own type": (lambda a, b: a.float(), 0, 0, 0),
    "transposed copy": (lambda a, b: a.view(10, 100).T.contiguous(), 1, 4 * N, 4 * N),
    "sum": (lambda a, b: a.sum(), 1, 4 * N, 4),
    "a number read back": (lambda a, b: a[0].item(), 0, 0, 0),
    "list of tensors": (lambda a, b: torch.cat([a, b]), 1, 8 * N, 8 * N),
    "several at once, in place": (lambda a, b: torch._foreach_add_([a, b], 1.0), 1, 8 * N, 8 * N),
    "two results": (lambda a, b: a.view(10, 100).max(dim=1), 1, 4 * N, 10 * (4 + 8)),
    "linear": (lambda a, b: F.linear(a.view(10, 100), b.view(10, 100)), 1, 8 * N, 400),
    "resized": (lambda a, b: a.resize_(2 * N), 0, 0, 0),
    "vmap": (lambda a, b: torch.vmap(lambda x: x * 2)(a.view(10, 100)), 1, 4 * N, 4 * N),
}


@pytest.mark.parametrize("name", TRAFFIC)
def test_launches_and_traffic_equal_the_hand_derived_ones(name: str) -> None:
    operation, launches, read, written = TRAFFIC[name]
    a, b = torch.ones(N), torch.ones(N)
    values = cost("launches", lambda: operation(a, b))
    assert values == {"launches": launches, "bytes_read": read, "bytes_written": written}


@pytest.mark.parametrize(
    ("make", "nbytes"),
    [
        (lambda: torch.tensor([1.0, 2.0, 3.0]), 12),
        (lambda: torch.tensor(np.ones(3)), 24),
        (lambda: torch.from_numpy(np.ones(3)), 0),  # NumPy's memory
        (lambda: torch.empty(7).resize_(100), 400),
        (lambda: torch.empty(5, device="meta") + 1, 20),
        (lambda: torch.zeros(3, dtype=torch.complex128), 48),
        (lambda: torch.ones(3, 0), 0),
    ],
)
def test_new_memory_is_seen_wherever_it_comes_from(make: Callable, nbytes: int) -> None:
    assert cost("largest_intermediate", make)["largest_intermediate"] == nbytes


def test_the_peak_follows_memory_that_is_let_go_and_given_out_again() -> None:
    x = torch.ones(N)

    def chain() -> torch.Tensor:
        y = x
        for _ in range(20):
            y = y + 1
        return y

    assert cost("largest_intermediate", chain) == {"largest_intermediate": 4 * N, "peak_bytes": 8 * N}
    kept = cost("largest_intermediate", lambda: [x + i for i in range(20)])
    assert kept["peak_bytes"] == 80 * N


# ── left behind ──────────────────────────────────────────────────────────────────────────────────


def test_what_a_function_stores_elsewhere_is_a_leak_and_its_dropped_result_is_not() -> None:
    store: list[object] = []

    def leaky() -> torch.Tensor:
        store.append(torch.ones(100) * 2)
        store.append(np.ones(3))
        np.ones(50), torch.ones(50)
        return torch.ones(1000)

    with counter("leaked_bytes")() as count:
        result = leaky()
        del result
    assert count.values == {"leaked_bytes": 400 + 24}
    assert cost("leaked_bytes", leaky)["leaked_bytes"] == 400 + 24 + 4000


def test_garbage_in_cycles_is_no_leak() -> None:
    def cycle() -> None:
        a: list[object] = [torch.ones(100), np.ones(100)]
        a.append(a)

    gc.disable()
    try:
        assert cost("leaked_bytes", cycle) == {"leaked_bytes": 0}
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_graph_that_was_not_let_go_is_a_leak() -> None:
    a, _ = vectors()
    losses = []

    def step() -> None:
        loss = (a.exp() * 2).sum()
        loss.backward(torch.ones_like(loss), retain_graph=True)
        losses.append(loss)  # the classic: losses.append(loss) and not loss.item()

    a.grad = torch.zeros_like(a)
    assert cost("leaked_bytes", step)["leaked_bytes"] == BYTES + 8
    with torch.no_grad():
        assert cost("leaked_bytes", lambda: a.exp().sum().item()) == {"leaked_bytes": 0}


def test_a_view_keeps_its_whole_array_alive() -> None:
    store = []
    assert cost("leaked_bytes", lambda: store.append(np.ones(N)[:1])) == {"leaked_bytes": BYTES}
    assert cost("leaked_bytes", lambda: store.append(torch.ones(N)[:1])) == {"leaked_bytes": 4 * N}


def test_the_traced_peak_is_the_most_at_one_time() -> None:
    def three_after_each_other() -> None:
        for _ in range(3):
            np.ones(100 * N)

    def three_at_once() -> None:
        [np.ones(100 * N) for _ in range(3)]

    outside = np.ones(500 * N)
    assert 100 * BYTES <= cost("traced_peak_bytes", three_after_each_other)["traced_peak_bytes"] < 101 * BYTES
    assert 300 * BYTES <= cost("traced_peak_bytes", three_at_once)["traced_peak_bytes"] < 301 * BYTES
    assert outside.any()


# ── together, and afterwards ─────────────────────────────────────────────────────────────────────


def traces() -> tuple[object, ...]:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    modes = len(_get_current_dispatch_mode_stack())
    return hooks, modes, tracemalloc.is_tracing(), len(autograd_memory._active), gc.isenabled()


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_counter_leaves_everything_as_it_was_also_if_the_block_raises(name: str) -> None:
    before = traces()
    with counter(name)() as count:
        assert traces() != before
    assert traces() == before
    assert all(type(v) is int for v in count.values.values())
    assert name in count.values

    def failing() -> None:
        torch.ones(3) + 1
        raise KeyError("from the block")

    counting = counter(name)()
    with pytest.raises(KeyError, match="from the block"), counting as count:
        failing()
    assert traces() == before
    assert count.values == {}


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        *((name, name) for name in BUILT_IN),
        ("saved_bytes", "largest_intermediate"),
        ("largest_intermediate", "saved_bytes"),
        ("largest_intermediate", "launches"),
        ("launches", "largest_intermediate"),
        ("leaked_bytes", "launches"),
        ("leaked_bytes", "traced_peak_bytes"),
        ("traced_peak_bytes", "leaked_bytes"),
    ],
)
def test_nested_counters_each_count_their_own_block(outer: str, inner: str) -> None:
    x, t = torch.ones(N, requires_grad=True), Tensor(np.ones(N), requires_grad=True)

    def work() -> list[object]:
        return [(x * 2).exp(), t.exp(), np.ones(100 * N)]

    def twice() -> list[object]:
        return [*work(), *work()]

    alone_outer, alone_inner = cost(outer, twice), cost(inner, work)
    with counter(outer)() as whole:
        first = work()
        with counter(inner)() as part:
            second = work()
    del first, second
    # Python objects of the counters themselves are in a traced peak.
    for values, alone in ((whole.values, alone_outer), (part.values, alone_inner)):
        if "traced_peak_bytes" in values:
            assert values["traced_peak_bytes"] == pytest.approx(alone["traced_peak_bytes"], abs=10 * BYTES)
        else:
            assert values == alone


def test_an_outer_peak_is_not_lost_to_an_inner_counter_nor_to_ones_own_tracing_from_before() -> None:
    tracemalloc.start()
    try:
        np.ones(300 * N)
        before = tracemalloc.get_traced_memory()[1]
        with counter("traced_peak_bytes")() as outer:
            np.ones(200 * N)
            with counter("traced_peak_bytes")() as inner:
                np.ones(100 * N)
        assert tracemalloc.is_tracing()
        after = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 100 * BYTES <= inner.values["traced_peak_bytes"] < 101 * BYTES
    assert 200 * BYTES <= outer.values["traced_peak_bytes"] < 201 * BYTES
    assert before <= after < before + BYTES


@pytest.mark.parametrize("name", ["leaked_bytes", "traced_peak_bytes"])
@pytest.mark.parametrize("meddle", [tracemalloc.stop, tracemalloc.clear_traces])
def test_tracing_that_was_cut_off_gives_no_number(name: str, meddle: Callable[[], None]) -> None:
    with pytest.raises(CostError, match="stopped or cleared"):
        cost(name, meddle)
    assert not tracemalloc.is_tracing()


def test_all_counters_at_once_watch_a_training_step() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 10)
    x = torch.ones(5, 20)
    with (
        counter("saved_bytes")(arguments=[model, x]) as saved,
        counter("largest_intermediate")() as largest,
        counter("launches")() as launched,
        counter("traced_peak_bytes")() as peak,
    ):
        model(x).exp().sum().backward()
    assert saved.values == {"saved_bytes": 4 * 50, "saved_argument_bytes": 4 * 100}
    assert largest.values["largest_intermediate"] == 4 * 200  # the weight's gradient
    assert launched.values["launches"] >= 3 + 4
    assert peak.values["traced_peak_bytes"] > 0


# ── names ────────────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_counter_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(UnknownNameError) as caught:
        counter("dram_bytes")
    assert "there is no counter called 'dram_bytes'" in str(caught.value)
    assert all(name in caught.value.fix for name in BUILT_IN)


def test_a_later_chapter_adds_its_own_counter_under_nsight_computes_name() -> None:
    name = "dram__bytes_read.sum"

    @contextmanager
    def reads(*, arguments=()):
        count = Count()
        yield count
        count.values = {name: 128}

    try:
        assert register(name)(reads) is reads
        register(name)(reads)  # a reloaded module
        assert cost(name, lambda: None) == {name: 128}

        @contextmanager
        def others(*, arguments=()):
            yield Count()

        with pytest.raises(CostError, match="both registered as the counter"):
            register(name)(others)
        assert COUNTERS[name] is reads
    finally:
        del COUNTERS[name]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_counters_imports_no_torch() -> None:
    assert (
        python("import sys, llmcourse.grading.cost; print({'torch', 'scipy'} & set(sys.modules))") == "set()"
    )


def test_the_modes_are_not_wrapped_by_torchs_compiler_which_would_take_seconds_to_import() -> None:
    from llmcourse.grading.cost_torch import Births, Launches

    assert all(not hasattr(mode.__torch_dispatch__, "__wrapped__") for mode in (Births, Launches))


def test_without_torch_numpys_counters_work_and_the_others_say_what_is_missing() -> None:
    code = """
import sys
sys.modules['torch'] = sys.modules['llmcourse.autograd'] = None
import numpy as np
from llmcourse.errors import MissingPackageError
from llmcourse.grading.cost import COUNTERS, counter
store = []
for name in sorted(COUNTERS):
    try:
        with counter(name)(arguments=[store]) as count:
            store.append(np.ones(10))
        print(name, count.values[name] >= 80)
    except MissingPackageError as error:
        print(name, 'needs', error.what.split()[-6].rstrip(','))
"""
    assert python(code).splitlines() == [
        "largest_intermediate needs torch",
        "launches needs torch",
        "leaked_bytes True",
        "saved_bytes needs torch",
        "saved_bytes_numpy needs llmcourse.autograd",
        "traced_peak_bytes True",
    ]
    assert issubclass(MissingPackageError, CourseError)
