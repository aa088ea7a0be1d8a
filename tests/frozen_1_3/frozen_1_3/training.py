import numpy as np
import torch

from subquad.training.sources.source import IGNORED, Sample
from subquad.training.tokenizer import SymbolTokenizer


class Counting:
    packed = False
    unigram_bits_per_byte = None

    def __init__(self, vocab_size, seq_len):
        self.tokenizer = SymbolTokenizer(vocab_size)
        self.fingerprint = {"source": "frozen_counting", "vocab_size": vocab_size, "seq_len": seq_len}
        self.vocab_size, self.seq_len = vocab_size, seq_len

    def num_samples(self, split):
        return 50

    def sample(self, split, index):
        tokens = (np.arange(self.seq_len + 1, dtype=np.int64) + index) % self.vocab_size
        targets = tokens[1:].copy()
        targets[0] = IGNORED
        return Sample(tokens[:-1], targets, np.zeros(0, dtype=np.int64), 0)


def source(config, context):
    assert context.tokenizer is not None
    return Counting(config.vocab_size, context.seq_len)


def optimizer(config, parameter_groups):
    return torch.optim.SGD(parameter_groups, lr=config.lr)
