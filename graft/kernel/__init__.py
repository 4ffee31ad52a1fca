"""The kernel from user space: system calls, BPF, namespaces, cgroups, addresses."""
