"""Pods of graft under a real kubelet, by `make test-kubernetes`."""
