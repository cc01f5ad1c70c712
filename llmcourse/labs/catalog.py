"""The labs by name. A lab's exercises are imported when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module

from llmcourse.errors import UnknownNameError
from llmcourse.grading.exercise import Exercise


@dataclass(frozen=True)
class Lab:
    """A lab: its notebook, the chapter it belongs to, and the modules that would be its answer.

    forbidden   modules that a submission cannot import while it is graded
    """

    number: str
    slug: str
    title: str
    forbidden: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"lab{self.number}_{self.slug}"

    @cached_property
    def exercises(self) -> tuple[Exercise, ...]:
        """The lab's exercises in order. Raises ModuleNotFoundError where submissions are graded."""
        return tuple(import_module(f"{__package__}.{self.name}").EXERCISES)

    @property
    def points(self) -> int:
        return sum(e.points for e in self.exercises)

    @property
    def minutes(self) -> int:
        return sum(e.minutes for e in self.exercises)

    def exercise(self, name: str) -> Exercise:
        """The exercise whose function is called `name`."""
        for e in self.exercises:
            if e.name == name:
                return e
        raise UnknownNameError(
            f"lab {self.number} has no exercise called {name!r}.",
            "An exercise is named by the function that you write.",
            f"one of {', '.join(e.name for e in self.exercises)}.",
        )


NUMPY_ONLY = (
    "torch",
    "scipy",
    "sklearn",
    "jax",
    "tensorflow",
    "autograd",
    "llmcourse.autograd",
    "llmcourse.plug",
)

SIMULATED = (*NUMPY_ONLY, "llmcourse.streams")

KERNELS = ("llmcourse.hardware", "llmcourse.kernels", "llmcourse.vgpu.corpus")

TRITON_ANSWERS = tuple(
    f"llmcourse.kernels.{name}"
    for name in (
        *("softmax", "softmax_cuda", "swiglu", "rms_norm", "add_rms_norm", "layer_norm", "cross_entropy"),
        *("matmul", "matmul_tiled", "matmul_launch", "matmul_persistent", "matmul_splitk", "matmul_fp8"),
        *("matmul_plan", "vector_add", "tensor_cores"),
    )
)
"""The package's own kernels; their counters stay, since a learner's cells use them."""

MODEL_ANSWERS = (
    "transformers",
    "torchtune",
    "flash_attn",
    "xformers",
    *(f"llmcourse.{name}" for name in ("models", "kernels", "engine", "plug", "train")),
)
"""Where a transformer's parts can be had ready-made. PyTorch's own attention gives no weights."""

FLASH_ANSWERS = (
    *("flash_attn", "xformers", "transformers", "llmcourse.models", "llmcourse.engine", "llmcourse.plug"),
    *("llmcourse.kernels.attention_reference", "llmcourse.kernels.attention_naive"),
    *(
        f"llmcourse.kernels.flash_{name}"
        for name in ("attention", "forward", "backward", "tiles", "plan", "hopper")
    ),
)
"""Tiled attention, ready-made."""

SUBQUADRATIC_ANSWERS = (*MODEL_ANSWERS, "scipy", "mamba_ssm", "fla")

ALIGNMENT_ANSWERS = (*MODEL_ANSWERS, "trl", "tokenizers", "sentencepiece", "tiktoken", "llmcourse.text")
"""Tokenizers, fine-tuning and alignment, ready-made."""

DISTRIBUTED_ANSWERS = (
    *("deepspeed", "megatron", "fairscale", "horovod"),
    *(f"llmcourse.{name}" for name in ("train", "plug")),
)
"""Collectives, parallel layers, schedules and compression, ready-made."""

QUANTIZATION_ANSWERS = (
    *("torchao", "bitsandbytes", "auto_gptq", "gptqmodel", "optimum", "transformers", "marlin"),
    *(f"llmcourse.{name}" for name in ("compress", "finetune", "models", "engine", "plug")),
    *(f"llmcourse.kernels.quant_{name}" for name in ("matmul", "plan", "unpack")),
)
"""Quantization and its kernels, ready-made."""

PRUNING_ANSWERS = (
    *MODEL_ANSWERS[:4],
    *(f"llmcourse.{name}" for name in ("models", "engine", "plug", "train", "compress", "finetune")),
    *(f"llmcourse.kernels.sparse24{part}" for part in ("", "_kernel", "_format", "_plan")),
)
"""Masks, updates and packed products, ready-made; the kernels' counters stay."""

DISTILLATION_ANSWERS = (*MODEL_ANSWERS, "llmcourse.compress", "trl")
"""Losses, chunked steps and acceptance rates, ready-made."""

LORA_ANSWERS = (*MODEL_ANSWERS, "peft", "llmcourse.finetune", "llmcourse.compress")
"""Adapters, and many of them in a batch, ready-made."""

LABS = (
    Lab("01", "backprop", "A reverse-mode engine", forbidden=NUMPY_ONLY),
    Lab("02", "activations_losses_optimizers", "What a training step is made of", forbidden=MODEL_ANSWERS),
    Lab("03", "gpu_architecture", "Threads, warps and blocks in CUDA C++", forbidden=KERNELS),
    Lab("04", "memory_hierarchy", "Memory traffic in CUDA C++, counted", forbidden=KERNELS),
    Lab("05", "triton_kernels", "Fused kernels in Triton, by the byte", forbidden=TRITON_ANSWERS),
    Lab("06", "streams_graphs_transfers", "Schedules, prefetching, capture", forbidden=SIMULATED),
    Lab("07", "transformer", "A decoder block for the real model", forbidden=MODEL_ANSWERS),
    Lab("08", "pretraining_to_rlhf", "From text to an aligned model", forbidden=ALIGNMENT_ANSWERS),
    Lab("09", "attention_variants", "Fewer keys and values", forbidden=MODEL_ANSWERS),
    Lab("10", "flash_attention", "FlashAttention, forward and backward", forbidden=FLASH_ANSWERS),
    Lab("11", "subquadratic", "Without the square", forbidden=SUBQUADRATIC_ANSWERS),
    Lab("12", "training_memory", "Training in little memory", forbidden=MODEL_ANSWERS),
    Lab("13", "distributed_training", "Many workers, few bytes", forbidden=DISTRIBUTED_ANSWERS),
    Lab("14", "quantization", "Weights in four bits", forbidden=QUANTIZATION_ANSWERS),
    Lab("15", "lora", "Corrections of low rank", forbidden=LORA_ANSWERS),
    Lab("17", "pruning", "Half of the weights, half of the bytes", forbidden=PRUNING_ANSWERS),
    Lab("16", "distillation", "A small model learns from a large one", forbidden=DISTILLATION_ANSWERS),
)


def find_lab(name: str) -> Lab:
    """The lab called `name`: its number (`1`, `01`, `lab01`), its slug or its full name."""
    wanted = name.removesuffix(".ipynb").lower()
    number = wanted.removeprefix("lab")
    for lab in LABS:
        if wanted in (lab.name, lab.slug) or (number.isdigit() and number.zfill(2) == lab.number):
            return lab
    raise UnknownNameError(
        f"there is no lab called {name!r}.",
        "A lab is named by its chapter's number or by its folder.",
        f"one of {', '.join(lab.name for lab in LABS)}.",
    )
