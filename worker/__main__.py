"""`python -m worker`."""

import os

# Before torch is imported: its OpenMP threads would otherwise spin while they wait for each other, and on a machine
# whose cores are shared (Redis, the service, a browser) twenty short steps then take half a minute instead of a second.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from worker.main import run

run()
