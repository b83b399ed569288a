"""RadixAttention together with deterministic inference on FlashInfer."""

from . import asked_for, check_target


def register() -> None:
    """SGLang switches the radix cache off for FlashInfer in deterministic mode (server_args.py,
    _handle_deterministic_inference) unless the backend is in a list, for which it has an extension point
    but no command-line flag. The batch-invariant kernels themselves are SGLang's."""
    if not asked_for("deterministic_radix"):
        return
    target = "sglang.srt.server_args.add_radix_supported_deterministic_attention_backend_choices"
    check_target(target)
    from sglang.srt import server_args

    server_args.add_radix_supported_deterministic_attention_backend_choices(["flashinfer"])
