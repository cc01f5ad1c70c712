"""Gluon, the language below Triton's: the one experimental part of Triton that the course uses, in one place.

Where Triton's compiler decides how a tile lies in registers, when it is copied and who waits for whom, a
Gluon program says so itself. It is under `triton.experimental` and names still change from one version to
the next; kernels take what they need from here, and find on import whether it is there:

    gluon.found      whether this Triton has Gluon for Hopper (3.6 and later have)
    gl               the language: tensors, layouts, shared memory, warp_specialize
    hopper           mbarriers, fences and WGMMA
    copy_in          the copy engine (TMA) from memory to shared memory, and
    copy_out         back
    TensorDescriptor what the copy engine is told of a tensor
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from llmcourse.kernels.language import MissingKernel


def _experimental() -> SimpleNamespace:
    """What Gluon offers, or stand-ins with which a kernel can be named and shown, and not launched."""
    try:
        from triton.experimental import gluon
        from triton.experimental.gluon import language
        from triton.experimental.gluon.language.nvidia import hopper
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    except ImportError:

        def jit(function: Any = None, **_: Any) -> Any:
            return MissingKernel if function is None else MissingKernel(function)

        absent = SimpleNamespace(constexpr=object)
        return SimpleNamespace(
            found=False, jit=jit, language=absent, hopper=None, copy_in=None, copy_out=None, descriptor=None
        )
    tma = hopper.tma
    return SimpleNamespace(
        found=True,
        jit=gluon.jit,
        language=language,
        hopper=hopper,
        copy_in=getattr(tma, "async_load", None) or tma.async_copy_global_to_shared,  # renamed in 3.8
        copy_out=getattr(tma, "async_store", None) or tma.async_copy_shared_to_global,
        descriptor=TensorDescriptor,
    )


gluon: Any = _experimental()
gl: Any = gluon.language
hopper: Any = gluon.hopper
copy_in: Any = gluon.copy_in
copy_out: Any = gluon.copy_out
TensorDescriptor: Any = gluon.descriptor
