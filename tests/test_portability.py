"""Systems other than Linux, as far as Linux can play them."""

from __future__ import annotations

import os

from conftest import DIGITS, shell

SITES = [DIGITS / f"site-{name}.safetensors" for name in "ab"]
WITHOUT = """
import os
for name in ({lacking}):
    delattr(os, name)
del os.sysconf_names["SC_AVPHYS_PAGES"]
real = os.sysconf
def sysconf(name):
    if name == "SC_AVPHYS_PAGES":
        raise ValueError("unrecognized configuration name")
    return real(name)
os.sysconf = sysconf
from dmm_cli import files
from dmm_cli.__main__ import main
files.STRIDE = 1
main()
"""
LINUX_ALONE = [
    name
    for name in dir(os)
    if name.startswith(("sched_", "posix_f", "eventfd", "pidfd_", "memfd_", "splice", "setns", "unshare"))
    or name in ("fdatasync", "copy_file_range", "getrandom", "getxattr", "listxattr", "setxattr", "removexattr")
]


def test_what_macos_lacks_is_not_needed(tmp_path):
    assert {"fdatasync", "sched_getaffinity"} <= set(LINUX_ALONE)
    short = ["--synthesize-steps", 2, "--count", 8, "--distill-steps", 2]
    code = WITHOUT.format(lacking=", ".join(map(repr, LINUX_ALONE)))
    done = shell("run", *SITES, "-o", tmp_path / "out", *short, code=code)
    assert done.returncode == 0 and (tmp_path / "out" / "report.html").exists(), done.stderr


def test_windows_is_told_what_to_do():
    done = shell("--help", code="import os; os.name = 'nt'; from dmm_cli.__main__ import main; main()")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: dmm runs on Linux and macOS\nhint: on Windows, inside WSL\n"
