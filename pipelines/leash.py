"""A process that ends when its parent ends (Linux): for stages, and as `python -m pipelines.leash command argument...`.

The kernel's parent-death signal survives exec, so a command on the leash needs to know nothing of it.
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the process that started this one is gone; elsewhere than on Linux do nothing.

    Ends this process with code 143 if that one is gone already.
    """
    parent = os.getppid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(143)


def orphaned() -> bool:
    """Whether the `dvc repro` that started this stage ended before the kernel was asked, as while modules loaded.

    DVC gives its commands its own process group; whoever adopts an orphan is of another. Of a server that a stage has
    started in a session of its own this says nothing.
    """
    return "DVC_STAGE" in os.environ and os.getpgid(os.getppid()) != os.getpgrp()


if __name__ == "__main__":
    end_with_parent()
    os.execv(sys.argv[1], sys.argv[1:])
