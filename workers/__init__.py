"""Where work runs: one task interface over an in-process pool and Ray actors."""
