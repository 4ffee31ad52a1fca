"""What may be reached, and how it is written: pure values, no I/O and no system calls."""
