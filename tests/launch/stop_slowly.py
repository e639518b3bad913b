"""Stands in for training: says that it runs, takes SECONDS to stop after SIGTERM, says that it stopped by itself."""

import signal
import sys
import time
from pathlib import Path

stopping = []
signal.signal(signal.SIGTERM, lambda signum, frame: stopping.append(signum))
Path(sys.argv[1], "running").touch()
while not stopping:
    time.sleep(0.05)
time.sleep(float(sys.argv[2]))
Path(sys.argv[1], "stopped").touch()
