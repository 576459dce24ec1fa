"""Conformance: every combination the library can build, against closed forms: `make conformance`."""
