"""The Typer app: sub-commands, --version, defaults from dmm.toml."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from . import __version__
from .commands import _options as options
from .commands import align, distill, evaluate, inspect, merge, record, run, similarity, synthesize
from .commands._run import drop, ended_by_sigterm, guard, out_of_memory
from .config import DEFAULT, load_config
from .errors import CheckFailed, DmmError, is_out_of_memory, printable
from .ranks import process_count
from .registry import mistyped
from .report.console import results_alone
from .trust import grant

COMMANDS = {
    "similarity": (similarity.similarity, similarity.EPILOG),
    "align": (align.align, align.EPILOG),
    "merge": (merge.merge, merge.EPILOG),
    "record": (record.record, record.EPILOG),
    "synthesize": (synthesize.synthesize, synthesize.EPILOG),
    "distill": (distill.distill, distill.EPILOG),
    "run": (run.run, run.EPILOG),
    "evaluate": (evaluate.evaluate, evaluate.EPILOG),
    "inspect": (inspect.inspect, inspect.EPILOG),
}

SHARED = ("merge", "synthesize", "distill")  # among the processes of torchrun


class Group(TyperGroup):
    """All commands; what is told before one of them runs, as help is, ends as their own words do."""

    def make_context(self, *args: Any, **extra: Any) -> typer.Context:
        with guard():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: typer.Context) -> Any:
        with guard():
            return super().invoke(ctx)

    def get_params(self, ctx: typer.Context) -> list[Any]:
        """All options; what is done in place of a command is said on the line, not with DMM_VERSION=1 elsewhere."""
        params = super().get_params(ctx)
        for param in params:
            if param.is_eager or not param.expose_value:
                param.allow_from_autoenv = False
        return params


app = typer.Typer(
    cls=Group,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "DMM", "help_option_names": ["-h", "--help"]},
)


class Command(TyperCommand):
    """A command that tells where a wrong value was said, if not on its line; SIGTERM ends it in order.

    Its result alone goes to stdout.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        options.require_paths(self.params, args)
        try:
            rest = super().parse_args(ctx, args)
            if not ctx.resilient_parsing:  # as completion does, of a line that is not whole
                options.require_numbers(ctx, self.params)
            return rest
        except typer.BadParameter as error:
            name = error.param.name if error.param else None
            place = _place(ctx, name) if name else None
            error.message += f" (from {place})" if place else ""
            raise

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            with ended_by_sigterm(), results_alone():
                return super().invoke(ctx)
        except CheckFailed:
            raise
        except DmmError as error:
            places = {max(param.opts, key=len): _place(ctx, param.name) for param in self.params}
            elsewhere = [f"{flag} is from {place}" for flag, place in places.items() if place]
            error.evidence = (*elsewhere, *error.evidence)  # the rest is capped
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise out_of_memory(error, [flag for param in self.params for flag in param.opts]) from error
            raise


def _place(ctx: typer.Context, name: str) -> str | None:
    """Where the value of a parameter was said, if not on the line."""
    source = ctx.get_parameter_source(name)
    if source and source.name == "ENVIRONMENT":
        return f"{ctx.auto_envvar_prefix}_{name.upper()} in the environment"
    if source and source.name == "DEFAULT_MAP":
        return str(ctx.parent.params["config"] or DEFAULT)
    return None


for _name, (_function, _epilog) in COMMANDS.items():
    app.command(_name, cls=Command, epilog=_epilog)(_function)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dmm {__version__}")
        raise typer.Exit


@app.callback()
def defaults(
    context: typer.Context,
    version: Annotated[
        bool, options.option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    config: Annotated[
        Path | None, options.option("--config", help="Defaults per command, as TOML; else dmm.toml if present.")
    ] = None,
    trust: Annotated[
        list[str] | None,
        options.option("--trust", metavar="MODULE", help="Files may name factories of this module. Repeatable."),
    ] = None,
) -> None:
    """Merge model checkpoints trained apart, without any of the data they were trained on."""
    _require_one_process(context.invoked_subcommand)
    known = {
        name: {parameter.name: partial(_require_fit, parameter) for parameter in command.params if parameter.name}
        for name, command in context.command.commands.items()
    }
    _require_known_variables(context.invoked_subcommand, context.command.commands)
    grant(trust or ())
    context.default_map = load_config(config, known)


def _require_known_variables(command: str | None, commands: Mapping[str, TyperCommand]) -> None:
    """Raise DmmError for a variable of the environment that is spelt like an option of the command and is none."""
    prefix = f"DMM_{command}_".upper()
    parameters = commands[command].params if command in commands else []
    options = [prefix + one.name.upper() for one in parameters if one.name and one.param_type_name == "option"]
    for variable in sorted(os.environ):
        if variable.startswith(prefix) and variable not in options:
            raise mistyped(
                f"{printable(variable)} in the environment: no option of {command}", variable, options, listed=None
            )


def _require_fit(parameter: Any, value: Any) -> None:
    """Raise ValueError where a value of dmm.toml has not the form of an option's; its kind is checked by Typer."""
    several = parameter.nargs == -1 or getattr(parameter, "multiple", False)
    if several != isinstance(value, list):
        shown = f"[{printable(dumps(value, ensure_ascii=False))}]" if isinstance(value, str) else "[1, 2]"
        one = 'one value is wanted; several numbers are a string, "1,2"'
        raise ValueError(f"a list is wanted, as in {shown}" if several else one)
    for part in value if several else [value]:
        if isinstance(part, dict) or (isinstance(part, bool) and not getattr(parameter, "is_flag", False)):
            raise ValueError("a number or a string is wanted")
        if part == "" and parameter.name in options.READ | options.WRITTEN:
            raise ValueError(f"it is the path of an {'input' if parameter.name in options.READ else 'output'}")


def _require_one_process(command: str | None) -> None:
    """Raise DmmError under torchrun for a command that all its processes would do, each for itself."""
    if process_count() > 1 and command not in SHARED:
        raise DmmError(
            f"{command} is not shared among the processes of torchrun",
            hint=f"call it without torchrun, which is for {', '.join(SHARED)}",
        )


def _open_closed_streams() -> None:
    """Give a descriptor that the caller has closed to the null device, before a file of ours gets its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            if number:
                setattr(sys, name, os.fdopen(number, "w", closefd=False))


def main() -> None:
    """Run the command line of this process, which goes by one name however it was started."""
    _open_closed_streams()
    try:
        app(prog_name="dmm")
    except OSError:  # the line is wrong, and stderr does not take the words that say so
        drop(sys.stderr)
        sys.exit(DmmError.exit_code)
