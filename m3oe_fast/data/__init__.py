"""Logs of several domains and tasks: read, split, encoded, stored in columns, and cut into batches.

dataset = load("demo")
for batch in dataset.train.batches(4096, dataset.train.permutation(seed=2022, epoch=0)):
    loss = model.loss(*batch)
"""

from m3oe_fast.data.batch import Batch
from m3oe_fast.data.dataset import Dataset, Part
from m3oe_fast.data.encode import Encoder
from m3oe_fast.data.loading import load, load_options
from m3oe_fast.data.options import DataOptions
from m3oe_fast.data.schema import Schema

__all__ = ["Batch", "DataOptions", "Dataset", "Encoder", "Part", "Schema", "load", "load_options"]
