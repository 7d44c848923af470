"""`python -m bench.gpu`: m3oe_fast on one NVIDIA GPU against PyTorch at equal precision, one file per concept.

feed        batches, packed so that a graph is fed by one copy
batched     the opponents' network: every exact shortcut, written for a GPU
contenders  who takes part
graphed     a contender in CUDA graphs
verify      the gate before the clock
clock       interleaved timing by device events
device      the machine, its two ceilings, peak memory
budget      when to stop starting things
session     everything in order, kept as it goes
table       what is printed
"""
