"""Programs in processes of their own, with one thread each."""

import os
import subprocess
import sys


def python(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """What ``python *arguments`` has printed; a test in which it ends otherwise than expected has failed."""
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == status, done.stderr
    return done
