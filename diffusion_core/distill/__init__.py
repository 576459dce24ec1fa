"""Distillation: few-step students of a many-step teacher, each an Objective driven by the same loop."""
