"""CUDA C++ that makes NVRTC emit about every arithmetic instruction it knows: one expression, one store."""

from __future__ import annotations

HEAD = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
typedef signed char i8;
typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef int i32;
typedef unsigned u32;
typedef long long i64;
typedef unsigned long long u64;
typedef __half h16;
typedef __half2 h32;
typedef __nv_bfloat16 b16;
typedef __nv_bfloat162 b32;
"""
INTEGER_TYPES = ("i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64")
TYPES = (*INTEGER_TYPES, "float", "double", "h16", "b16")

INTEGER = """
    a+b a-b a*b a*b+c a/b a%b -a ~a a&b a|b a^b (a&b)|c (a^b)&~c a<<(b&31) a>>b (a<b?a:b) a<b
    (a<=b)&&(b>c) (a==b)||(b!=c) !a (a<0?-a:a) a/7 a%13 a/8 a%16 a*5 (a>>3)&0x1f (a<<20)>>25
"""
INT = """
    __mul24(a,b) __mulhi(a,b) __rhadd(a,b) __hadd(a,b) __sad(a,b,c) __popc(a) __clz(a) __ffs(a)
    __brev(a) __byte_perm(a,b,c) __byte_perm(a,b,0x1032) __funnelshift_l(a,b,c) __funnelshift_rc(a,b,c)
    __dp4a(a,b,c) __dp2a_lo(a,b,c) __fns(a,b,c) __vadd2(a,b) __vadd4(a,b) __vabsdiffu4(a,b)
    __vmaxs2(a,b) __vavgs4(a,b) __vcmpeq4(a,b) __vsads4(a,b) __viaddmax_s32(a,b,c)
    __vimax3_s32_relu(a,b,c) __vimin3_s16x2(a,b,c) __umulhi(a,b) __uhadd(a,b) __usad(a,b,c)
    __mul64hi(a,b) __umul64hi(a,b) __popcll(a) __clzll(a) __ffsll(a) __brevll(a) abs(a) llabs(a)
    min(a,b) max(max(a,b),c) i16(a) i8(a>>8) i64(a)*b+c (u32(a)>>7)&0x1ff
"""
FLOATING = """
    a+b a-b a*b a*b+c a*b-c a/b -a 1/a a<b a<=b a==b a!=b !(a<b) isnan(a) isinf(a) isfinite(a)
    signbit(a) (a<b?a:b) a/3 sqrt(a) rsqrt(a) exp(a) exp2(a) exp10(a) expm1(a) log(a) log2(a) log10(a)
    log1p(a) sin(a) cos(a) tan(a) sinpi(a) asin(a) atan(a) sinh(a) tanh(a) erf(a) erfinv(a) cbrt(a)
    floor(a) ceil(a) trunc(a) rint(a) round(a) fabs(a) tgamma(a) lgamma(a) normcdf(a) pow(a,b) fmod(a,b)
    fmin(a,b) fmax(a,b) atan2(a,b) hypot(a,b) copysign(a,b) fma(a,b,c) ldexp(a,3) ilogb(a) llrint(a)
    llround(a)
"""
FLOAT = """
    __fadd_rz(a,b) __fmul_ru(a,b) __fdiv_rd(a,b) __fsub_rn(a,b) __frcp_rz(a) __fsqrt_ru(a)
    __fmaf_rd(a,b,c) __float2int_rn(a) __float2uint_ru(a) __float2ll_rd(a) __float2ull_rz(a)
    __int2float_rz(i32(a)) __sinf(a) __cosf(a) __tanf(a) __expf(a) __exp10f(a) __logf(a) __log2f(a)
    __saturatef(a) __frsqrt_rn(a) __fdividef(a,b) __powf(a,b) __float_as_int(a) __int_as_float(i32(a))
"""
DOUBLE = """
    __dadd_rz(a,b) __dmul_ru(a,b) __ddiv_rd(a,b) __drcp_rz(a) __dsqrt_ru(a) __fma_rd(a,b,c)
    __double2int_rn(a) __double2ull_rz(a) __double2float_rz(a) __double_as_longlong(a) __double2hiint(a)
    __hiloint2double(i32(a),i32(b))
"""
HALF = """
    __hadd(a,b) __hsub(a,b) __hmul(a,b) __hdiv(a,b) __hmax(a,b) __hmin(a,b) __hmax_nan(a,b)
    __hadd_sat(a,b) __hlt(a,b) __hgeu(a,b) __hisnan(a) __habs(a) __hneg(a) hsqrt(a) hrsqrt(a) hrcp(a)
    hexp(a) hexp2(a) hexp10(a) hlog(a) hlog2(a) hsin(a) htanh(a) hfloor(a) hceil(a) hrint(a) a+b*c a/b
    (a<b?a:b)
"""
HALF_FUSED = "__hfma(a,b,c) __hfma_relu(a,b,c) __hfma_sat(a,b,c)"
PAIR = """
    __hadd2(a,b) __hsub2(a,b) __hmul2(a,b) __h2div(a,b) __hmax2(a,b) __heq2(a,b) __hltu2(a,b) __habs2(a)
    __hneg2(a) h2sqrt(a) h2exp(a) h2log2(a) h2sin(a) h2tanh(a) h2rint(a) __hisnan2(a)
    __lowhigh2highlow(a)
"""
PAIR_FUSED = "__hfma2(a,b,c) __hfma2_relu(a,b,c) __hcmadd(a,b,c)"
MASKS = "__hbeq2(a,b) __hbgeu2(a,b) __heq2_mask(a,b) __hltu2_mask(a,b)"

CONVERSIONS = """
extern "C" __global__ void conversions(float* f, h16* h, b16* b, i32* n, i64* l, double* d) {
    int i = threadIdx.x;
    h[i] = __float2half_rz(f[i]);
    h[i + 32] = __double2half(d[i]);
    h[i + 64] = __int2half_rd(n[i]);
    h[i + 96] = __ll2half_ru(l[i]);
    b[i] = __float2bfloat16_rn(f[i]);
    b[i + 32] = __double2bfloat16(d[i]);
    b[i + 64] = __int2bfloat16_rn(n[i]);
    n[i] = __half2int_rd(h[i]);
    l[i] = __bfloat162ll_rz(b[i]);
    n[i + 32] = __half2uint_ru(h[i]);
    ((h32*)h)[i + 128] = __floats2half2_rn(f[i], f[i + 1]);
    ((b32*)b)[i + 128] = __floats2bfloat162_rn(f[i], f[i + 1]);
    ((float2*)f)[i + 64] = __half22float2(((h32*)h)[i]);
    f[i + 256] = float(__nv_fp8_e4m3(f[i]));
    h[i + 512] = h16(__nv_fp8_e5m2(h[i]));
    ((__nv_fp8x2_e4m3*)n)[i] = __nv_fp8x2_e4m3(((float2*)f)[i]);
    asm("{.reg .u32 t; add.cc.u32 t, %1, %1; addc.u32 %0, t, 0;}" : "=r"(n[i + 64]) : "r"(n[i]));
    asm("{.reg .b16 x, y; mov.b32 {x, y}, %1; mov.b32 %0, {y, x};}" : "=r"(n[i + 96]) : "r"(n[i]));
    asm("lop3.b32 %0, %1, %1, %1, 0xE8;" : "=r"(n[i + 128]) : "r"(n[i]));
    asm("bfe.s32 %0, %1, 3, 4;" : "=r"(n[i + 160]) : "r"(n[i]));
}
"""


def kernel(name: str, type_: str, result: str, expressions: str) -> str:
    stores = "".join(f"  o[i + {n} * 32] = ({result})({e});\n" for n, e in enumerate(expressions.split()))
    return (
        f'extern "C" __global__ void {name}(const {type_}* x, {result}* o) {{\n  int i = threadIdx.x;\n'
        f"  {type_} a = x[i], b = x[i + 32], c = x[i + 64];\n{stores}}}\n"
    )


def source(arch: str) -> str:
    """sm_75 has no bf16 multiply-add, and the header no stand-in for it."""
    parts = [HEAD, CONVERSIONS, kernel("ints", "i32", "i64", INT)]
    parts += [kernel(f"integer_{t}", t, t, INTEGER) for t in INTEGER_TYPES]
    parts += [kernel(f"functions_{t}", t, t, FLOATING) for t in ("float", "double")]
    parts += [kernel("of_float", "float", "float", FLOAT), kernel("of_double", "double", "double", DOUBLE)]
    for half, pair in (("h16", "h32"), ("b16", "b32")):
        fused = half == "h16" or arch != "sm_75"
        parts.append(kernel(f"half_{half}", half, half, HALF + " " + HALF_FUSED * fused))
        parts.append(kernel(f"pair_{half}", pair, pair, PAIR + " " + PAIR_FUSED * fused))
        parts.append(kernel(f"mask_{half}", pair, "u32", MASKS))
    parts += [kernel(f"{a}_to_{b}", a, b, "a") for a in TYPES for b in (*TYPES, "bool")]
    return "".join(parts)
