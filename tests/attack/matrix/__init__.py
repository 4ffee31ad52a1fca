"""The matrix of sockets and calls: what runs inside a container (agent, sockets, calls), and what is expected (rules)."""
