"""What the environment may decide: where a training runs, not what it computes.

Launchers name ranks, addresses, devices and threads by variables; accelerate reads settings of the training from there, too. Those
have keys in the configuration, and what a variable says must be what the key says. Variables of torch's libraries that
lower the precision and have no key are part of the recipe, as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from .schema import ConfigError, EngineConfig

NO = ("", "0", "n", "no", "f", "false", "off")

# Shorter products in place of float32's: matrix products on GPUs, all of cuBLAS and cuDNN, oneDNN on CPUs (by either name).
PRECISION = (
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
)

# Variable -> (what it may say, what to write in the configuration instead).
Rule = tuple[Callable[[str, EngineConfig], bool], str]


def _off(said: str, engine: EngineConfig) -> bool:
    return said.lower() in NO


RULES: dict[str, Rule] = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        lambda said, engine: said == str(engine.gradient_accumulation_steps),
        "engine.gradient_accumulation_steps",
    ),
    # `accelerate launch` says no where it was told nothing.
    "ACCELERATE_MIXED_PRECISION": (
        lambda said, engine: said.lower() in ("no", engine.mixed_precision),
        "engine.mixed_precision",
    ),
    "ACCELERATE_DYNAMO_BACKEND": (_off, "engine.compile=true"),
    "ACCELERATE_USE_FSDP": (_off, "engine.fsdp=true"),
    "ACCELERATE_USE_DEEPSPEED": (_off, "engine.fsdp=true"),
    "ACCELERATE_USE_MEGATRON_LM": (_off, "engine.fsdp=true"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (_off, "engine.fsdp=true"),
    "ACCELERATE_TORCH_DEVICE": (lambda said, engine: False, "engine.device or CUDA_VISIBLE_DEVICES"),
}


def check(engine: EngineConfig) -> None:
    """ConfigError for a variable that would train something else than the configuration says."""
    for name, (allowed, key) in RULES.items():
        said = os.environ.get(name)
        if said is not None and not allowed(said, engine):
            raise ConfigError(
                f"config: {key} must be set, not the environment's {name}={said!r}, which would not be in the recipe "
                "(accelerate's own configuration and the options of `accelerate launch` set such variables)"
            )


def fastest(engine: EngineConfig) -> str:
    """The mixed_precision that engine.precision=auto stands for on this machine."""
    import torch  # takes a second, which reading a configuration need not

    if engine.device == "auto" and torch.accelerator.is_available():
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        fast = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return "bf16" if fast else "no"


def precision() -> dict[str, str]:
    """The variables that lower the precision here, as they are set; most often none."""
    return {name: os.environ[name] for name in PRECISION if os.environ.get(name)}
