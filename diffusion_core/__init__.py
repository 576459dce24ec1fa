"""Diffusion from one algebra: pure torch, no Ray, no MLflow. `__all__` is what a user imports from here.

Read the files in this order, each importing only from above: errors, spec, manifest, weights, images, checks, pair,
schedule, discrete, chain, target, noise, denoiser, guidance (two_conditions, classifier, thresholding, inpainting),
polynomial, solver, multistep, stochastic, renoise, grid, walk, table, codec, sampler, search, inversion, edit, cascade,
likelihood, weighting, uncertainty, order, objective, variational, parallel, precision, ema, posthoc, train, checkpoint,
nets, similarity, spread, perceptual, critic, vae, adapters, bundle, distill, metrics.
"""

from diffusion_core.adapters.dit import read_dit
from diffusion_core.adapters.text import read_text
from diffusion_core.adapters.unet import read_unet
from diffusion_core.adapters.vae import read_vae
from diffusion_core.bundle import Bundle, DenoiserSpec
from diffusion_core.cascade import Finer, augment, cascade
from diffusion_core.chain import Posterior, jump, posterior
from diffusion_core.classifier import ClassifierGuided
from diffusion_core.codec import Codec, Moments, Pixel
from diffusion_core.critic import Adversarial, Patch
from diffusion_core.denoiser import (
    Denoiser,
    Label,
    Plain,
    QuarterLogNoise,
    Reader,
    Said,
    Scale,
    StepNumber,
    Time,
    UnitVariance,
    without_condition,
)
from diffusion_core.discrete import (
    Betas,
    CosineBetas,
    LinearBetas,
    QuadraticBetas,
    ScaledLinearBetas,
    SigmoidBetas,
    Tabulated,
    ZeroTerminal,
)
from diffusion_core.distill.consistency import Consistency, ConsistencyDistillation
from diffusion_core.distill.progressive import Progressive
from diffusion_core.edit import partial
from diffusion_core.ema import Ema, PowerEma
from diffusion_core.errors import (
    ConfigError,
    DataError,
    GateError,
    InkwellError,
    IntegrityError,
    RefusedError,
    UnreachableError,
)
from diffusion_core.grid import Exponential, Given, Grid, Leading, Linspace, LogSnr, Resampled, Trailing, Uniform
from diffusion_core.grid import Karras as KarrasGrid
from diffusion_core.guidance import APG, CFG, Autoguidance, Guide, from_paper, to_paper
from diffusion_core.inpainting import Inpaint
from diffusion_core.inversion import invert, slerp
from diffusion_core.likelihood import Prior, log_likelihood
from diffusion_core.multistep import Multistep, UniPC
from diffusion_core.nets import NetSpec
from diffusion_core.nets.byte_text import ByteEncoder
from diffusion_core.nets.clip_text import ClipEncoder
from diffusion_core.nets.concatenated import Concatenated
from diffusion_core.nets.dit import DiT
from diffusion_core.nets.edm2 import Edm2
from diffusion_core.nets.lean import Lean
from diffusion_core.nets.lora import add_lora, load_lora, lora_state, merge_lora, remove_lora
from diffusion_core.nets.mmdit import MMDiT
from diffusion_core.nets.t5_text import T5Encoder
from diffusion_core.nets.text import Encoded, TextEncoder, TextSpec
from diffusion_core.nets.unet import UNet
from diffusion_core.nets.uvit import UViT
from diffusion_core.noise import Noise, Stream
from diffusion_core.objective import Batch, Objective, Regression
from diffusion_core.pair import Numbers, Pair, Row, determinant, mix, unmix
from diffusion_core.perceptual import Lpips, MsSsim, Perceptual
from diffusion_core.posthoc import Snapshot, reconstruct, snapshot
from diffusion_core.renoise import Ancestral, Full, Keep, Learned, Renoise
from diffusion_core.sampler import Sampling, generate, sample
from diffusion_core.schedule import VE, VP, Cosine, Edm, Level, Linear, Schedule, Shifted, SubVP, log_snr
from diffusion_core.search import search
from diffusion_core.similarity import ms_ssim, psnr, ssim
from diffusion_core.solver import FirstOrder, Heun, SingleStep, Solver
from diffusion_core.spread import Spread
from diffusion_core.stochastic import Churn, Langevin
from diffusion_core.table import Table, write
from diffusion_core.target import EPS, FLOW, X0, Karras, Score, Target, V, Velocity
from diffusion_core.thresholding import Clip, DynamicThreshold
from diffusion_core.train import Plan, TrainState, begin, fit
from diffusion_core.two_conditions import TwoConditions
from diffusion_core.uncertainty import Uncertainty
from diffusion_core.vae import CodecSpec, KlCodec, KlVae, LdmVae, VaeLoss
from diffusion_core.variational import Hybrid, bound
from diffusion_core.walk import walk
from diffusion_core.weighting import (
    P2,
    Flat,
    LogitNormal,
    LogNormalNoise,
    MinSnr,
    Snr,
    Times,
    UniformTimes,
    Vlb,
    Weight,
    WholeSteps,
)
from diffusion_core.weighting import Edm as EdmWeight

__all__ = [
    "APG",
    "Adversarial",
    "Ancestral",
    "Autoguidance",
    "Batch",
    "Betas",
    "Bundle",
    "ByteEncoder",
    "CFG",
    "Churn",
    "ClassifierGuided",
    "Clip",
    "ClipEncoder",
    "Codec",
    "CodecSpec",
    "Concatenated",
    "ConfigError",
    "Consistency",
    "ConsistencyDistillation",
    "Cosine",
    "CosineBetas",
    "DataError",
    "Denoiser",
    "DenoiserSpec",
    "DiT",
    "DynamicThreshold",
    "EPS",
    "Edm",
    "Edm2",
    "EdmWeight",
    "Ema",
    "Encoded",
    "Exponential",
    "FLOW",
    "Finer",
    "FirstOrder",
    "Flat",
    "Full",
    "GateError",
    "Given",
    "Grid",
    "Guide",
    "Heun",
    "Hybrid",
    "InkwellError",
    "Inpaint",
    "IntegrityError",
    "Karras",
    "KarrasGrid",
    "Keep",
    "KlCodec",
    "KlVae",
    "Label",
    "Langevin",
    "LdmVae",
    "Leading",
    "Lean",
    "Learned",
    "Level",
    "Linear",
    "LinearBetas",
    "Linspace",
    "LogNormalNoise",
    "LogSnr",
    "LogitNormal",
    "Lpips",
    "MMDiT",
    "MinSnr",
    "Moments",
    "MsSsim",
    "Multistep",
    "NetSpec",
    "Noise",
    "Numbers",
    "Objective",
    "P2",
    "Pair",
    "Patch",
    "Perceptual",
    "Pixel",
    "Plain",
    "Plan",
    "Posterior",
    "PowerEma",
    "Prior",
    "Progressive",
    "QuadraticBetas",
    "QuarterLogNoise",
    "Reader",
    "RefusedError",
    "Regression",
    "Renoise",
    "Resampled",
    "Row",
    "Said",
    "Sampling",
    "Scale",
    "ScaledLinearBetas",
    "Schedule",
    "Score",
    "Shifted",
    "SigmoidBetas",
    "SingleStep",
    "Snapshot",
    "Snr",
    "Solver",
    "Spread",
    "StepNumber",
    "Stream",
    "SubVP",
    "T5Encoder",
    "Table",
    "Tabulated",
    "Target",
    "TextEncoder",
    "TextSpec",
    "Time",
    "Times",
    "Trailing",
    "TrainState",
    "TwoConditions",
    "UNet",
    "UViT",
    "Uncertainty",
    "UniPC",
    "Uniform",
    "UniformTimes",
    "UnitVariance",
    "UnreachableError",
    "V",
    "VE",
    "VP",
    "VaeLoss",
    "Velocity",
    "Vlb",
    "Weight",
    "WholeSteps",
    "X0",
    "ZeroTerminal",
    "add_lora",
    "augment",
    "begin",
    "bound",
    "cascade",
    "determinant",
    "fit",
    "from_paper",
    "generate",
    "invert",
    "jump",
    "load_lora",
    "log_likelihood",
    "log_snr",
    "lora_state",
    "merge_lora",
    "mix",
    "ms_ssim",
    "partial",
    "posterior",
    "psnr",
    "read_dit",
    "read_text",
    "read_unet",
    "read_vae",
    "reconstruct",
    "remove_lora",
    "sample",
    "search",
    "slerp",
    "snapshot",
    "ssim",
    "to_paper",
    "unmix",
    "walk",
    "without_condition",
    "write",
]
