"""Faults done to the pipeline on purpose: one module each, driven by real processes, files and signals.

A module says FAULT, INJECTION and OUTCOME in a sentence, and its `run(place, seed, full)` gives figures: what was
counted in the end, with its bound. `full` asks for the counts of the contract, otherwise for fewer.
"""
