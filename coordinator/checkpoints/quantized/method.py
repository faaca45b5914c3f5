"""Which quantization a checkpoint's config names, as far as its tensors don't say it themselves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...types import CoordinatorError

KNOWN = ("fp8", "gptq", "awq", "auto-round", "compressed-tensors", "mxfp4")
_REFUSED_FORMATS = ("marlin-24", "sparse-bitmask", "sparse-24-bitmask", "nvfp4-pack-quantized",
                    "mxfp6-pack-quantized", "mxfp8-quantized")  # fmt: skip
_PLAIN_ZEROS = ("auto_round", "auto_round:gptqmodel")  # packings of auto-round, inference/backend.py


@dataclass(frozen=True, slots=True)
class Method:
    """What a config says of its quantized tensors."""

    name: str  # one of KNOWN
    awq: bool = False  # words of 8 codes lie as AWQ has them, else as GPTQ
    zeros_are_minus_one: bool = True  # of GPTQ's first version, and of auto-round where it packs as that does
    block: tuple[int, int] = (128, 128)  # FP8 numbers that share a scale


def method_of(path: Path, config: dict[str, Any]) -> Method | None:
    """The method of a directory's config.json, which may keep it with its text part; None: it isn't quantized.

    Raises CoordinatorError, which names the method, for one that is not read.
    """
    found = _section(config)
    if found is None and isinstance(config.get("text_config"), dict):
        found = _section(config["text_config"])
    if found is None:
        return None
    name = found.get("quant_method")
    if name not in KNOWN:
        raise CoordinatorError(
            f"{path} is quantized with {name if isinstance(name, str) else 'an unnamed method'}, which is not read;"
            f" known are {', '.join(KNOWN)}, GGUF files, and weights in bf16, f16 or f32."
        )
    packing = str(found.get("packing_format", "auto_round:auto_gptq"))
    if name in ("gptq", "awq", "auto-round"):
        bits = found.get("bits", found.get("w_bit", 4))
        if bits != 4:
            raise CoordinatorError(f"{path} is quantized with {name} in {str(bits)[:20]} bits; only 4 bits are read.")
    if name == "gptq" and found.get("desc_act") is True and not found.get("static_groups"):
        raise CoordinatorError(
            f"{path} orders its inputs by activation (desc_act), which kernels can't follow; use one that was"
            " quantized with desc_act = false."
        )
    if name == "awq" and found.get("version", "gemm") != "gemm":
        raise CoordinatorError(f"{path} holds AWQ in the layout {found['version']!r}; only gemm is read.")
    kind = str(found.get("format", ""))
    sparsity = found.get("sparsity_config")
    if name == "compressed-tensors" and (
        kind in _REFUSED_FORMATS or (isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense")
    ):
        shown = kind if kind in _REFUSED_FORMATS else f"sparse, {str(sparsity.get('format'))[:40]}"  # type: ignore[union-attr]
        raise CoordinatorError(
            f"{path} is in compressed-tensors' format {shown}, which is not read; use pack-quantized,"
            " int-quantized, float-quantized or mxfp4-pack-quantized."
        )
    return Method(
        name,
        awq=name == "awq" or "awq" in packing,
        zeros_are_minus_one=found.get("checkpoint_format") != "gptq_v2" and packing not in _PLAIN_ZEROS,
        block=_block(path, found),
    )


def _section(config: dict[str, Any]) -> dict[str, Any] | None:
    for key in ("quantization_config", "compression_config"):
        value = config.get(key)
        if isinstance(value, dict) and value:
            return value
    return None


def _block(path: Path, found: dict[str, Any]) -> tuple[int, int]:
    block = found.get("weight_block_size")
    if block is None:
        return (128, 128)
    sizes = isinstance(block, list) and len(block) == 2 and all(type(n) is int and 1 <= n <= 65_536 for n in block)
    if not sizes:
        raise CoordinatorError(f"{path} has a config with the weight_block_size {str(block)[:60]}, which cannot be.")
    return block[0], block[1]
