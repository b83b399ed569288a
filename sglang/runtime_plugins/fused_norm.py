"""SGLang's deterministic mode adds and normalises a layer's input with PyTorch's elementwise functions, some ten kernels.
FlashInfer's kernel, which every other mode uses, does it in one and has no reason to be left out: a block of threads
per row, whose size depends on the row's length alone (FusedAddRMSNorm in its norm.cuh), sums it up in the same order
whatever other rows there are. run_sglang.py sets FLASHINFER_USE_CUDA_NORM, for FlashInfer has another one in CuTe DSL, which
it takes where that is installed."""

from . import asked_for, check_target, hook


def register() -> None:
    """Entry point `sglang.srt.plugins`: hooks RMSNorm.forward_cuda (layers/layernorm.py)."""
    if not asked_for("fused_norm"):
        return
    check_target("sglang.srt.layers.layernorm.RMSNorm.forward_cuda", needs="is_batch_invariant_mode_enabled")
    check_target("sglang.srt.layers.layernorm.fused_add_rmsnorm")
    hook("sglang.srt.layers.layernorm.RMSNorm.forward_cuda", in_one_kernel, "AROUND")


def in_one_kernel(original, self, x, residual=None, post_residual_addition=None):
    """(normalised x + residual, x + residual), (batch, hidden), as the mode without determinism computes them."""
    plain = self.variance_size_override is None and not self.cast_x_before_out_mul
    if residual is None or post_residual_addition is not None or not plain or x.dtype != self.weight.dtype:
        return original(self, x, residual, post_residual_addition)
    from sglang.srt.layers.layernorm import fused_add_rmsnorm

    if len(x):
        fused_add_rmsnorm(x, residual, self.weight.data, self.variance_epsilon)
    return x, residual
