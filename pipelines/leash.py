"""Run a command that ends when its parent ends: `python -m pipelines.leash command argument...` (Linux).

The kernel's parent-death signal survives exec, so the command itself needs to know nothing of it.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the command, ended by SIGTERM when the process that started it is gone."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(143)
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
