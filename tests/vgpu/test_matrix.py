"""Tensor-core instructions: real kernels, compiled, run on the machine and compared with float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from running import run, zeros

from llmcourse.vgpu.faults import KernelFault
from llmcourse.vgpu.fragments import fragment_accesses, layout_of
from llmcourse.vgpu.isa import Address, Instruction, Register, Vector
from llmcourse.vgpu.matrix import compile_matrix, unpack

rng = np.random.default_rng(5)

HEAD = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <mma.h>
using namespace nvcuda;
"""

# C type, element as numpy, fragment's type, shape, accumulator as C and numpy
WMMA = {
    "half": ("__half", np.float16, "__half", (16, 16, 16), "float", np.float32),
    "half sums": ("__half", np.float16, "__half", (16, 16, 16), "__half", np.float16),
    "tall": ("__half", np.float16, "__half", (32, 8, 16), "float", np.float32),
    "wide": ("__half", np.float16, "__half", (8, 32, 16), "float", np.float32),
    "tall half sums": ("__half", np.float16, "__half", (32, 8, 16), "__half", np.float16),
    "wide half sums": ("__half", np.float16, "__half", (8, 32, 16), "__half", np.float16),
    "bfloat16": ("__nv_bfloat16", ml_dtypes.bfloat16, "__nv_bfloat16", (16, 16, 16), "float", np.float32),
    "wide bfloat16": ("__nv_bfloat16", ml_dtypes.bfloat16, "__nv_bfloat16", (8, 32, 16), "float", np.float32),
    "int8": ("signed char", np.int8, "signed char", (16, 16, 16), "int", np.int32),
    "tall int8": ("signed char", np.int8, "signed char", (32, 8, 16), "int", np.int32),
    "wide uint8": ("unsigned char", np.uint8, "unsigned char", (8, 32, 16), "int", np.int32),
    "tf32": ("float", np.float32, "wmma::precision::tf32", (16, 16, 8), "float", np.float32),
    "double": ("double", np.float64, "double", (8, 8, 4), "double", np.float64),
}

ONE_TILE = (
    HEAD
    + """
__global__ void k(const {T}* a, const {T}* b, const {S}* c, {S}* d, int lda, int ldb, int ldc) {{
  wmma::fragment<wmma::matrix_a, {M}, {N}, {K}, {F}, wmma::{la}_major> fa;
  wmma::fragment<wmma::matrix_b, {M}, {N}, {K}, {F}, wmma::{lb}_major> fb;
  wmma::fragment<wmma::accumulator, {M}, {N}, {K}, {S}> fc;
  {shared}
  wmma::load_matrix_sync(fa, {pa}, lda);
  wmma::load_matrix_sync(fb, {pb}, ldb);
  wmma::load_matrix_sync(fc, {pc}, ldc, wmma::mem_{lc}_major);
  for (int i = 0; i < fc.num_elements; ++i) fc.x[i] = fc.x[i] + fc.x[i];
  wmma::mma_sync(fc, fa, fb, fc);
  wmma::store_matrix_sync({pd}, fc, ldc, wmma::mem_{lc}_major);
  {back}
}}"""
)

SHARED = """
  __shared__ __align__(32) {T} sa[2048]; __shared__ __align__(32) {T} sb[2048];
  __shared__ __align__(32) {S} sc[2048];
  for (int i = threadIdx.x; i < 2048; i += 32) {{ sa[i] = a[i]; sb[i] = b[i]; sc[i] = c[i]; }}
  __syncwarp();"""
BACK = "__syncwarp(); for (int i = threadIdx.x; i < 2048; i += 32) d[i] = sc[i];"


def stored(matrix: np.ndarray, layout: str, padding: int) -> tuple[np.ndarray, int]:
    """A matrix in 2048 elements of memory, `padding` unused ones a row (or column): (flat, stride)."""
    lines = matrix if layout == "row" else matrix.T
    flat = np.zeros((lines.shape[0], lines.shape[1] + padding), matrix.dtype)
    flat[:, : lines.shape[1]] = lines
    out = np.zeros(2048, matrix.dtype)
    out[: flat.size] = flat.ravel()
    return out, flat.shape[1]


def values(shape, dtype) -> np.ndarray:
    if np.issubdtype(dtype, np.integer):
        return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, shape).astype(dtype)
    x = rng.standard_normal(shape).astype("f4")
    if dtype == np.float32:  # exact in tf32, so that the reference is
        x = (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return x.astype(dtype)


@pytest.mark.parametrize("layouts", ["row row row", "col col col", "row col row", "col row col"])
@pytest.mark.parametrize("memory", ["global", "shared"])
@pytest.mark.parametrize("kind", WMMA)
def test_a_wmma_tile_of_every_type_shape_layout_and_memory(kind, memory, layouts):
    c_type, dtype, fragment, (m, n, k), sum_type, sums = WMMA[kind]
    la, lb, lc = layouts.split()
    a, b = values((m, k), dtype), values((k, n), dtype)
    c = values((m, n), np.int16 if sums is np.int32 else sums).astype(sums)
    padding = 16 // np.dtype(dtype).itemsize
    flat_a, lda = stored(a, la, padding)
    flat_b, ldb = stored(b, lb, 0)
    flat_c, ldc = stored(c, lc, 16 // np.dtype(sums).itemsize)
    flat_d = flat_c.copy()
    names = {"T": c_type, "S": sum_type, "F": fragment, "M": m, "N": n, "K": k, "la": la, "lb": lb, "lc": lc}
    inside = memory == "shared"
    source = ONE_TILE.format(
        **names,
        shared=SHARED.format(**names) if inside else "",
        back=BACK if inside else "",
        pa="sa" if inside else "a",
        pb="sb" if inside else "b",
        pc="sc" if inside else "c",
        pd="sc" if inside else "d",
    )
    raw = [
        x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x for x in (flat_a, flat_b, flat_c, flat_d)
    ]
    counters = run(source, 1, 32, *raw, lda, ldb, ldc).counters
    want = a.astype("f8") @ b.astype("f8") + 2 * c.astype("f8")
    lines, _ = stored(want.astype(sums), lc, ldc - (n if lc == "row" else m))
    expected = lines.astype("f8")
    tolerance = {np.float16: 2e-3, np.float32: 1e-6}.get(sums, 1e-12)
    np.testing.assert_allclose(flat_d.astype("f8"), expected, rtol=tolerance, atol=tolerance)
    assert counters.flops_tensor == 2 * m * n * k


def test_a_row_of_tiles_whose_warps_stand_apart_in_a_grid():
    source = (
        HEAD
        + """
    __global__ void k(const __half* a, const __half* b, float* c, int m, int n, int depth) {
      int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, tiles = n / 16;
      int row = warp / tiles * 16, col = warp % tiles * 16;
      if (row >= m) return;
      wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> fa;
      wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> fb;
      wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc;
      wmma::fill_fragment(fc, 0.f);
      for (int i = 0; i < depth; i += 16) {
        wmma::load_matrix_sync(fa, a + row * depth + i, depth);
        wmma::load_matrix_sync(fb, b + i * n + col, n);
        wmma::mma_sync(fc, fa, fb, fc);
      }
      wmma::store_matrix_sync(c + row * n + col, fc, n, wmma::mem_row_major);
    }"""
    )
    m, n, depth = 48, 80, 32
    a, b, c = values((m, depth), np.float16), values((depth, n), np.float16), zeros(m, n)
    counters = run(source, 4, 128, a, b, c, m, n, depth).counters
    np.testing.assert_allclose(c, a.astype("f8") @ b.astype("f8"), rtol=1e-5, atol=1e-5)
    assert counters.flops_tensor == 2 * m * n * depth
    assert counters.global_load_requests == (m // 16) * (n // 16) * (depth // 16) * 8
    assert counters.global_load_sectors_per_request == 8  # eight rows of 16 bytes


def test_one_warp_of_many_moves_and_multiplies_its_tile_alone():
    source = (
        HEAD
        + """
    __global__ void k(const __half* a, const __half* b, float* c) {
      __shared__ __align__(32) __half s[256];
      s[threadIdx.x] = a[threadIdx.x];
      __syncthreads();
      if (threadIdx.x / 32 != 5) return;
      wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> fa;
      wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::col_major> fb;
      wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc;
      wmma::fill_fragment(fc, 0.f);
      wmma::load_matrix_sync(fa, s, 16);
      wmma::load_matrix_sync(fb, b + 256 * blockIdx.x, 16);
      wmma::mma_sync(fc, fa, fb, fc);
      wmma::store_matrix_sync(c + 256 * blockIdx.x, fc, 16, wmma::mem_row_major);
    }"""
    )
    a, b, c = values((16, 16), np.float16), values((3, 16, 16), np.float16), zeros(3, 16, 16)
    counters = run(source, 3, 256, a, b, c).counters
    np.testing.assert_allclose(c, a.astype("f8") @ b.transpose(0, 2, 1), rtol=1e-5, atol=1e-5)
    assert counters.flops_tensor == 3 * 2 * 16**3
    assert counters.shared_load_wavefronts == 3 * 8  # rows of 32 bytes: every fourth meets the same banks


MMA = """
__global__ void k(const unsigned* a, const unsigned* b, const {R}* c, {R}* d) {{
  int l = threadIdx.x;
  {R} out[{D}];
  asm volatile("mma.sync.aligned.{text} {{{dn}}}, {{{an}}}, {{{bn}}}, {{{cn}}};"
    : {outs} : {ins});
  for (int i = 0; i < {D}; ++i) d[i * 32 + l] = out[i];
}}"""

# modifiers, (m, n, k), registers of A, B and C, dtype of elements, of the accumulator
FORMS = [
    ("m16n8k16.row.col.f32.f16.f16.f32", (16, 8, 16), 4, 2, 4, np.float16, np.float32),
    ("m16n8k8.row.col.f32.f16.f16.f32", (16, 8, 8), 2, 1, 4, np.float16, np.float32),
    ("m16n8k16.row.col.f16.f16.f16.f16", (16, 8, 16), 4, 2, 2, np.float16, np.float16),
    ("m16n8k16.row.col.f32.bf16.bf16.f32", (16, 8, 16), 4, 2, 4, ml_dtypes.bfloat16, np.float32),
    ("m16n8k8.row.col.f32.bf16.bf16.f32", (16, 8, 8), 2, 1, 4, ml_dtypes.bfloat16, np.float32),
    ("m16n8k4.row.col.f32.tf32.tf32.f32", (16, 8, 4), 2, 1, 4, np.float32, np.float32),
    ("m16n8k8.row.col.f32.tf32.tf32.f32", (16, 8, 8), 4, 2, 4, np.float32, np.float32),
    ("m8n8k16.row.col.s32.s8.s8.s32", (8, 8, 16), 1, 1, 2, np.int8, np.int32),
    ("m16n8k16.row.col.s32.u8.u8.s32", (16, 8, 16), 2, 1, 4, np.uint8, np.int32),
    ("m16n8k32.row.col.s32.s8.s8.s32", (16, 8, 32), 4, 2, 4, np.int8, np.int32),
    ("m16n8k32.row.col.f32.e4m3.e4m3.f32", (16, 8, 32), 4, 2, 4, ml_dtypes.float8_e4m3fn, np.float32),
    ("m16n8k32.row.col.f32.e5m2.e5m2.f32", (16, 8, 32), 4, 2, 4, ml_dtypes.float8_e5m2, np.float32),
]


def lane_of(outer: int, k: int, each: int) -> tuple[int, int, int]:
    """(lane, block along k, place in the register) of an operand's element, by the PTX manual's figures."""
    depth = 4 * each
    return outer % 8 * 4 + k % depth // each, k // depth, k % each


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[0])
def test_mma_sync_takes_fragments_as_the_manual_lays_them_out(form):
    text, (m, n, k), registers_a, registers_b, registers_c, dtype, sums = form
    each = 4 // np.dtype(dtype).itemsize
    a, b, c = values((m, k), dtype), values((k, n), dtype), values((m, n), np.int16).astype(sums)
    fa = np.zeros((registers_a, 32, each), dtype)
    for row in range(m):
        for i in range(k):
            lane, block, place = lane_of(row, i, each)
            fa[block * (m // 8) + row // 8, lane, place] = a[row, i]
    fb = np.zeros((registers_b, 32, each), dtype)
    for col in range(n):
        for i in range(k):
            lane, block, place = lane_of(col, i, each)
            fb[block, lane, place] = b[i, col]
    packed = 2 if sums == np.float16 else 1
    fc = np.zeros((registers_c, 32, packed), sums)
    where = {}
    for row in range(m):
        for col in range(n):
            number = row // 8 * 2 + col % 2
            where[row, col] = (number // packed, row % 8 * 4 + col // 2, number % packed)
            fc[where[row, col]] = c[row, col]
    floating = sums == np.float32
    kind, letter = ("float", "f") if floating else ("unsigned", "r")
    numbers = iter(range(40))
    names = {
        part: ",".join(f"%{next(numbers)}" for _ in range(count))
        for part, count in (
            ("dn", registers_c),
            ("an", registers_a),
            ("bn", registers_b),
            ("cn", registers_c),
        )
    }
    source = MMA.format(
        R=kind,
        D=registers_c,
        text=text,
        outs=", ".join(f'"={letter}"(out[{i}])' for i in range(registers_c)),
        ins=", ".join(
            [f'"r"(a[{i} * 32 + l])' for i in range(registers_a)]
            + [f'"r"(b[{i} * 32 + l])' for i in range(registers_b)]
            + [f'"{letter}"(c[{i} * 32 + l])' for i in range(registers_c)]
        ),
        **names,
    )
    raw = [np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint32) for x in (fa, fb)]
    raw_c = fc.reshape(registers_c, -1).view(np.float32 if floating else np.uint32)
    d = np.zeros_like(raw_c)
    run(source, 1, 32, *raw, raw_c, d, arch="sm_89" if ".e" in text else "sm_80")
    got = d.view(sums).reshape(registers_c, 32, packed)
    want = a.astype("f8") @ b.astype("f8") + c.astype("f8")
    found = np.array([[got[where[row, col]] for col in range(n)] for row in range(m)])
    np.testing.assert_allclose(found, want.astype(sums), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("turned", [False, True])
def test_ldmatrix_and_stmatrix_move_whole_8_by_8_blocks(count, turned):
    registers = ", ".join(f"%{i}" for i in range(count))
    trans = ".trans" if turned else ""
    source = f"""
    __global__ void k(const unsigned short* x, unsigned* out, unsigned short* y) {{
      __shared__ __align__(16) unsigned short s[32 * 24], t[32 * 24];
      int l = threadIdx.x; unsigned r[{count}];
      for (int i = l; i < 32 * 24; i += 32) s[i] = x[i], t[i] = 0;
      __syncwarp();
      unsigned from = __cvta_generic_to_shared(s + l * 24), to = __cvta_generic_to_shared(t + l * 24);
      asm volatile("ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%{count}];"
        : {", ".join(f'"=r"(r[{i}])' for i in range(count))} : "r"(from));
      for (int i = 0; i < {count}; ++i) out[i * 32 + l] = r[i];
      asm volatile("stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%{count}], {{{registers}}};"
        :: {", ".join(f'"r"(r[{i}])' for i in range(count))}, "r"(to));
      __syncwarp();
      for (int i = l; i < 32 * 24; i += 32) y[i] = t[i];
    }}"""
    x = rng.integers(0, 1 << 16, 32 * 24).astype("u2")
    out, y = zeros(count, 32, dtype="u4"), zeros(32 * 24, dtype="u2")
    counters = run(source, 1, 32, x, out, y, arch="sm_90").counters
    rows = x.reshape(32, 24)[:, :8]
    for i in range(count):
        block = rows[8 * i : 8 * i + 8]
        np.testing.assert_array_equal(out[i].view("u2").reshape(8, 8), block.T if turned else block)
    np.testing.assert_array_equal(y.reshape(32, 24)[: 8 * count, :8], rows[: 8 * count])
    assert not y.reshape(32, 24)[8 * count :].any()
    assert not y.reshape(32, 24)[:, 8:].any()
    # One request of `count` wavefronts, rows 48 bytes apart meeting no bank twice; 24 loads for y.
    assert counters.shared_load_requests == 24 + 1
    assert counters.shared_load_wavefronts == 24 + count


def test_movmatrix_turns_a_block_held_in_registers():
    source = """
    __global__ void k(const unsigned* x, unsigned* y) {
      unsigned r;
      asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x[threadIdx.x]));
      y[threadIdx.x] = r;
    }"""
    x, y = rng.integers(0, 1 << 32, 64).astype("u4"), zeros(64, dtype="u4")
    run(source, 1, 64, x, y)
    for warp in (0, 32):
        before, after = (z[warp : warp + 32].view("u2").reshape(8, 8) for z in (x, y))
        np.testing.assert_array_equal(after, before.T)


@pytest.mark.parametrize("shape", [(16, 16, 16), (32, 8, 16), (8, 32, 16), (16, 8, 32), (8, 8, 4)])
@pytest.mark.parametrize("type_", ["f16", "s8", "f32", "f64"])
def test_every_element_of_a_tile_is_held_once(shape, type_):
    for role in ("a", "b", "c"):
        if role != "c" and shape[2] * 8 < {"f16": 64, "s8": 128, "f32": 32, "f64": 32}[type_]:
            continue
        layout = layout_of(role, *shape, type_ if role != "c" or type_ != "s8" else "s32")
        place = (layout.rows * layout.shape[1] + layout.cols).ravel()
        np.testing.assert_array_equal(np.sort(place), np.arange(layout.shape[0] * layout.shape[1]))


def test_older_gpus_load_two_blocks_from_shared_memory_at_a_time():
    parts = Vector(tuple(Register(f"%r{i}", "b32") for i in range(8)))
    load = Instruction(
        "wmma",
        ("load", "a", "sync", "aligned", "row", "m16n16k16", "shared", "f16"),
        (parts, Address(Register("%r9", "b32")), Register("%r10", "b32")),
        None,
        None,
        "",
    )
    for target, requests, lanes in (("sm_75", 2, 16), ("sm_80", 1, 32), ("sm_90a", 1, 32)):
        plan = fragment_accesses(load, target)
        assert [r.lanes for r in plan.requests] == [lanes] * requests


def test_forms_that_the_machine_has_not_are_refused_not_guessed():
    r = Register("%r1", "b32")
    for modifiers in (
        ("sync", "aligned", "m8n8k4", "row", "col", "f32", "f16", "f16", "f32"),
        ("sp", "sync", "aligned", "m16n8k16", "row", "col", "f32", "f16", "f16", "f32"),
        ("sync", "aligned", "m8n8k128", "row", "col", "s32", "b1", "b1", "s32", "xor", "popc"),
    ):
        assert compile_matrix(Instruction("mma", modifiers, (r, r, r, r), None, None, "")) is None


def test_packed_elements_come_out_lowest_bits_first():
    packed = np.arange(256, dtype=np.uint8).view(np.uint32).reshape(2, 1, 32)
    for type_, dtype in (("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2), ("s8", np.int8)):
        want = packed[..., None].view(dtype).astype(np.float32)
        np.testing.assert_array_equal(unpack(packed, type_).astype(np.float32), want)
    nibbles = (packed[..., None].view(np.uint8)[..., None] >> np.array([0, 4], np.uint8) & 15).reshape(
        2, 1, 32, 8
    )
    np.testing.assert_array_equal(unpack(packed, "u4"), nibbles)
    np.testing.assert_array_equal(unpack(packed, "s4"), (nibbles.astype(int) + 8) % 16 - 8)


def fault(source: str, *arguments, block: int = 32) -> KernelFault:
    with pytest.raises(KernelFault) as raised:
        run(HEAD + source, 1, block, *arguments)
    return raised.value


LOAD = """
__global__ void k(const __half* a, float* c, int ld) {{
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> fa;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc;
  wmma::fill_fragment(fc, 0.f);
  {before}
  wmma::load_matrix_sync(fa, {pointer}, ld);
  for (int i = 0; i < 8; ++i) fc.x[i] = fa.x[i];
  wmma::store_matrix_sync(c, fc, 16, wmma::mem_row_major);
}}"""


@pytest.mark.parametrize(
    ("pointer", "ld", "before", "block", "kind", "says"),
    [
        ("a + threadIdx.x", 16, "", 32, "unsupported", "different pointers"),
        ("a + 8", 16, "", 32, "misaligned", "no multiple of 32 bytes, 16 past"),
        ("a", 20, "", 32, "misaligned", "stride that is no multiple of 16 bytes, 8 past"),
        ("a + 256", 16, "", 32, "out of bounds", "element"),
        ("a", 16, "if (threadIdx.x < 8) return;", 32, "divergent barrier", "some lanes of a warp"),
        ("a", 16, "", 40, "divergent barrier", "0x000000ff"),
    ],
)
def test_a_tile_that_cannot_be_loaded_says_why(pointer, ld, before, block, kind, says):
    found = fault(
        LOAD.format(pointer=pointer, before=before), zeros(384, dtype="f2"), zeros(256), ld, block=block
    )
    assert found.kind == kind
    assert says in found.what
    assert found.line is not None
    assert found.line.line == 12


def test_the_warp_that_lacks_lanes_is_named_among_many():
    source = LOAD.format(pointer="a", before="if (threadIdx.x < 96 || threadIdx.x == 100) return;")
    found = fault(source, zeros(256, dtype="f2"), zeros(256), 16, block=256)
    assert (found.kind, found.thread) == ("divergent barrier", (96, 0, 0))


def test_lanes_that_read_a_stored_tile_without_syncwarp_race():
    source = """
    __global__ void k(float* out) {
      __shared__ __align__(32) float s[256];
      wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc;
      wmma::fill_fragment(fc, 1.f);
      wmma::store_matrix_sync(s, fc, 16, wmma::mem_row_major);
      %s
      for (int i = threadIdx.x; i < 256; i += 32) out[i] = s[i];
    }"""
    assert fault(source % "", zeros(256)).kind == "race"
    run(HEAD + source % "__syncwarp();", 1, 32, out := zeros(256))
    assert (out == 1).all()
