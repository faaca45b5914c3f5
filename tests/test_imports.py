"""Who may import whom, read from the sources. A part that is not written in the table may import nothing of ours."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("coordinator", "expert_node", "kernels", "proto")

# part → what it may import of ours, besides itself. A part is a top-level folder; `proto/client`, which installs as
# moehive.client; or a folder or file of coordinator/.
COMMON = (
    "coordinator.types",
    "coordinator.settings",
    "coordinator.timeline",
    "coordinator.changes",
    "coordinator.whole_file",
    "coordinator.regular_file",
    "coordinator.sizes",
    "kernels.library",
    "kernels.geometry",
    "kernels.machine",
)  # for all of coordinator/
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "proto": (),
    "client": ("proto",),
    "expert_node": ("kernels", "proto"),
    "coordinator.types": ("kernels.geometry",),
    "coordinator.settings": COMMON,
    "coordinator.timeline": ("coordinator.whole_file",),
    "coordinator.whole_file": (),
    "coordinator.regular_file": ("coordinator.types",),
    "coordinator.changes": (),
    "coordinator.sizes": (),
    "coordinator.cli": (
        *COMMON,
        "coordinator.app",
        "coordinator.local_cluster",
        "coordinator.serving",
        "coordinator.cluster",
        "coordinator.checkpoints",
        "coordinator.demo",
        "coordinator.placement",
        "coordinator.dispatch.statistics",  # the file that `moehive trace` reads
        "coordinator.precision",
        "coordinator.trunk",
        "coordinator.bench",
        "client",
        "proto",
        "coordinator.estimate",
    ),
    "coordinator.app": ("coordinator", "kernels", "proto"),  # wires the parts together
    "coordinator.trunk": (*COMMON, "coordinator.checkpoints", "coordinator.models", "kernels"),
    "coordinator.traffic": (*COMMON, "coordinator.dispatch", "coordinator.placement"),
    "coordinator.known_nodes": (
        *COMMON,
        "coordinator.cluster",
        "coordinator.dispatch",
        "coordinator.placement",
        "coordinator.serving",
    ),
    "coordinator.follower": (*COMMON, "coordinator.cluster", "coordinator.dispatch", "kernels", "proto"),
    "coordinator.local_cluster": (*COMMON, "coordinator.app", "coordinator.cluster"),  # and node processes
    "coordinator.public_doors": (*COMMON, "coordinator.serving", "coordinator.cluster", "proto"),
    "coordinator.bench": ("coordinator", "client", "kernels", "proto"),  # measures any of them
    "coordinator.demo": (*COMMON, "coordinator.checkpoints", "kernels"),
    "coordinator.serving": (*COMMON, "coordinator.engine", "proto"),
    "coordinator.engine": (*COMMON, "coordinator.models", "coordinator.dispatch"),
    "coordinator.models": (*COMMON, "kernels"),
    "coordinator.dispatch": (*COMMON, "kernels", "proto"),
    "coordinator.cluster": (
        *COMMON,
        "coordinator.placement",
        "coordinator.checkpoints",
        "kernels.manifest",  # the geometry's bytes on the wire
        "proto",
    ),
    "coordinator.checkpoints": (*COMMON, "coordinator.models.tensors", "kernels", "proto"),
    "coordinator.placement": COMMON,
    "coordinator.precision": (*COMMON, "coordinator.models", "kernels"),
    "coordinator.estimate": (*COMMON, "coordinator.checkpoints", "kernels.speed"),  # the latter inside functions
}
# part → packages of others that it must not import, even inside a function.
MUST_NOT_IMPORT = {
    "client": ("torch", "transformers", "numpy"),
    "coordinator.placement": ("torch", "grpc"),
    "coordinator.models": ("grpc",),  # a model awaits an ExpertBackend and never sees the network
    "kernels": ("grpc",),
}
# The only modules that touch generated protobuf classes: what lies behind them uses our own types.
TOUCH_MESSAGES = {
    "proto/wire/methods.py",
    "coordinator/bench/experts.py",
    "coordinator/bench/rounding.py",
    "coordinator/checkpoints/slices.py",
    "coordinator/cluster/server.py",
    "coordinator/cluster/service.py",
    "coordinator/dispatch/chain.py",
    "coordinator/dispatch/link.py",
    "coordinator/dispatch/parts.py",
    "coordinator/dispatch/star.py",
    "coordinator/dispatch/tiers.py",
    "coordinator/serving/grpc_api.py",
    "coordinator/serving/grpc_messages.py",
    "expert_node/agent.py",
    "expert_node/bench_node.py",
    "expert_node/chain.py",
    "expert_node/download.py",
    "expert_node/fetch.py",
    "expert_node/identity.py",
    "expert_node/node.py",
    "expert_node/peers.py",
    "expert_node/service.py",
    "expert_node/sources.py",
    "expert_node/uplink.py",
    "proto/bounds.py",
    "proto/chain.py",
    "proto/chunks.py",
    "proto/client/client.py",
    "proto/client/messages.py",
    "proto/tensors.py",
    "proto/tiers.py",
}
# module → heavy packages that importing it must not bring in, directly or through others.
LIGHT = {
    "moehive.client": ("torch", "transformers", "numpy", "fastapi"),
    "moehive.coordinator.cli.main": ("torch", "transformers", "triton", "fastapi"),
    "moehive.coordinator.app": ("transformers.modeling_utils", "torch._dynamo", "torch.distributed.tensor"),
    "moehive.coordinator.checkpoints.hub": ("torch", "transformers"),
    "moehive.coordinator.placement.place": ("torch", "grpc"),
    "moehive.coordinator.estimate.estimate": ("torch", "transformers", "grpc"),
}


class Import(NamedTuple):
    """One imported name, as its installed path without `moehive.`, or as written when it is not ours."""

    file: Path
    line: int
    target: str
    ours: bool
    relative: bool
    lazy: bool  # inside a function

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.target}"


def module_path(file: Path) -> list[str]:
    """`coordinator/engine/engine.py` → [coordinator, engine, engine]; proto/client is [client]."""
    path = list(file.relative_to(ROOT).with_suffix("").parts)
    return path[1:] if path[:2] == ["proto", "client"] else path


def part_of(path: list[str]) -> str:
    return ".".join(path[:2]) if path[0] == "coordinator" else path[0]


def module_name(file: Path) -> str:
    return ".".join(module_path(file)).removesuffix(".__init__")


def statements(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below, with whether they lie inside a function."""
    for child in ast.iter_child_nodes(node):
        yield child, lazy
        yield from statements(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def imports_of(file: Path) -> Iterator[Import]:
    package = module_path(file)[:-1]
    for node, lazy in statements(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name.removeprefix("moehive.")
                yield Import(file, node.lineno, name, name != alias.name, False, lazy)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if node.level:
                    base = package[: len(package) - node.level + 1]
                    inner = node.module.split(".") if node.module else []
                    yield Import(file, node.lineno, ".".join([*base, *inner, alias.name]), True, True, lazy)
                else:
                    name = f"{node.module}.{alias.name}"
                    ours = name.startswith("moehive.")
                    yield Import(file, node.lineno, name.removeprefix("moehive."), ours, False, lazy)


def sources(*folders: str) -> list[Path]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [file for file in files if "_pb2" not in file.name]


ALL = [found for file in sources(*FOLDERS) for found in imports_of(file)]


def under(target: str, allowed: str) -> bool:
    return target == allowed or target.startswith(allowed + ".")


def test_the_sources_are_found() -> None:
    assert {part_of(module_path(found.file)) for found in ALL if found.ours} >= {
        "expert_node",
        "coordinator.dispatch",
    }


def test_each_part_imports_only_what_the_table_allows() -> None:
    wrong = []
    for found in ALL:
        part = part_of(module_path(found.file))
        allowed = (part, *MAY_IMPORT.get(part, ()))
        if found.ours and not any(under(found.target, name) for name in allowed):
            wrong.append(f"{found}; {part} may import: {', '.join(allowed)}")
    assert not wrong, "Against MAY_IMPORT (move the code, or a parameter, rather than the rule):\n" + "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    # Those for type checkers alone count, too: who reads one file of a circle has to read them all.
    imported: dict[str, set[str]] = {module_name(file): set() for file in sources(*FOLDERS)}
    for found in ALL:
        target = found.target
        while target and target not in imported:  # it names something in a module
            target = target.rpartition(".")[0]
        if found.ours and not found.lazy and target:
            imported[module_name(found.file)].add(target)
    assert {"proto.wire.stream", "proto.wire.frames"} <= imported["proto.wire.connection"]
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        circle = " imports ".join(reversed(error.args[1]))
        raise AssertionError(f"Move what both need to a file of its own: {circle}") from None


def test_native_code_includes_only_what_the_table_allows() -> None:
    files = [file for folder in FOLDERS for end in ("*.h", "*.cc") for file in (ROOT / folder).rglob(end)]
    wrong, seen = [], set()
    for file in files:
        part = part_of(list(file.relative_to(ROOT).parts))
        for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE):
            target = (file.parent / name).resolve().relative_to(ROOT)
            other = part_of(list(target.parts))
            seen.add((part, other))
            if other not in (part, *MAY_IMPORT.get(part, ())):
                wrong.append(f"{file.relative_to(ROOT)} includes {target}")
    assert ("coordinator.dispatch", "proto") in seen
    assert not wrong, "Against MAY_IMPORT:\n" + "\n".join(wrong)


def test_every_part_is_in_the_table() -> None:
    parts = {part_of(module_path(file)) for file in sources(*FOLDERS)}
    assert parts <= MAY_IMPORT.keys(), f"say in MAY_IMPORT what these may import: {parts - MAY_IMPORT.keys()}"


def test_packages_that_a_part_must_not_import() -> None:
    wrong = [
        str(found)
        for found in ALL
        for package in MUST_NOT_IMPORT.get(part_of(module_path(found.file)), ())
        if not found.ours and under(found.target, package)
    ]
    assert not wrong, "Against MUST_NOT_IMPORT:\n" + "\n".join(wrong)


def test_generated_messages_stop_at_the_named_modules() -> None:
    touching = {str(found.file.relative_to(ROOT)) for found in ALL if found.ours and "_pb2" in found.target}
    new = sorted(touching - TOUCH_MESSAGES)
    assert not new, f"translate at the border, or add these to TOUCH_MESSAGES: {new}"


def test_relative_inside_a_folder_and_by_full_name_across() -> None:
    wrong = []
    for found in ALL:
        folder = module_path(found.file)[0]
        if found.ours and found.relative != under(found.target, folder):
            wrong.append(f"{found}: write it {'with' if found.relative else 'without'} moehive.")
    assert not wrong, "A module must have one name, for type checkers too:\n" + "\n".join(wrong)


def test_no_bare_folder_names() -> None:
    everywhere = ALL + [found for file in sources("tests") for found in imports_of(file)]
    wrong = [
        str(found) for found in everywhere if not found.ours and found.target.split(".")[0] in (*FOLDERS, "tests")
    ]
    assert not wrong, "These names belong to other distributions; write moehive.…:\n" + "\n".join(wrong)


def test_proto_and_kernels_are_no_packages() -> None:
    # With an __init__.py, a process started in the repository would import them instead of proto-plus and the
    # `kernels` package that transformers looks for.
    assert not (ROOT / "proto" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_stay_light(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {LIGHT[module]!r} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=60)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [], f"{module} imports {found.stdout.split()}: import them where they are used"


def test_every_test_folder_is_run() -> None:
    # pyproject.toml names the folders one by one, so that the quickest checks come first.
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"]
    there = {str(file.relative_to(ROOT)) for file in ROOT.glob("tests/test_*.py")}
    there |= {
        f"tests/{file.relative_to(ROOT / 'tests').parts[0]}" for file in (ROOT / "tests").glob("*/**/test_*.py")
    }
    assert there == {path for path in listed if path in there}, f"add to testpaths: {sorted(there - set(listed))}"
