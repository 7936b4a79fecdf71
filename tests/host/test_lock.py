"""One run at a time: the second is told who is there, and a run that died leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_engine.errors import ConfigError
from moe_engine.host.lock import lock

HOLD = "import sys, time; from pathlib import Path; from moe_engine.host.lock import lock; " + (
    "held = lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
)


def test_the_second_run_is_refused_until_the_first_is_gone(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"in use by process {other.pid} on .* since 20.*choose another --out"):
            lock(tmp_path)
        assert json.loads((tmp_path / "lock").read_text())["pid"] == other.pid  # the refused run wrote nothing
        os.kill(other.pid, signal.SIGKILL)
    time.sleep(0.1)
    held = lock(tmp_path)
    assert held is not None and json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    held.close()
    again = lock(tmp_path)
    assert again is not None
    again.close()


def test_a_lock_file_that_says_nothing(tmp_path: Path):
    held = lock(tmp_path)
    (tmp_path / "lock").write_text("?")
    with pytest.raises(ConfigError, match="in use by another process"):
        lock(tmp_path)
    assert held is not None
    held.close()
