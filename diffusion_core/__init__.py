"""Diffusion from one algebra: pure torch, no Ray, no MLflow.

Read the files in this order, each importing only from above: errors, spec, manifest, weights, images, pair,
schedule, target, noise, denoiser, guidance, solver, codec, sampler, weighting, order, objective, parallel, ema,
train, checkpoint, nets, vae, bundle, distill, metrics.
"""
