"""Does the engine compute what was trained? `parity.json`, which training leaves beside an adapter and merge_adapter.py
beside a merged model, has answers with the log-probabilities that the trained model gave their tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from workbench import UserError

from .arguments import Arguments
from .prompts import Record

PARITY = "parity.json"
SHOWN, SHOWN_TOKENS = 3, 64  # answers of the base
# Nats a token, the mean of the answer that is worst: 32 bits, and 16, where kernels round in their own order.
LIMITS = {32: 1e-4, 16: 0.05}


@dataclass(frozen=True)
class Parity:
    answers: int
    tokens: int
    worst_answer: float  # mean of the differences of its tokens [nats]
    largest: float  # difference of any token [nats]
    limit: float


def check(engine, args: Arguments, dtype: str | None) -> Parity | None:
    """Compares, with an engine in `dtype` (None: as the weights are); None if nothing tells how it was trained. Raises
    UserError if the difference is above the limit."""
    path = Path(args.lora_path or args.model_path) / PARITY
    if not path.exists():
        return None
    trained = json.loads(path.read_text())
    documents = trained["answers"]
    served = engine.generate(
        input_ids=[document["input_ids"] for document in documents],
        sampling_params={"max_new_tokens": 1, "temperature": 0},
        return_logprob=True,
        # The first position of what is returned has no log-probability.
        logprob_start_len=[document["answer_start"] - 1 for document in documents],
        lora_path=[args.lora_path] * len(documents) if args.lora_path else None,
    )
    engine.flush_cache()
    differences = [
        [
            abs(theirs - ours)
            for theirs, (ours, *_) in zip(
                document["logprobs"], result["meta_info"]["input_token_logprobs"][1:], strict=True
            )
        ]
        for document, result in zip(documents, served, strict=True)
    ]
    found = Parity(
        answers=len(documents),
        tokens=sum(map(len, differences)),
        worst_answer=max(sum(tokens) / len(tokens) for tokens in differences),
        largest=max(map(max, differences)),
        limit=LIMITS[32 if dtype == trained["dtype"].removeprefix("torch.") == "float32" else 16],
    )
    if not found.worst_answer <= found.limit:
        raise UserError(
            f"{path.parent}: the engine gives an answer of the training run other probabilities than the trained model: "
            f"{found.worst_answer:.2g} nats a token, the limit is {found.limit:g}; serve it with the base and the "
            f"precision ({trained['dtype']}) that it was trained with, or remove {PARITY} to answer nevertheless"
        )
    print(
        f"parity       {found.worst_answer:.1e} nats a token between trained and served (limit {found.limit:g}) in "
        f"{found.answers} answers"
    )
    return found


async def without_adapter(engine, args: Arguments, records: list[Record]) -> list[dict]:
    """What the base answers to the first records that --lora_path will answer: the same ids, at most SHOWN_TOKENS."""
    shown = [record for record in records if record.lora == args.lora_path][:SHOWN] if args.lora_path else []
    if not shown:
        return []
    found = await engine.async_generate(
        input_ids=[record.input_ids for record in shown],
        sampling_params=[
            record.sampling_params
            | {"max_new_tokens": min(SHOWN_TOKENS, record.sampling_params["max_new_tokens"])}
            for record in shown
        ],
        lora_path=[None] * len(shown),
    )
    return [
        {"index": record.index, "instruction": record.instruction, "output": result["text"]}
        for record, result in zip(shown, found, strict=True)
    ]
