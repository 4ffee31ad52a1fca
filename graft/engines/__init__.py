"""Docker, Podman, containerd, CNI: whose container it is, what it asks for, its networks and names."""
