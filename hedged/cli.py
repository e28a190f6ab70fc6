"""The command line. Each command lives in hedged/commands and imports what it needs when it runs.

Exit codes: 0 done · 1 something you can mend, said on stderr · 2 wrong usage · 3 of recalibrate: it
would not be better, and was not written · 75 interrupted, run the same command again to go on.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from hedged.commands import (
    activate,
    alerting,
    compare,
    control,
    demo,
    evaluate,
    fit,
    inspect,
    keys,
    labels,
    ledger,
    monitor,
    recalibrate,
    score,
    serve,
    sign,
)
from posthoc.contract import HedgedError

EXTRA = ("onnx", "onnxscript", "plotly", "torch")  # what serving does without

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Honest error bars for a model that is already deployed, without retraining it.",
)
app.command("demo")(demo.demo)
app.command("fit")(fit.fit)
app.command("compare")(compare.compare)
app.command("evaluate")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("verify")(inspect.verify)
app.command("sign")(sign.sign)
app.command("modules")(inspect.modules)
app.command("serve")(serve.serve)
app.command("activate")(activate.activate)
app.command("keys")(keys.keys)
app.command("labels")(labels.labels)
app.command("ledger")(ledger.ledger)
app.command("monitor")(monitor.monitor)
app.command("alerting")(alerting.alerting)
app.command("recalibrate")(recalibrate.recalibrate)
app.command("score")(score.score)
app.command("control")(control.control)


def show_version(asked: bool) -> None:
    """Print the version and stop."""
    if asked:
        from hedged import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main_options(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file of defaults: a table per command, e.g. [fit] method = 'none'"),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=show_version,
            is_eager=True,
            allow_from_autoenv=False,
            help="Print the version",
        ),
    ] = False,
) -> None:
    """Read the configuration file; flags and HEDGED_<COMMAND>_<OPTION> come before it."""
    del version
    if context.invoked_subcommand is not None:
        check_variables(context.command, context.invoked_subcommand)
    if config is not None:
        context.default_map = read_config(config, context.command)


def check_variables(group: Any, command: str) -> None:
    """HedgedError for a variable HEDGED_<COMMAND>_… that is no option of this command, naming it:
    a misspelt one would be ignored."""
    found, prefix = group.commands.get(command), f"HEDGED_{command.upper()}_"
    if found is None:
        return
    known = {prefix + p.name.upper() for p in found.params if p.name}
    given = (name for name in os.environ if name.startswith(prefix))
    if unknown := sorted(name for name in given if name not in known):
        raise HedgedError(
            f"hedged {command} has no option for the variable {', '.join(unknown)}; it reads "
            f"{', '.join(sorted(known))}"
        )


def read_config(path: Path, group: Any) -> dict[str, Any]:
    """Defaults by command from TOML; HedgedError for an unknown command or option, naming it."""
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as e:
        raise HedgedError(f"--config {path}: {e}") from None
    commands = getattr(group, "commands", {})
    for command, table in tables.items():
        if command not in commands:
            raise HedgedError(f"--config {path}: no command {command!r}; {', '.join(commands)}")
        known = {p.name: p for p in commands[command].params}
        for key, value in table.items():
            if key not in known:
                raise HedgedError(
                    f"--config {path}: hedged {command} has no option {key!r}; "
                    f"it has {', '.join(sorted(k for k in known if k))}"
                )
            if getattr(known[key], "multiple", False) and not isinstance(value, list):
                table[key] = [value]  # one of what may be repeated
    return tables


def main() -> None:
    """Run the command line; errors that a user can mend are one line on stderr."""
    try:
        app(prog_name="hedged", auto_envvar_prefix="HEDGED")
    except HedgedError as e:
        print(f"hedged: {e}", file=sys.stderr)
        raise SystemExit(getattr(e, "exit_code", 1)) from None
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] not in EXTRA:
            raise
        print(f"hedged: this needs {e.name}: pip install 'hedged[fit]'", file=sys.stderr)
        raise SystemExit(1) from None
