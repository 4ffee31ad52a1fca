"""Random sequences of socket calls, on a host and under graft, compared call by call (tests/system/test_differential.py)."""
