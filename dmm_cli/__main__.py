"""``dmm``, and ``python -m dmm_cli``, which is the same."""

import sys


def main() -> None:
    """Entry point; imports the rest where an interrupt is caught already."""
    try:
        from .app import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
