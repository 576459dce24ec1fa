"""The DVC stages: thin entry points over diffusion_core. One stage a file; `pipelines.stage` runs them all."""
