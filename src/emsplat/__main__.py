"""The programs `emsplat` (also `python -m emsplat`) and `emsplat-relion`."""

import sys
from typing import NoReturn


def main() -> int:
    """`emsplat`, with the words of the command line."""
    return _run("emsplat", "emsplat.cli")


def relion() -> int:
    """`emsplat-relion`, with the words of the command line."""
    return _run("emsplat-relion", "emsplat.relion_job")


def script() -> NoReturn:
    """`main` as the whole of this process."""
    _end(main())


def relion_script() -> NoReturn:
    """`relion` as the whole of this process."""
    _end(relion())


def _end(code: int) -> NoReturn:
    try:
        from emsplat.process import leave
    except KeyboardInterrupt:
        sys.exit(code)
    leave(code)


def _run(program: str, module: str) -> int:
    try:
        from emsplat.process import run
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130

    def command() -> int:
        from importlib import import_module

        code: int = import_module(module).main(sys.argv[1:])
        return code

    return run(program, command)


if __name__ == "__main__":
    sys.exit(main())  # profilers and the like run it so, and have something to do afterwards
