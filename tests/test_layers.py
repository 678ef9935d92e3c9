"""Who may import whom: app -> commands -> {report, library} -> floor; and what must not load early."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import DIGITS, ROOT, shell
from safetensors.numpy import save_file

from dmm_cli.synthesis.kind import KIND, REQUIRED

FLOOR = {
    "errors", "registry", "header", "files", "inputs", "serialization", "manifest", "inspection", "config", "names",
    "shards", "digest", "recall", "devices", "metadata", "groups", "hub", "trust", "archspec",
    "strictjson",
}  # fmt: skip
LIBRARY = {
    "similarity", "grouping", "merging", "alignment", "synthesis", "distillation", "architectures", "checkpoint",
    "runtime", "evaluation", "recalibration", "images", "curves", "ranks", "streaming", "savepoint", "training",
    "examples", "spaces", "signature", "chance", "widths", "layout", "norms", "loading",
    "imagefolder",
}  # fmt: skip
PACKAGES = {"similarity", "merging", "alignment", "synthesis", "distillation"}  # they meet in commands, or in a file
ALLOWED = {"merging": {"alignment"}}  # the one arrow between packages
TERMINAL = {"app", "commands", "report", "__main__"}
HEAVY = {"torch", "timm", "numpy", "scipy", "matplotlib", "rich"}


def modules() -> list[Path]:
    return sorted((ROOT / "dmm_cli").rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT / "dmm_cli")
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    """Absolute dotted names of everything a module imports, anywhere in it."""
    package = ("dmm_cli", *path.relative_to(ROOT / "dmm_cli").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {module} if module not in ("dmm_cli",) else {f"{module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("dmm_cli.")} - {"__version__"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_down(path):
    part, used = part_of(path), ours(path)
    assert part in FLOOR | LIBRARY | TERMINAL | {"__init__"}, "a new part needs its place in this table"
    outside = {name.split(".")[0] for name in imports(path) if not name.startswith("dmm_cli")}
    if part in FLOOR:
        assert used <= FLOOR
        assert not outside & (HEAVY | {"typer", "safetensors"})
    if part in LIBRARY:
        assert not used & TERMINAL
        assert not outside & {"typer", "rich"}
    if part in PACKAGES:
        assert not used & (PACKAGES - {part} - ALLOWED.get(part, set()))
    if part == "report":
        assert not used & {"app", "commands"}
        assert "torch" not in outside
    if part != "architectures":
        assert "timm" not in outside
    assert "click" not in outside, "Typer carries its own"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_neither_prints_nor_exits(path):
    if part_of(path) in TERMINAL:
        return
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = {ast.unparse(function) for function in calls}
    assert not names & {"print", "sys.exit", "exit", "input"}


SITES = [str(DIGITS / f"site-{name}.safetensors") for name in "ab"]
WUDI = ["merge", *SITES, "--method", "wudi", "--base", str(DIGITS / "base.safetensors"), "-o", "out.safetensors"]


@pytest.fixture(scope="module")
def pseudo(tmp_path_factory):
    """What the headers of a pseudo-data file have to hold."""
    path = tmp_path_factory.mktemp("pseudo") / "pseudo.safetensors"
    save_file({name: np.zeros(1, np.float32) for name in (*REQUIRED, "bn_loss")}, path, {"dmm.kind": KIND})
    return path


LIGHT = [
    (["--help"], 0),
    (["merge", "--help"], 0),
    (["--version"], 0),
    (["merge", "--no-such-flag"], 2),
    (["nothing"], 2),
    (["similarity", "missing.safetensors", SITES[0]], 2),
    (["merge", str(ROOT / "pyproject.toml"), SITES[0], "-o", "out.safetensors"], 2),
    (["merge", *SITES, "--method", "liner", "-o", "out.safetensors"], 2),
    (["similarity", *SITES, "--dry-run"], 0),
    (["merge", *SITES, "-o", "out.safetensors", "--dry-run"], 0),
    ([*WUDI, "--param", "steps=2", "--calibrate", "svc", "--device", "cuda", "--dry-run"], 0),
    ([*WUDI, "--param", "steps=0.5"], 2),
    ([*WUDI, "--device", "gpu"], 2),
    (["merge", *SITES, "-o", "out.safetensors", "--align", "alwys"], 2),
    (["align", *SITES, "-o", "out.safetensors", "--dry-run"], 0),
    (["align", SITES[0], "-o", "out.safetensors"], 2),
    (["align", SITES[0], str(DIGITS / "test.safetensors"), "-o", "out.safetensors"], 2),
    (["synthesize", *SITES, "-o", "out.safetensors", "--dry-run"], 0),
    (["distill", *SITES, "--data", SITES[0], "-o", "out.safetensors", "--dry-run"], 2),
    (["distill", *SITES, "--data", "PSEUDO", "-o", "out.safetensors", "--dry-run"], 0),
    (["run", *SITES, "-o", "out", "--dry-run"], 0),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, pseudo):
    """Of every line, one after the other in one process: its exit code, what is loaded by then, and what it wrote."""
    lines = [[str(pseudo) if word == "PSEUDO" else word for word in arguments] for arguments, _ in LIGHT]
    program = f"""
import json, os, sys
from dmm_cli.app import app
for arguments in {lines!r}:
    try:
        app(arguments)
    except SystemExit as end:
        loaded = sorted({HEAVY!r} & set(sys.modules))
        print(json.dumps([end.code, loaded, os.listdir()]), file=sys.stderr)
"""
    told = shell(code=program, cwd=tmp_path_factory.mktemp("light")).stderr
    return [json.loads(line) for line in told.splitlines() if line.startswith("[")]


@pytest.mark.parametrize(("number", "code"), list(enumerate(code for _, code in LIGHT)))
def test_nothing_heavy_is_imported(outcomes, number, code):
    assert len(outcomes) == len(LIGHT) and outcomes[number] == [code, [], []], LIGHT[number][0]
