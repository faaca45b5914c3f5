"""The `moehive` command. Each command imports what it needs when it runs, so that `--help` comes at once."""

import faulthandler
import os
import sys
from typing import NoReturn

import typer

from moehive.proto.ending import end_now

from . import (
    bench,
    bench_budget,
    bench_chaos,
    bench_convert,
    bench_decode,
    bench_estimate,
    bench_faults,
    bench_fetch,
    bench_plan,
    bench_tiers,
    cluster,
    demo,
    estimate,
    models,
    packs,
    plan,
    serve,
    talk,
    trace,
    up,
)
from .errors import exit_code, sentence

app = typer.Typer(
    name="moehive",
    help="Pools the memory of several machines into one large mixture-of-experts (MoE) language model.",
    epilog="Start here: moehive demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys = typer.Typer(
    help="Makes, lists and revokes the API keys that clients on other machines need.", no_args_is_help=True
)

benches = typer.Typer(help="Measures Moehive on this machine.", no_args_is_help=True)

app.command("demo")(demo.demo)
app.command("up")(up.up)
app.command("chat")(talk.chat)
app.command("status")(talk.status)
app.command("init")(cluster.init)
app.command("coordinator")(serve.coordinator)
app.command(
    "node", context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False
)(serve.node)
app.command("plan")(plan.plan)
app.command("trace")(trace.trace)
app.command("token")(cluster.token)
app.command("estimate")(estimate.estimate)
app.command("pull")(models.pull)
app.command("models")(models.models)
app.command("convert")(packs.convert)
app.command("verify")(packs.verify)
app.add_typer(keys, name="key")
app.add_typer(benches, name="bench")
benches.command("load")(bench.load)
benches.command("fairness")(bench.fairness)
benches.command("experts")(bench.experts)
benches.command("hop")(bench.hop)
benches.command("trunk")(bench.trunk)
benches.command("tiers")(bench_tiers.tiers)
benches.command("fetch")(bench_fetch.fetch)
benches.command("plan")(bench_plan.plan)
benches.command("decode")(bench_decode.decode)
benches.command("chaos")(bench_chaos.chaos)
benches.command("faults")(bench_faults.faults)
benches.command("dispatch")(bench_chaos.dispatch)
benches.command("budget")(bench_budget.budget)
benches.command("convert")(bench_convert.convert)
benches.command("estimate")(bench_estimate.estimate)
keys.command("new")(cluster.new_key)
keys.command("list")(cluster.list_keys)
keys.command("revoke")(cluster.revoke_key)


def run() -> int:
    """Runs the command line. Exit codes: 1 failed, 2 wrong usage or settings, 130 interrupted."""
    try:
        app()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Exception as error:  # the last place where one can be put into words
        if os.environ.get("MOEHIVE_DEBUG"):
            raise
        print(f"moehive: {sentence(error)}", file=sys.stderr)
        return exit_code(error)
    return 0


def main() -> NoReturn:
    """Runs the command line and ends the process."""
    # A crash of native code leaves its place on stderr, and in the service's journal.
    faulthandler.enable(sys.__stderr__ or sys.stderr)
    end_now(run())


if __name__ == "__main__":
    main()
