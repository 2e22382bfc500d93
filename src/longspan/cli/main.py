"""The `longspan` command: the list of its subcommands, and the conversion of errors to one line and an exit code.

Each command is a module of its own, which imports the engine only when the command runs.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from longspan.cli import (
    bench,
    bench_kernels,
    bench_schedules,
    bench_serve,
    calibrate,
    explain,
    generate,
    plan,
    predict,
    route,
    serve,
    simulate,
)
from longspan.cli.options import takes_records
from longspan.cli.vllm_flags import ServeCommand
from longspan.errors import LongspanError
from longspan.version import __version__

_USAGE, _INTERRUPTED = 2, 130
# typer may use its own copy of click, so the class is taken from typer's
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_NO_ARGUMENTS = "NoArgsIsHelpError"  # a usage error whose message is a command's help; typer does not export the class


def _show_version(asked: bool) -> None:
    if asked:
        print(f"longspan {__version__}")
        raise typer.Exit


def build_app() -> typer.Typer:
    """The application with all commands."""
    app = typer.Typer(
        name="longspan",
        help="Long-context LLM inference in which the sequence is the sharded dimension.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    app.command("generate", help="Complete one prompt.")(takes_records(generate.generate))
    app.command("explain", help="Estimate each schedule for one step, and show the choice.")(
        takes_records(explain.explain)
    )
    app.command("plan", help="Compare all layouts of a model on given hardware.")(takes_records(plan.plan))
    app.command("predict", help="Predict a published measurement.")(predict.predict)
    app.command("simulate", help="Replay a trace on a simulated cluster.")(simulate.simulate)
    app.command("calibrate", help="Measure this machine's constants for plan and simulate.")(calibrate.calibrate)
    app.command("serve", cls=ServeCommand, help="Serve a model over the OpenAI API.")(takes_records(serve.serve))
    app.command("route", help="Route requests to prefill and decode instances.")(takes_records(route.route))
    benches = typer.Typer(help="Benchmarks.", no_args_is_help=True, rich_markup_mode=None)
    benches.command("latency", help="Prefill and decode rates of one batch.")(takes_records(bench.latency))
    benches.command("throughput", help="Continuous batching under load.")(takes_records(bench.throughput))
    benches.command("mixed", help="Short chats and long contexts together.")(takes_records(bench.mixed))
    benches.command("scheduler", help="Time of the scheduler for a step, without a model.")(bench.scheduler)
    benches.command("schedules", help="All schedules on the same workloads.")(bench_schedules.schedules)
    benches.command("attention", help="Attention kernels, compared with the device's limits.")(
        bench_kernels.attention_kernel
    )
    benches.command("merge", help="Merge of attention states, compared likewise.")(bench_kernels.merge)
    benches.command("kv-write", help="Writes to the KV cache, compared likewise.")(bench_kernels.kv_write)
    benches.command("moe", help="Experts of a mixture, compared likewise.")(bench_kernels.moe)
    benches.command("linear", help="Matrix products, compared likewise.")(bench_kernels.linear)
    benches.command("serve", help="Any OpenAI-compatible server under load.")(bench_serve.serve)
    app.add_typer(benches, name="bench")
    return app


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """The options of `longspan` itself."""


def main() -> None:
    """Run the command line. Errors that a user can correct end with one line on stderr and exit code 2."""
    try:
        code = typer.main.get_command(build_app()).main(standalone_mode=False)
    except _UsageError as error:
        code = _fail(_usage_message(error)) if type(error).__name__ != _NO_ARGUMENTS else _help(error)
    except LongspanError as error:
        code = _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("longspan: interrupted", file=sys.stderr)
        code = _INTERRUPTED
    except BrokenPipeError:  # the reader of stdout has ended, as in `longspan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code or 0)


def _usage_message(error: Any) -> str:
    """The message of a usage error, with the given value and the command whose `--help` to read.

    typer leaves the value out of some messages; then `__cause__` has it.
    """
    message = error.format_message().rstrip(".")
    details = error.__cause__.errors() if hasattr(error.__cause__, "errors") else []
    given = f", {details[0]['input']!r} given" if details else ""
    command = error.ctx.command_path if error.ctx else "longspan"
    return f"{message}{given}; see {command} --help"


def _help(error: Any) -> int:
    print(error.format_message(), file=sys.stderr)
    return _USAGE


def _fail(message: str) -> int:
    print(f"longspan: error: {' '.join(message.split())}", file=sys.stderr)
    return _USAGE
