"""Whose code may run because a file names it: nobody's, until the user says so.

A factory in a checkpoint's metadata is whatever function its author chose, with the arguments of their choice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from .archspec import name_of, parse_arch
from .errors import DmmError, printable, told_by
from .inputs import Source

VARIABLE = "DMM_TRUST"  # processes that are started inherit it


def grant(modules: Iterable[str]) -> None:
    """Let files name factories of these modules, and of the modules in them."""
    os.environ[VARIABLE] = " ".join(dict.fromkeys([*_granted(), *modules]))


def is_granted(factory: str) -> bool:
    """Whether a file may name this ``package.module:factory``."""
    module = module_of(factory)
    return any(module == name or module.startswith(f"{name}.") for name in _granted())


def require_trust(source: Source) -> None:
    """Raise DmmError where a file names a factory of a module that the user does not trust."""
    spec = source.metadata.get("dmm.arch", "")
    origin = source.origin_of("dmm.arch")
    with told_by(f"it is {origin}"):
        parse_arch(spec)  # names of hubs look like those of factories
    module = module_of(spec)
    if module and not is_granted(spec):
        raise DmmError(
            f"{origin} asks for code to be run: {printable(spec)}",
            hint=f"if you know that code, say so: dmm --trust {printable(module)} COMMAND ..., or name it with --arch",
        )


def require_defined_in_trust(name: str, factory: object) -> None:
    """Raise DmmError for a factory that a trusted module only imports.

    Args:
        name: ``package.module:factory``.
    """
    home = str(getattr(factory, "__module__", None))
    if not is_granted(f"{home}:"):
        raise DmmError(
            f"{printable(name)} is defined in {printable(home)}, which is not trusted",
            hint=f"if you know that code, say so: dmm --trust {printable(home)} COMMAND ..., or name it with --arch",
        )


def module_of(factory: str) -> str:
    """The module of ``package.module:factory,name=value``; empty for anything else."""
    name = name_of(factory)  # what would be imported, wherever its arguments begin
    return name.partition(":")[0] if ":" in name else ""


def _granted() -> list[str]:
    return os.environ.get(VARIABLE, "").replace(",", " ").split()
