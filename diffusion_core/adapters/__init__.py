"""Adapters: models from local folders in the diffusers format, read into the networks of this library."""
