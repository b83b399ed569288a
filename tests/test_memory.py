"""The predicted peak: against what GPUs measured, and against what autograd keeps, for five published shapes."""

import weakref
from dataclasses import replace

import pytest

from harness import ROOT, fork
from lora_sft import memory
from lora_sft.arguments import Arguments, read_zero_config
from workbench import UserError

ZERO = read_zero_config(str(ROOT / "deepspeed" / "zero3.json"))["zero_optimization"]
STARTER = {"stage3_max_live_parameters": 3e7, "stage3_param_persistence_threshold": 10_000}


def shape(hidden, inner, layers, heads, kv_heads, vocab, tied=False) -> dict:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied,
    }  # fmt: skip


SHAPES = {
    "Llama-2-7B": shape(4096, 11008, 32, 32, 32, 32000),
    "Llama-2-13B": shape(5120, 13824, 40, 40, 40, 32000),
    "TinyLlama-1.1B": shape(2048, 5632, 22, 32, 4, 32000),
    "SmolLM2-135M": shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "Llama-3.2-1B": shape(2048, 8192, 16, 32, 8, 128256, tied=True),
}
PARAMETERS = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "TinyLlama-1.1B": 1_100_048_384,
    "SmolLM2-135M": 134_515_008,
    "Llama-3.2-1B": 1_235_814_400,
}


def matrices(config: dict) -> dict[str, tuple[int, int]]:
    """(in, out) of a layer's linear modules."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    attention = {"q": (hidden, hidden), "k": (hidden, kv), "v": (hidden, kv), "o": (hidden, hidden)}
    return attention | {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}


def base_parameters(config: dict) -> dict[str, int]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    sizes = {"model.embed_tokens": vocab * hidden, "model.norm": hidden}
    if not config["tie_word_embeddings"]:
        sizes["lm_head"] = vocab * hidden
    for layer in range(config["num_hidden_layers"]):
        sizes |= {f"model.layers.{layer}.{name}": a * b for name, (a, b) in matrices(config).items()}
        sizes |= {f"model.layers.{layer}.norm{i}": hidden for i in (1, 2)}
    return sizes


def predicted(
    args: Arguments,
    world_size=2,
    answer_share=1.0,
    zero: dict = ZERO,
    model="Llama-2-7B",
    kernels=(),
    kept_layers=0,
) -> dict[str, float]:
    config = SHAPES[model]
    lora = [args.lora_r * side for sides in matrices(config).values() for side in sides]
    sizes = base_parameters(config), lora * config["num_hidden_layers"]
    how = {"dtype": "fp16", "world_size": world_size, "answer_share": answer_share, "kernels": kernels}
    return memory.predict(config, *sizes, args, zero, **how, kept_layers=kept_layers)


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_have_their_published_sizes(name):
    assert sum(base_parameters(SHAPES[name]).values()) == PARAMETERS[name]


# --- what GPUs measured (bench/results/train_throughput.json, H100s) ----------------------------------


@pytest.mark.parametrize(
    ("tokens", "rank", "measured_gib"),
    [
        (2048, 16, 9.93),
        (2048, 64, 11.07),
        (4096, 16, 10.77),
        (8192, 16, 13.06),
        (8192, 64, 14.39),
        (16384, 16, 17.63),  # in bf16
    ],
)
def test_predicted_peak_agrees_with_the_reserved_one(tokens, rank, measured_gib):
    parts = predicted(replace(Arguments(), tokens_per_micro_batch=tokens, lora_r=rank), answer_share=0.28)
    assert sum(parts.values()) == pytest.approx(measured_gib, rel=0.02)


def test_one_gpu_gathers_nothing():
    parts = predicted(Arguments(), world_size=1, answer_share=0.28, zero=ZERO | {"overlap_comm": True})
    assert parts["gathered layers"] == 0
    assert sum(parts.values()) == pytest.approx(18.44, rel=0.02)


def test_gathers_in_a_stream_of_their_own_take_more():
    """The allocator was at its limit of 14.5 GiB."""
    parts = predicted(Arguments(), answer_share=0.28, zero=ZERO | {"overlap_comm": True})
    assert sum(parts.values()) == pytest.approx(14.50, rel=0.02)


def test_settings_of_other_people_are_not_predicted_too_low():
    """The starter's: DeepSpeed allocates the whole reduce bucket, 0.93 GiB. Measured 8.90."""
    args = replace(Arguments(), max_seq_len=512, tokens_per_micro_batch=512)
    parts = predicted(args, answer_share=0.28, zero=STARTER)
    assert parts["reduce bucket"] == pytest.approx(0.93, abs=0.01)
    assert 8.90 < sum(parts.values()) < 1.2 * 8.90


@pytest.mark.parametrize(
    ("tokens", "world_size", "measured_gib"), [(8192, 2, 12.52), (16384, 2, 16.85), (6144, 1, 16.60)]
)
def test_predicted_parts_agree_with_the_allocated_peak(tokens, world_size, measured_gib):
    """What was allocated, not what the allocator kept besides."""
    parts = predicted(replace(Arguments(), tokens_per_micro_batch=tokens), world_size, answer_share=0.3)
    assert sum(parts.values()) - parts["allocator slack"] == pytest.approx(measured_gib, rel=0.02)


def test_a_small_model_with_a_large_vocabulary():
    """SmolLM2-135M on two H100s took 5.65 GiB; with 20 bytes a logit 8.15 were predicted, from the same rows: nearly
    every position was an answer's."""
    parts = predicted(Arguments(), answer_share=0.943, model="SmolLM2-135M")
    assert sum(parts.values()) == pytest.approx(5.65, rel=0.15)
    assert parts["gathered layers"] == pytest.approx(134_515_008 * 2 / 2**30)  # no more than there is


# --- what autograd keeps ------------------------------------------------------------------------------


def peak_of_a_step(config: dict, dropout: float, rows: int, answers: int, fused: tuple) -> int:
    """Bytes at the peak of a forward and backward pass with checkpointing, in fp16, less those of the parameters, of
    tensors without memory. Attention and dropout are a GPU's kernels: the fused one that takes packed rows' mask, and the
    one whose mask has a byte."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_sft import kernels

    class Live(TorchDispatchMode):
        live = peak = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if (
                    isinstance(tensor, torch.Tensor)
                    and (storage := tensor.untyped_storage())._cdata not in seen
                ):
                    seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.free, storage.nbytes(), storage._cdata)
            self.peak = max(self.peak, self.live)
            return result

        def free(self, size: int, key: int) -> None:
            self.live -= size
            seen.discard(key)

    def attend(query, key, value, attn_mask=None, **_):
        bias = torch.empty(1, 1, query.shape[2], query.shape[2], dtype=query.dtype, device=query.device)
        bias = bias.expand(*query.shape[:3], query.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]

    torch.nn.functional.scaled_dot_product_attention = attend
    torch.nn.functional.dropout = lambda x, p, *_: torch.ops.aten.native_dropout(x, p, True)[0]
    torch.nn.Module.to = lambda module, *_, **__: module  # everything is made where it belongs
    torch.set_default_dtype(torch.float16)
    seen: set[int] = set()
    with FakeTensorMode():
        model = LlamaForCausalLM(LlamaConfig(**config, use_cache=False, attn_implementation="sdpa"))
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_dropout=dropout, target_modules="all-linear")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        kernels.fuse(model, fused, "fp16")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].flatten(0, 1)[:answers][None],))
        ids, targets = torch.zeros(rows, 1024, dtype=torch.long), torch.zeros(1, answers, dtype=torch.long)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
            seen.add(parameter.untyped_storage()._cdata)
        with Live() as counted:
            loss = model(
                input_ids=ids, labels=ids, shift_labels=targets, num_items_in_batch=torch.tensor(answers)
            ).loss
            loss.backward()
    return counted.peak


@pytest.mark.parametrize(
    ("dropout", "fused"),
    [(0.05, ()), (0.05, ("lora",)), (0.05, ("lora", "rms_norm", "rope")), (0.0, ("lora", "rms_norm", "rope"))],
)
@pytest.mark.parametrize("name", SHAPES)
def test_activations_and_logits_are_what_autograd_keeps(transformers, tmp_path, name, dropout, fused):
    """Of three layers: the peak is in a layer with few logits, in the loss with many."""
    config = SHAPES[name] | {"num_hidden_layers": 3}
    args = replace(Arguments(), tokens_per_micro_batch=4096, lora_dropout=dropout)
    names = ("checkpointed inputs", "layer activations", "logits and loss")

    def look() -> int:
        for answer_share in (0.05, 0.9):
            measured = peak_of_a_step(config, dropout, 4, int(4096 * answer_share), fused)
            how = {"dtype": "fp16", "world_size": 1, "answer_share": answer_share, "kernels": fused}
            parts = memory.predict(config, base_parameters(config), [1], args, ZERO, **how)
            print(sum(parts[part] for part in names) / (measured / 2**30))
        return 0

    code, text = fork(look, tmp_path / "terminal.txt").wait()
    assert code == 0, text
    assert [float(line) for line in text.splitlines()[-2:]] == pytest.approx([1, 1], rel=0.1)


# --- the parts, and what does not fit -----------------------------------------------------------------


def test_predicted_parts():
    parts = predicted(Arguments())
    assert parts["weight shard"] == pytest.approx(6_738_415_616 / 2**30)  # 2 bytes over 2 GPUs
    assert parts["checkpointed inputs"] == pytest.approx(2.0)  # 32 layers x 8,192 tokens x 4,096 x 2 bytes
    logits = 8192 * 32000 * 12 / 2**30
    assert parts["logits and loss"] == pytest.approx(logits - parts["layer activations"])
    assert predicted(Arguments(), answer_share=0.25)["logits and loss"] == 0  # a layer takes more, later
    everything = predicted(replace(Arguments(), gradient_checkpointing=False), answer_share=0.25)
    assert everything["logits and loss"] == pytest.approx(logits / 4)
    assert predicted(Arguments(), 4)["weight shard"] == pytest.approx(parts["weight shard"] / 2)
    more = predicted(replace(Arguments(), lora_r=64))
    assert more["LoRA states"] == pytest.approx(4 * parts["LoRA states"], rel=0.3)


def test_matrices_that_autograd_keeps_are_counted():
    args = replace(Arguments(), gradient_checkpointing=False)
    assert predicted(args)["gathered layers"] == pytest.approx(6_738_415_616 * 2 / 2**30)
    assert predicted(args, kernels=("lora",))["gathered layers"] < 2  # it keeps the parameter, not the matrix
    assert predicted(Arguments())["gathered layers"] < 2


def test_as_many_layers_as_fit_keep_their_activations():
    """A card of 80 GB takes nearly all of 16,384 tokens, one of 16 GB none of 8,192."""
    all_fused = ("lora", "varlen", "rms_norm", "rope", "swiglu")
    args = replace(Arguments(), tokens_per_micro_batch=16384, lora_dropout=0.0)

    def peak(kept: int) -> float:
        return sum(predicted(args, answer_share=0.28, kernels=all_fused, kept_layers=kept).values())

    kept = memory.layers_to_keep(peak, 32, 77.9)
    assert 24 <= kept < 32
    assert peak(kept) < 0.96 * 77.9 < peak(kept + 1)
    assert peak(32) == pytest.approx(
        sum(
            predicted(
                replace(args, gradient_checkpointing=False), answer_share=0.28, kernels=all_fused
            ).values()
        )
    )
    assert (
        memory.layers_to_keep(lambda kept: sum(predicted(Arguments(), kept_layers=kept).values()), 32, 14.5)
        == 0
    )


def test_what_does_not_fit_names_the_flag():
    args, parts = Arguments(), predicted(Arguments())
    with pytest.raises(UserError, match=r"does not fit; use --tokens_per_micro_batch 4096"):
        memory.judge(args, parts, world_size=2, limit_gib=sum(parts.values()) - 0.1, free_gib=15.0)
    with pytest.raises(UserError, match="another process holds it"):
        memory.judge(args, parts, world_size=2, limit_gib=20.0, free_gib=3.0)
    with pytest.raises(UserError, match="use a second GPU"):
        memory.judge(args, predicted(args, 1), world_size=1, limit_gib=14.5, free_gib=None)
