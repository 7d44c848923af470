"""Benchmarks: m3oe_fast against eager PyTorch and torch.compile. See README.md in this folder."""
