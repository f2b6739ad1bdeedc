"""What a daemon loads before it does anything."""

from __future__ import annotations

import subprocess
import sys


def test_the_scheduler_needs_no_numpy() -> None:
    """It adds up nothing; numpy is a third of the time that its start would take."""
    looks = "import sys, fldaemons.schedulerd; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", looks], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
