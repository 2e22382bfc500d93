"""The `longspan` command: its subcommands, and one place where errors become one line and an exit code.

It owns nothing else; each command is a module that imports the engine only when it runs.
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
# typer brings its own copy of click, or uses click's: either way, this
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"longspan {__version__}")
        raise typer.Exit


def build_app() -> typer.Typer:
    """All commands."""
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
    app.command("explain", help="What each schedule would take, and the choice.")(takes_records(explain.explain))
    app.command("plan", help="What every layout of a cluster will do.")(takes_records(plan.plan))
    app.command("predict", help="One measured setup, predicted.")(predict.predict)
    app.command("simulate", help="A trace on a cluster that is not there.")(simulate.simulate)
    app.command("calibrate", help="This machine's constants, for plan and simulate.")(calibrate.calibrate)
    app.command("serve", cls=ServeCommand, help="Serve a model over OpenAI's API.")(takes_records(serve.serve))
    app.command("route", help="One front for prefill and decode instances.")(takes_records(route.route))
    benches = typer.Typer(help="Measure on this machine.", no_args_is_help=True, rich_markup_mode=None)
    benches.command("latency", help="Prefill and decode rates of one batch.")(takes_records(bench.latency))
    benches.command("throughput", help="Continuous batching under load.")(takes_records(bench.throughput))
    benches.command("mixed", help="Short chats beside long contexts.")(takes_records(bench.mixed))
    benches.command("scheduler", help="The scheduler's own time a step, without a model.")(bench.scheduler)
    benches.command("schedules", help="Every schedule in the same situations.")(bench_schedules.schedules)
    benches.command("attention", help="Attention kernels, against what the device can do.")(
        bench_kernels.attention_kernel
    )
    benches.command("merge", help="Merging attention states, likewise.")(bench_kernels.merge)
    benches.command("kv-write", help="Writing the cache, likewise.")(bench_kernels.kv_write)
    benches.command("serve", help="Load on any OpenAI-compatible server.")(bench_serve.serve)
    app.add_typer(benches, name="bench")
    return app


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and end", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Those of `longspan` itself."""


def main() -> None:
    """Run the command line. Exit code 2 and one line on stderr for every error a user can mend."""
    try:
        code = typer.main.get_command(build_app()).main(standalone_mode=False)
    except _UsageError as error:
        code = _fail(_usage_message(error))
    except LongspanError as error:
        code = _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("longspan: interrupted", file=sys.stderr)
        code = _INTERRUPTED
    except BrokenPipeError:  # the reader of stdout has gone, as in `longspan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code or 0)


def _usage_message(error: Any) -> str:
    """Option, value and where to look; `__cause__` holds the value where typer's message leaves it out."""
    message = error.format_message()
    details = error.__cause__.errors() if hasattr(error.__cause__, "errors") else []
    given = f", {details[0]['input']!r} given" if details else ""
    command = error.ctx.command_path if error.ctx else "longspan"
    return f"{message}{given}; see {command} --help"


def _fail(message: str) -> int:
    print(f"longspan: error: {' '.join(message.split())}", file=sys.stderr)
    return _USAGE
