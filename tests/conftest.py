"""What every test runs under: no network, no accelerator, fixed seeds."""

import gc
import os
import random
import sys
import tempfile

# Before anything imports torch or transformers, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest

# evaluate copies modules of metrics and spills columns: not into the user's cache, and not where
# another worker does. Gone with this process.
_OF_METRICS = tempfile.TemporaryDirectory(prefix="metrics-of-tests-")
for _name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):
    os.environ[_name] = os.path.join(_OF_METRICS.name, _name)

# The same examples on every machine and no time limit on one: a busy machine is no failure.
hypothesis.settings.register_profile("trl_ext", deadline=None, derandomize=True)
hypothesis.settings.load_profile("trl_ext")


def pytest_collection_finish() -> None:
    """Keep what the test files imported out of every later garbage collection.

    Each training run ends with one; over all of torch and transformers it would take longer than
    the run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed the generators in use, without importing torch for a test that does not."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
