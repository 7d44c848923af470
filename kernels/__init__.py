"""Triton kernels and their launchers, one file per op. Installed as `m3oe_fast.kernels`.

Importing this package never imports triton: the kernels are optional. None exists yet; backend `triton` says so.
"""
