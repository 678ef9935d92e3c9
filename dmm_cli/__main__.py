"""``python -m dmm_cli`` is ``dmm``."""

from .app import main

main()
