"""Fused steps of a decoder layer: the same arithmetic in fewer passes over memory. Which of them run, and why."""

import functools
import importlib.util
import logging
import sys
import types

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear
from transformers import AttentionInterface

from workbench import UserError
from workbench.models import read_object

from .arguments import KERNELS, Arguments
from .machine import Gpus

LIGER = ("rms_norm", "rope", "swiglu")  # of liger-kernel, in Triton
OURS = ("rms_norm", "rope")  # below, where Triton does not run, for models that compute both as Llama does
LIKE_LLAMA = ("llama", "mistral", "qwen2")
# It warns that what other hardware needs cannot be imported.
logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)


def choose(args: Arguments, gpus: Gpus, model_folder, zero_config: dict) -> tuple[tuple[str, ...], str]:
    """(names of KERNELS, why these). Raises UserError for one that was asked for and cannot run."""
    missing = why_not(gpus, read_object(model_folder / "config.json").get("model_type"), zero_config)
    if args.kernels not in ("auto", "none"):
        asked = tuple(args.kernels.split("+"))
        for name in set(asked) & set(missing):
            raise UserError(f"--kernels {args.kernels}: {name}: {missing[name]}")
        return asked, "asked for by --kernels"
    chosen = tuple(name for name in KERNELS if name not in missing and args.kernels == "auto")
    why = "; ".join(dict.fromkeys(missing.values())) if args.kernels == "auto" else "asked for by --kernels"
    return chosen, why or f"compute capability {'.'.join(map(str, gpus.capability))} runs all of them"


def why_not(gpus: Gpus, model_type: str | None, zero_config: dict) -> dict[str, str]:
    """Kernels that this run cannot have, each with the reason."""
    found = {}
    zero = zero_config["zero_optimization"]
    leaves = zero.get("leaf_module", {}).get("classes", [])
    if zero["stage"] == 3 and not any(name.endswith("DecoderLayer") for name in leaves):
        found["lora"] = (
            "without the decoder layer as leaf_module DeepSpeed gathers for each linear layer's own call"
        )
    if not has_triton(gpus.dtype, gpus.capability):
        found |= dict.fromkeys(
            ("swiglu", "varlen"), "Triton and FlashAttention need bf16 and a GPU of capability 8.0"
        )
        if model_type not in LIKE_LLAMA:
            found |= dict.fromkeys(OURS, f"{model_type} models may compute them otherwise")
        return found
    if not importlib.util.find_spec("liger_kernel"):
        return found | dict.fromkeys(LIGER, "liger-kernel is not installed: pip install -r requirements.txt")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        found |= dict.fromkeys(LIGER, f"liger-kernel does not know {model_type} models")
    return found


def has_triton(dtype: str, capability: list[int] | None) -> bool:
    """bf16 stands for the units: fp16 on such a card is asked for, to see what an older one computes."""
    return dtype == "bf16" and bool(capability) and list(capability) >= [8, 0]


def by_liger(dtype: str) -> bool:
    """Asked in a rank, whose GPU is chosen."""
    return torch.cuda.is_available() and has_triton(dtype, torch.cuda.get_device_capability())


def of_trainer(chosen: tuple[str, ...], dtype: str) -> dict:
    """Arguments of Trainer. Liger's losses stay off: they compute the logits of every token."""
    names = {name: name in chosen and by_liger(dtype) for name in LIGER}
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    return {"use_liger_kernel": any(names.values()), "liger_kernel_config": names | losses}


def fuse(model: PeftModel, chosen: tuple[str, ...], dtype: str) -> None:
    """What Liger does not, in the way that it does: modules get another `forward`, their file another function."""
    chosen = tuple(name for name in chosen if name not in LIGER or not by_liger(dtype))
    for module in model.modules():
        if "lora" in chosen and isinstance(module, Linear):
            module.forward = types.MethodType(lora_forward, module)
        if "rms_norm" in chosen and hasattr(module, "variance_epsilon"):
            module.forward = types.MethodType(rms_norm_forward, module)
    if "rope" in chosen:
        sys.modules[type(model.get_base_model()).__module__].apply_rotary_pos_emb = rotate_queries_and_keys


# --- LoRA ---------------------------------------------------------------------------------------------


def lora_forward(module: Linear, x: torch.Tensor) -> torch.Tensor:
    """What PEFT's `forward` computes, [..., in] -> [..., out]."""
    base, a, b = module.base_layer, module.lora_A["default"], module.lora_B["default"]
    dropout = module.lora_dropout["default"]
    dropped = dropout(x) if module.training and not isinstance(dropout, torch.nn.Identity) else None
    scale = module.scaling["default"]
    return LoraLinear.apply(x, dropped, base.weight, base.bias, a.weight, b.weight, scale)


class LoraLinear(torch.autograd.Function):
    """W x + bias + scale * B A x, where only A [r, in] and B [out, r] train. PEFT scales and adds in passes of their own
    over the output, and autograd adds up two gradients of x; here the products add into each other's results."""

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, a, b, scale):
        rows = (x if dropped is None else dropped).flatten(0, -2)
        low = rows @ a.t()
        out = F.linear(x.flatten(0, -2), weight, bias).addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scale, ctx.dropped = scale, dropped is not None
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        rows, low, weight, a, b = ctx.saved_tensors
        shape, gradient = (*gradient.shape[:-1], -1), gradient.flatten(0, -2)
        of_low = (gradient @ b).mul_(ctx.scale)
        of_x, of_dropped = gradient @ weight, None
        if ctx.dropped:
            of_dropped = (of_low @ a).view(shape)
        else:
            of_x.addmm_(of_low, a)
        return (
            of_x.view(shape),
            of_dropped,
            None,
            None,
            of_low.t() @ rows,
            (gradient.t() @ low).mul_(ctx.scale),
            None,
        )


# --- RMSNorm and RoPE without Triton ------------------------------------------------------------------


def rms_norm_forward(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return RmsNorm.apply(x, module.weight, module.variance_epsilon)


class RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, with transformers' roundings. That keeps x in fp32 and
    reads and writes it so; here only sums over a row and the backward pass have 32 bits. `weight` is frozen."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.linalg.vector_norm(
            x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        gradient, normed = gradient * weight, x * scale
        along = (normed * gradient).mean(-1, keepdim=True)
        across = torch.addcmul(gradient, normed, along, value=-1)
        return torch.mul(across, scale, out=torch.empty_like(x)), None, None


def rotate_queries_and_keys(query, key, cos, sin, unsqueeze_dim=1):
    """transformers' `apply_rotary_pos_emb`: [B, heads, S, D] each, cos and sin [B, S, D]."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotate.apply(query, cos, sin), Rotate.apply(key, cos, sin)


class Rotate(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin, into one result; backwards the angle is negative."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, gradient):
        return rotated(gradient, *ctx.saved_tensors, -1), None, None


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    out, half = x * cos, x.shape[-1] // 2
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


# --- attention ----------------------------------------------------------------------------------------


def attention(chosen: tuple[str, ...]) -> str:
    """The name of transformers' attention: FlashAttention as torch brings it, document by document, or all pairs of a
    row under a mask."""
    if "varlen" not in chosen:
        return "sdpa"
    AttentionInterface.register("varlen", varlen_attention)  # without a function for masks there are none
    return "varlen"


def varlen_attention(module, query, key, value, attention_mask, *, scaling, position_ids, **_):
    """[B, heads, S, head_dim] -> [B, S, heads, head_dim]; a document begins where its position is 0."""
    from torch.nn.attention.varlen import varlen_attn

    rows, _, length, _ = query.shape
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    ends = document_ends(position_ids)
    out = varlen_attn(query, key, value, ends, ends, length, length, scale=scaling, window_size=(-1, 0))
    return out.view(rows, length, *out.shape[1:]), None


@functools.lru_cache(maxsize=1)  # the same tensor in every layer, forward and again
def document_ends(position_ids: torch.Tensor) -> torch.Tensor:
    """Where documents begin in the flattened rows, and the end of the last; int32 [documents + 1]."""
    starts = (position_ids.flatten() == 0).nonzero().squeeze(1)
    return F.pad(starts, (0, 1), value=position_ids.numel()).int()
