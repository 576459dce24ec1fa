"""The Ray Serve application: a registered bundle behind an HTTP endpoint. It may read the registry, never write it."""
