"""Evaluation: fidelity on a real model's attention, and the statistical proof."""
