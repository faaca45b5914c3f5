"""`moehive demo`: a small chat model on a real cluster of one machine, with nothing to set up."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Json, Nodes, StateDir
from .process import prepare

if TYPE_CHECKING:
    from moehive.client import Client

    from ..demo.build import Report

CHAT_TEMPERATURE = 0.0  # a model of 135M parameters drifts when it is left more freedom


def demo(
    state_dir: StateDir,
    prompt: Annotated[str | None, typer.Option(help="Ask this and end.", show_default="chat in the terminal")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.")
    ] = CHAT_TEMPERATURE,
    nodes: Nodes = 3,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Only build the demo model, anew.")] = False,
    as_json: Json = False,
) -> None:
    """Runs a small chat model on a real cluster of this machine: a coordinator and three expert nodes.

    The model is SmolLM2-135M-Instruct, made into a mixture of experts at first use (half a minute, 1.1 GB of disk).
    It knows what a 135M model knows. With --prompt and --json, the last line is one JSON object.
    """
    if as_json and prompt is None and not rebuild:
        raise typer.BadParameter("--json needs --prompt.")
    from ..demo.build import build

    begun = monotonic()
    prepare(verbose=False)
    model = state_dir / "demo" / "smollm2-135m-moe"
    with _progress() as report:
        build(model, report, rebuild)
    if rebuild:
        print(json.dumps({"model": str(model)}) if as_json else f"The demo model is in {model}.")
        return

    print(f"Starting a coordinator and {nodes} expert nodes …", file=sys.stderr)
    from moehive.proto.ending import end_now

    from ..local_cluster import folder_name
    from .background import running_cluster

    base = state_dir / "up" / folder_name(str(model), nodes)
    with running_cluster(str(model), base, nodes, 0, 0) as cluster:
        from moehive.client import Client

        from .talk import HELP, converse

        seconds = monotonic() - begun
        with Client(f"127.0.0.1:{cluster.coordinator.grpc_port}") as client:
            if prompt is None:
                print(f"Ready after {seconds:.1f} s. {HELP}", file=sys.stderr)
                converse(client, max_tokens, temperature)
            else:
                _answer(client, prompt, max_tokens, temperature, seconds, as_json)
    end_now()


def _answer(
    client: "Client", prompt: str, max_tokens: int, temperature: float, start_seconds: float, as_json: bool
) -> None:
    before = {node.name: node for node in client.status().nodes}
    answer = client.generate(
        messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens, temperature=temperature
    )
    after = client.status().nodes
    worked = {node.name: node.compute_ns - before[node.name].compute_ns for node in after}
    all_work = max(1, sum(worked.values()))
    nodes = [
        {
            "name": node.name,
            "experts": node.experts_held,
            "expert_calls": node.expert_calls - before[node.name].expert_calls,
            "time_share": worked[node.name] / all_work,  # of the time that all nodes computed
        }
        for node in after
    ]
    usage = answer.usage
    # Decoding: the first token belongs to the prompt. An answer of one token has nothing else.
    steps, seconds = usage.completion_tokens - 1, usage.decode_seconds
    if steps < 1 or seconds <= 0:
        steps, seconds = usage.completion_tokens, usage.prompt_seconds + usage.decode_seconds
    rate = steps / seconds if seconds > 0 else 0.0
    if as_json:
        result = {
            "text": answer.text,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "tokens_per_s": rate,
            "nodes": nodes,
            "start_seconds": start_seconds,
        }
        print(json.dumps(result), flush=True)
        return
    print(answer.text)
    shares = ", ".join(f"{node['name']} {node['time_share']:.0%}" for node in nodes)
    print(
        f"{usage.completion_tokens} tokens, {rate:.1f} tokens/s; ready after {start_seconds:.1f} s. Time of the "
        f"experts: {shares}.",
        file=sys.stderr,
    )


@contextmanager
def _progress() -> "Iterator[Report]":
    """A progress bar on a terminal, else a line for each stage; nothing when there is nothing to build."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage, done: print(f"{done:4.0%}  {stage}", file=sys.stderr, flush=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("The demo model", total=1.0)
        yield lambda stage, done: progress.update(task, description=stage, completed=done)
