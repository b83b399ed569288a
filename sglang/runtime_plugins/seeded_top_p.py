"""One Triton kernel: temperature, softmax, top-p and a draw by the record's own seed."""

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 8192, 16
LOWEST = tl.constexpr(-3.4e38)
MOST_ROUNDS = tl.constexpr(64)  # each but the first follows a rejection, whose chance is at most 1 - top_p


@triton.jit
def draw(
    logits,
    row_stride,
    temperatures,
    top_ps,
    seeds,
    positions,
    tokens,
    vocabulary,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A program per row, which sums up in the same order whatever other rows there are.

    Top-p without sorting, by rejection (FlashInfer's idea, flashinfer.ai/2025/03/10/sampling.html): draw from the
    softmax; the token belongs to the nucleus if the tokens above it have less than top_p; if not, draw again from
    those above it. Numbers are Philox's for (seed, position, round). Weights are exp((logit - largest) / T), so the
    largest is 1 and nothing needs dividing by their sum.

    Lane i holds what tokens i, i + BLOCK, i + 2 BLOCK, ... have together. A draw takes a lane by these sums and then one
    of its tokens, so a row is read twice: for the sums, and for what lies above the token. After a rejection the second
    reading's sums are those of the next draw.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    scale = 1.4426950408889634 / tl.load(temperatures + row)  # exp(x / T) = 2 ** (x * scale)
    lanes, members = tl.arange(0, BLOCK), tl.arange(0, BLOCKS)

    most, sums = tl.full([BLOCK], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        x = tl.load(logits + start + lanes, mask=start + lanes < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(most, x)
        sums = sums * tl.exp2((most - higher) * scale) + tl.exp2((x - higher) * scale)
        most = higher
    largest = tl.max(most, axis=0)
    sums *= tl.exp2((most - largest) * scale)
    mass = tl.sum(sums, axis=0)

    nucleus = tl.load(top_ps + row) * mass
    seed, position = tl.load(seeds + row), tl.load(positions + row).to(tl.int32)
    floor, token, tries = -float("inf"), 0, 0
    while tries < MOST_ROUNDS:
        target = tl.rand(seed, position * MOST_ROUNDS + tries) * mass
        upto = tl.cumsum(sums, axis=0)
        lane = tl.min(tl.where((upto > target) & (sums > 0), lanes, BLOCK), axis=0)
        # By rounding the target may lie behind all lanes, or behind all tokens of its lane.
        lane = tl.where(lane < BLOCK, lane, tl.argmax(sums, axis=0))
        before = tl.sum(tl.where(lanes == lane, upto - sums, 0.0), axis=0)
        places = lane + members * BLOCK
        few = tl.load(logits + places, mask=places < vocabulary, other=-float("inf")).to(tl.float32)
        weights = tl.where(few > floor, tl.exp2((few - largest) * scale), 0.0)
        reached = (before + tl.cumsum(weights, axis=0) > target) & (weights > 0)
        member = tl.min(tl.where(reached, members, BLOCKS), axis=0)
        member = tl.where(member < BLOCKS, member, tl.argmax(weights, axis=0))
        token = tl.minimum(lane + member * BLOCK, vocabulary - 1)  # logits that are no numbers give any token

        drawn = tl.load(logits + token).to(tl.float32)
        above = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            x = tl.load(logits + start + lanes, mask=start + lanes < vocabulary, other=-float("inf")).to(
                tl.float32
            )
            above += tl.where(x > drawn, tl.exp2((x - largest) * scale), 0.0)
        floor, sums, mass = drawn, above, tl.sum(above, axis=0)
        tries = tl.where(mass > nucleus, tries + 1, MOST_ROUNDS)
    tl.store(tokens + row, token)


def seeded_top_p(logits, temperatures, top_ps, seeds, positions):
    """A token per row, (batch,) int32, of `logits` (batch, vocabulary), in 16 or 32 bits; all others have one value per
    row. The same for a row in any batch, for its seed and position (and its bits: threads share a row's tokens by them).
    """
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
        BLOCKS=triton.next_power_of_2(triton.cdiv(logits.shape[1], BLOCK)),
        num_warps=WARPS,
    )
    return tokens
