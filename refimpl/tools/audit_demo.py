"""A small PyTorch training with three mistakes in it, for `python scripts/audit.py --demo`. It runs by itself, too.

The mistakes are where the comments are. Nothing warns of them, and the loss falls.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

VOCAB, WIDTH, LENGTH, BATCH, STEPS = 64, 48, 24, 8, 6


class Attention(nn.Module):
    """Causal attention of one head, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each position takes from itself and the earlier ones: (B, T, C) -> (B, T, C)."""
        q, k, v = self.qkv(x).split(WIDTH, dim=-1)
        scores = q @ k.transpose(1, 2) / math.sqrt(WIDTH)
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -math.inf)
        weights = torch.exp(scores.half() - scores.half().amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)  # mistake 1: a softmax by hand, in FP16
        return self.proj(weights @ v)


class Model(nn.Module):
    """A language model of one block."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.attention = Attention()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token: (B, T) -> (B, T, VOCAB)."""
        x = self.embedding(tokens)
        x = x + self.attention(self.norm(x))
        return self.head(x + self.mlp(self.norm(x)))


def batch() -> tuple[Tensor, Tensor]:
    """Return tokens that count upwards from a random start, and the tokens after them."""
    counted = (torch.randint(VOCAB, (BATCH, 1)) + torch.arange(LENGTH + 1)) % VOCAB
    return counted[:, :-1], counted[:, 1:]


def train() -> None:
    """Train for a few steps."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(1, STEPS + 1):
        tokens, targets = batch()
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(tokens)
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            scaler.scale(loss).backward()  # mistake 2: backward runs inside autocast
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # mistake 3: clips gradients that still have the loss scale
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    train()
