"""Several processes that find each other as those of torchrun do, in a test."""

import os
import socket
import subprocess
import sys
import time

# A program whose images take their time, so that there is a middle to be interrupted in.
SLOW = """
import sys, time
from emsplat.process import settle
settle()
import emsplat.sums.statistics as statistics
quick = statistics.observe
statistics._BATCH = 4
statistics.observe = lambda *given: (time.sleep(0.1), quick(*given))[1]
from emsplat.__main__ import main
sys.exit(main())
"""
# The same for the steps of a fit.
SLOW_FIT = """
import sys, time
from emsplat.process import settle
settle()
import emsplat.fitting.course as course
import emsplat.fitting.growth as growth
import emsplat.heterogeneity.images as images
from emsplat.fitting.loop import fit
def slowly(*given, **named):
    for state in fit(*given, **named):
        time.sleep(0.05)
        yield state
course.fit = growth.fit = images.fit = slowly
from emsplat.__main__ import main
sys.exit(main())
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(size, *words, program=None, each=None, before=None, **environment):
    """Starts ``size`` processes of ``python -m emsplat``, or of a ``program`` of its own; ``each`` gives the words that
    one of them gets besides, ``before`` those that stand before its program."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    where |= {"LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *(["-m", "emsplat"] if program is None else ["-c", program])]
    return [
        subprocess.Popen(
            [*(before(rank) if before else ()), *command, *map(str, words), *(each(rank) if each else ())],
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ends(processes):
    """Exit code, standard output and standard error of each."""
    said = [process.communicate() for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def wait_for(ready, processes):
    """Returns once ``ready``, while all processes run."""
    while not ready():
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.05)
