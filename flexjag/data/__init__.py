"""From documents to batches: samplers with a budget of tokens, packs of samples, and the collate that makes batches."""

from flexjag.data.collate import Batch, collate
from flexjag.data.dataset import PackedDataset, lengths_of
from flexjag.data.packing import Budget
from flexjag.data.sampler import TokenBudgetSampler
from flexjag.data.statistics import Statistics

__all__ = ["Batch", "Budget", "PackedDataset", "Statistics", "TokenBudgetSampler", "collate", "lengths_of"]
