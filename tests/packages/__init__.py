"""The packages on empty Debian systems with a real systemd, and the wheels: make test-packages."""
