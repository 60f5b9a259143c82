"""The programs `emsplat` (also `python -m emsplat`) and `emsplat-relion`."""

import sys


def main() -> int:
    """`emsplat`, with the words of the command line."""
    return _run("emsplat", "emsplat.cli")


def relion() -> int:
    """`emsplat-relion`, with the words of the command line."""
    return _run("emsplat-relion", "emsplat.relion_job")


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
    sys.exit(main())
