"""Which quantization a checkpoint's config names, as far as its tensors don't say it themselves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from moehive.kernels.formats.int4_sources import StoredZeros

from ...types import CoordinatorError

KNOWN = ("fp8", "gptq", "awq", "auto-round", "compressed-tensors", "mxfp4")
_REFUSED_FORMATS = ("marlin-24", "sparse-bitmask", "sparse-24-bitmask", "nvfp4-pack-quantized",
                    "mxfp6-pack-quantized", "mxfp8-quantized")  # fmt: skip
_GPTQ_LAYOUTS = ("gptq", "gptq_v2")
_PLAIN_ZEROS = ("auto_round", "auto_round:gptqmodel")  # packings of auto-round, inference/backend.py

Packing: TypeAlias = Literal["gptq", "awq gemm", "awq gemv"]


@dataclass(frozen=True, slots=True)
class Method:
    """What a config says of its quantized tensors."""

    name: str  # one of KNOWN
    packing: Packing = "gptq"  # of words of 8 codes
    zeros: StoredZeros = "plain"  # of GPTQ's packing
    ordered: bool = False  # GPTQ's groups may be scattered over the columns
    group: int = -1  # columns that share a scale, where shapes don't say it; -1: all
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
    if name in ("gptq", "awq", "auto-round"):
        _check_bits(path, name, found)
    layout = str(found.get("checkpoint_format") or found.get("format") or "gptq")
    if name == "gptq" and layout not in _GPTQ_LAYOUTS:
        raise CoordinatorError(
            f"{path} holds GPTQ in the layout {layout[:40]!r}, which is not read; use one that was saved as gptq or"
            " gptq_v2."
        )
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
        packing=_packing(path, name, found),
        zeros=_zeros(name, layout, found),
        ordered=name == "gptq" and _is_ordered(found),
        group=_group(found),
        block=_block(path, found),
    )


def _check_bits(path: Path, name: str, found: dict[str, Any]) -> None:
    """All matrices must have 4 bits: GPTQModel's `dynamic` gives some of them others."""
    dynamic = found.get("dynamic")
    parts = [part for part in dynamic.values() if isinstance(part, dict)] if isinstance(dynamic, dict) else []
    for part in (found, *parts):
        bits = part.get("bits", part.get("w_bit", 4))
        if bits != 4:
            raise CoordinatorError(
                f"{path} is quantized with {name} in {str(bits)[:20]} bits; only 4 bits are read, so get it in 4, or"
                " convert the original with `moehive convert --format q8_0` or another."
            )


def _packing(path: Path, name: str, found: dict[str, Any]) -> Packing:
    if name == "auto-round":
        return "awq gemm" if "awq" in str(found.get("packing_format")) else "gptq"
    if name != "awq":
        return "gptq"
    layout = str(found.get("version") or found.get("checkpoint_format") or found.get("format") or "gemm").lower()
    if layout not in ("gemm", "gemv"):
        raise CoordinatorError(
            f"{path} holds AWQ in the layout {layout[:40]!r}, which is not read; use one that was saved as gemm or"
            " gemv."
        )
    return "awq gemv" if layout == "gemv" else "awq gemm"


def _zeros(name: str, layout: str, found: dict[str, Any]) -> StoredZeros:
    if name == "gptq":
        return "plain" if layout == "gptq_v2" else "less_one_by_word"
    return "plain" if found.get("packing_format", "auto_round:auto_gptq") in _PLAIN_ZEROS else "less_one"


def _is_ordered(found: dict[str, Any]) -> bool:
    """Whether columns were put into groups by activation. Static groups are put back where their columns lie."""
    meta = found.get("meta")
    static = found.get("static_groups") or (isinstance(meta, dict) and meta.get("static_groups"))
    return found.get("desc_act") is True and not static


def _group(found: dict[str, Any]) -> int:
    size = found.get("group_size", found.get("q_group_size", -1))
    return size if type(size) is int else -1


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
