"""Builds the demo model: SmolLM2-135M-Instruct as a mixture of experts, by sparse upcycling.

Source: Komatsuzaki et al. 2022, "Sparse Upcycling" (arXiv:2212.05055). Every expert starts as the dense feed-forward
layer, here each with its neurons in an order of its own: the same function, other bytes. A Mixtral router picks two,
whose weights add up to 1, so the output is the dense model's whichever it picks. What is unusual: there is no
training after that. The result is a plain Mixtral checkpoint, as the hub has them.

    python -m moehive.coordinator.demo.build OUT

A build is made beside its final folder and renamed when it is complete, so a folder that is there is whole, and an
interrupted build is begun again.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..types import CoordinatorError
from . import package

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

VERSION = 1  # of what this file makes: another one makes an old build be replaced
EXPERTS = 6  # a layer; keeps the checkpoint at 1.07 GB
TOP_K = 2
LAYERS_A_SHARD = 5  # about 160 MB
DISK_BYTES = 1_150_000_000  # of a build, with some room
STAMP = "moehive_demo.json"
_KEPT = (  # of the dense model's configuration
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
CALIBRATION = Path(__file__).with_name("calibration.txt")

Report: TypeAlias = Callable[[str, float], None]  # what is being done, and how much of all is done (0 to 1)


def silent(_stage: str, _done: float) -> None:
    """A Report for callers that show nothing."""


def is_built(out: Path) -> bool:
    """Whether `out` is a complete build of this version."""
    try:
        stamp = json.loads((out / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(stamp, dict) and stamp.get("version") == VERSION


def build(out: Path, report: Report = silent, rebuild: bool = False) -> None:
    """Makes the checkpoint in the folder `out`, unless it is there; `rebuild` makes it anew in any case.

    Takes about 1.1 GB of disk and 1.5 GB of memory. Two builds of one folder wait for each other. Raises
    CoordinatorError when the weights can't be had, the disk is too full, or `out` is a folder of something else.
    """
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone(out, report):
            if is_built(out) and not rebuild:
                return
            if out.exists() and not (out / STAMP).exists():
                raise CoordinatorError(f"{out} is there and is no demo model; choose another folder or remove it.")
            partial = out.with_name(f".{out.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            _need_disk(out.parent)
            own = out.with_name("package")
            report("Looking for the weights", 0.0)
            path = package.find(own)
            if path is None:
                report(f"Fetching {package.REQUIREMENT} (98 MB)", 0.0)
                path = package.install(own)
            package.check(path)
            partial.mkdir()
            try:
                _write(path, partial, report)
                shutil.rmtree(out, ignore_errors=True)
                partial.rename(out)
                _sync(out.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            report("The demo model is built", 1.0)
    except OSError as error:
        raise CoordinatorError(f"The demo model could not be built in {out}: {error}.") from error


@contextmanager
def _alone(out: Path, report: Report) -> Iterator[None]:
    """Holds the lock on `out`; a lock ends with its process, so none is ever left behind."""
    with out.with_name(f".{out.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("Waiting for another build", 0.0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _need_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES:
        raise CoordinatorError(
            f"The demo model needs {DISK_BYTES / 1e9:.2f} GB in {folder}, which has {free / 1e9:.2f} GB left; free "
            "some space or choose another state directory."
        )


def _write(path: Path, folder: Path, report: Report) -> None:
    report("Loading torch and transformers", 0.02)
    import torch

    from . import dense, routers

    report("Reading the dense model", 0.2)
    tokenizer = dense.tokenizer(path)
    tokenizer.save_pretrained(folder)
    model = dense.dense_model(path)
    report("Reading the calibration text", 0.3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small operations: threads would only wait for one another
    try:
        inputs = routers.layer_inputs(model, tokenizer(CALIBRATION.read_text(encoding="utf-8")).input_ids)
        report("Fitting routers", 0.45)
        generator = torch.Generator().manual_seed(0)
        gates = [routers.fit_router(layer, EXPERTS, generator) for layer in inputs]
    finally:
        torch.set_num_threads(threads)
    del inputs
    _write_config(model, folder)
    weight_map: dict[str, str] = {}
    total = 0
    layers = len(model.model.layers)
    shards = [range(start, min(start + LAYERS_A_SHARD, layers)) for start in range(0, layers, LAYERS_A_SHARD)]
    for number, shard in enumerate(shards, start=1):
        report(f"Writing shard {number} of {len(shards)}", 0.5 + 0.5 * (number - 1) / len(shards))
        tensors: dict[str, torch.Tensor] = {}
        if number == 1:
            tensors["model.embed_tokens.weight"] = model.model.embed_tokens.weight
            tensors["model.norm.weight"] = model.model.norm.weight
        for layer in shard:
            tensors |= _layer_tensors(model, layer, gates[layer], generator)
        tensors = {key: value.to(torch.bfloat16).contiguous() for key, value in tensors.items()}
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(value.nbytes for value in tensors.values())
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    _write_json(folder / STAMP, {"version": VERSION, "source": package.REQUIREMENT, "sha256": package.FILE_SHA256})
    _sync(folder)


def _layer_tensors(
    model: "LlamaForCausalLM", layer: int, gate: "torch.Tensor", generator: "torch.Generator"
) -> dict[str, "torch.Tensor"]:
    """One layer under the names of Mixtral on the hub: w1 is gate_proj, w3 up_proj, w2 down_proj."""
    import torch

    block, prefix = model.model.layers[layer], f"model.layers.{layer}."
    tensors = {prefix + key: value for key, value in block.state_dict().items() if not key.startswith("mlp.")}
    tensors[f"{prefix}block_sparse_moe.gate.weight"] = gate
    w1, w3, w2 = (getattr(block.mlp, f"{part}_proj").weight.to(torch.bfloat16) for part in ("gate", "up", "down"))
    for expert in range(EXPERTS):
        order = torch.randperm(len(w1), generator=generator)
        name = f"{prefix}block_sparse_moe.experts.{expert}."
        tensors |= {f"{name}w1.weight": w1[order], f"{name}w3.weight": w3[order], f"{name}w2.weight": w2[:, order]}
    return tensors


def _write_config(model: "LlamaForCausalLM", folder: Path) -> None:
    from transformers import GenerationConfig, MixtralConfig

    c = model.config
    config = MixtralConfig(
        **{name: getattr(c, name) for name in _KEPT},
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        tie_word_embeddings=True,
        sliding_window=None,
        architectures=["MixtralForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=c.bos_token_id, eos_token_id=c.eos_token_id, pad_token_id=c.pad_token_id
    ).save_pretrained(folder)


def _write_shard(path: Path, tensors: dict[str, "torch.Tensor"]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    _sync(path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))
    _sync(path)


def _sync(path: Path) -> None:
    """Has the disk keep a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> int:
    """The command line of this module; returns its exit code."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m moehive.coordinator.demo.build OUT", file=sys.stderr)
        return 2
    try:
        build(Path(sys.argv[1]), lambda stage, done: print(f"{done:4.0%}  {stage}", file=sys.stderr))
    except CoordinatorError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
