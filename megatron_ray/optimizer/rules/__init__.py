"""Elementwise update rules, one function each, and the orthogonalization of matrices.

A rule returns the new weights and the new state of some elements. It is pure: it changes no
tensor and never reads one on the host. `megatron_ray.config.optimizer_kinds` lists them.
"""
