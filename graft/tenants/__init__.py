"""Who may do what: tenants, their ports and addresses, kept equal to what the kernel has."""
