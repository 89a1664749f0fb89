"""Check and test the project: `python scripts/test.py`. Arguments go to pytest.

Set TO_FINETUNE_DATA to a folder with alpaca_data.json and stories260k/ to run the tests on real data as well.
"""

import os
import subprocess
import sys

import environment

environment.enter("dev")

CHECKS = (
    ["ruff", "check", "."],
    ["ruff", "format", "--check", "."],
    ["mypy"],
    # One thread a process: two busy threads on few cores slow small tensors down a hundredfold.
    ["pytest", "--numprocesses", "auto", "--dist", "worksteal", *sys.argv[1:]],
)

if __name__ == "__main__":
    os.chdir(environment.ROOT)
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    failed = 0
    for check in CHECKS:
        print(f"$ {' '.join(check)}", flush=True)
        failed |= subprocess.run([sys.executable, "-m", *check], env=settings).returncode
    sys.exit(1 if failed else 0)
