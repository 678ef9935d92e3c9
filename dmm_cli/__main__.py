"""``dmm``, and ``python -m dmm_cli``, which is the same."""

import os
import sys


def main() -> None:
    """Entry point; imports the rest where an interrupt is caught already."""
    if os.name != "posix":
        print("error: dmm runs on Linux and macOS\nhint: on Windows, inside WSL", file=sys.stderr)
        sys.exit(2)
    try:
        from .app import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
