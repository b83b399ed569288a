"""One Triton kernel: temperature, softmax, top-p and a draw by the record's own seed."""

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 8192, 16
MOST_ROUNDS = tl.constexpr(64)  # each but the first follows a rejection, whose chance is at most 1 - top_p


@triton.jit
def draw(logits, row_stride, temperatures, top_ps, seeds, positions, tokens, vocabulary, BLOCK: tl.constexpr):
    """A program per row, which sums up in the same order whatever other rows there are.

    Top-p without sorting, by rejection (FlashInfer's idea, flashinfer.ai/2025/03/10/sampling.html): draw from the
    softmax; the token belongs to the nucleus if the tokens above it have less than top_p; if not, draw again from
    those above it. Numbers are Philox's for (seed, position, round). Weights are exp((logit - largest) / T), so the
    largest is 1 and nothing needs dividing by their sum.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    temperature = tl.load(temperatures + row)
    columns = tl.arange(0, BLOCK)

    largest, best = -float("inf"), 0
    for start in range(0, vocabulary, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < vocabulary, other=-float("inf"))
        highest, where = tl.max(x, axis=0, return_indices=True)
        best = tl.where(highest > largest, start + where, best)
        largest = tl.maximum(largest, highest)
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < vocabulary, other=-float("inf"))
        total += tl.sum(tl.exp((x - largest) / temperature), axis=0)

    nucleus = tl.load(top_ps + row) * total
    seed, position = tl.load(seeds + row), tl.load(positions + row).to(tl.int32)
    floor, mass, token, tries = -float("inf"), total, best, 0
    while tries < MOST_ROUNDS:
        target = tl.rand(seed, position * MOST_ROUNDS + tries) * mass
        token = -1
        below = 0.0
        for start in range(0, vocabulary, BLOCK):
            x = tl.load(logits + start + columns, mask=start + columns < vocabulary, other=-float("inf"))
            weight = tl.where(x > floor, tl.exp((x - largest) / temperature), 0.0)
            here = tl.sum(weight, axis=0)
            if (token < 0) & (below + here > target):
                reached = (below + tl.cumsum(weight, axis=0) > target) & (weight > 0)
                first = tl.min(tl.where(reached, columns, BLOCK), axis=0)
                token = tl.where(first < BLOCK, start + first, token)
            below += here
        token = tl.where(token < 0, best, token)  # rounding: the target lies behind the last token
        drawn = tl.load(logits + token)
        above = 0.0
        for start in range(0, vocabulary, BLOCK):
            x = tl.load(logits + start + columns, mask=start + columns < vocabulary, other=-float("inf"))
            above += tl.sum(tl.where(x > drawn, tl.exp((x - largest) / temperature), 0.0), axis=0)
        rejected = above > nucleus
        floor, mass = drawn, above
        tries = tl.where(rejected, tries + 1, MOST_ROUNDS)
    tl.store(tokens + row, token)


def seeded_top_p(logits, temperatures, top_ps, seeds, positions):
    """A token per row, (batch,) int32, of `logits` (batch, vocabulary); all others have one value per row. The
    same for a row in any batch, for its seed and position."""
    tokens = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    draw[(len(logits),)](
        logits,
        logits.stride(0),
        temperatures,
        top_ps,
        seeds,
        positions,
        tokens,
        logits.shape[1],
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return tokens
