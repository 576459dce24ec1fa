"""Benchmarks beside the peers, in one process and one run: `make bench`, or `make bench B=sampling` for one."""
