"""The composer: a recurrent network that reads the events of a tune one by one and says what may come next.

Embedding, stacked LSTM (Hochreiter and Schmidhuber, "Long short-term memory", 1997), and logits by the embedding's own
weights (Press and Wolf, "Using the output embedding to improve language models", 2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ComposerConfig:
    """Sizes of the composer; the defaults are the shipped model's."""

    embedding_dim: int = 96
    hidden: int = 160
    layers: int = 2
    dropout: float = 0.1  # of embeddings and of what goes from layer to layer

    def __post_init__(self) -> None:
        for field in ("embedding_dim", "hidden", "layers"):
            if getattr(self, field) < 1:
                raise ValueError(f"composer.{field}: must be at least 1, got {getattr(self, field)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"composer.dropout: must lie between 0 and 1, 1 not included; got {self.dropout:g}")


@dataclass(frozen=True)
class ComposerState:
    """What the layers remember, batch first; zeros before a tune."""

    hidden: Tensor  # [batch, layers, hidden]
    cell: Tensor  # [batch, layers, hidden]


class Composer(nn.Module):
    """Tokens in, logits of the next one out; what it remembers goes in and comes out."""

    def __init__(self, config: ComposerConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_dim)
        nn.init.normal_(self.embedding.weight, std=config.embedding_dim**-0.5)
        dropout = config.dropout if config.layers > 1 else 0.0
        self.lstm = nn.LSTM(config.embedding_dim, config.hidden, config.layers, batch_first=True, dropout=dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.leave = nn.Linear(config.hidden, config.embedding_dim)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def init_state(self, batch: int) -> ComposerState:
        """Zeros for ``batch`` tunes, on the CPU."""
        shape = (batch, self.config.layers, self.config.hidden)
        return ComposerState(torch.zeros(shape), torch.zeros(shape))

    def forward(self, tokens: Tensor, state: ComposerState) -> tuple[Tensor, ComposerState]:
        """tokens [batch, time], int64 -> logits [batch, time, vocabulary] of what follows each, and the state."""
        before = (state.hidden.transpose(0, 1).contiguous(), state.cell.transpose(0, 1).contiguous())
        out, (hidden, cell) = self.lstm(self.dropout(self.embedding(tokens)), before)
        logits = self.leave(self.dropout(out)) @ self.embedding.weight.T + self.bias
        return logits, ComposerState(hidden.transpose(0, 1), cell.transpose(0, 1))
