"""What holds for every test."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

# The same examples in every run, so that a test only fails when what it tests has changed. To look for new ones:
# HYPOTHESIS_PROFILE=search. None has a time limit: tests run beside others.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile("search", derandomize=False, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# A shell starts background jobs with Ctrl-C ignored, and processes started from here would inherit that: tests that
# stop something with it would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
