"""Trapped system calls, from the seccomp listener to the answer."""
