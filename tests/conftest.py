"""What all tests share: Triton's interpreter where there is no GPU, hypothesis' profiles, poisoned memory."""

import os
import signal

import hypothesis
import pytest
import torch

# A shell starts what runs in its background with Ctrl-C ignored, and so would be the children that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports triton: it decides then. With a GPU the compiled kernels are tested, on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples on every machine, so that a red test is red everywhere; search for new ones with
# HYPOTHESIS_PROFILE=search. Fixtures of a function here force a backend or poison memory: for all examples alike.
health = hypothesis.HealthCheck
shared = hypothesis.settings(deadline=None, suppress_health_check=[health.function_scoped_fixture, health.too_slow])
hypothesis.settings.register_profile("fixed", shared, derandomize=True, max_examples=25, database=None)
hypothesis.settings.register_profile("search", shared, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture
def poisoned():
    """New memory holds NaN (integers: their maximum) until it is written: torch.empty, empty_like, new_empty, ..."""
    deterministic, warn_only = torch.are_deterministic_algorithms_enabled(), True
    if deterministic:
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
