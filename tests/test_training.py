"""The training run on 2 CPU ranks of real DeepSpeed ZeRO-3, against plain references in one process."""

import gc
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from harness import ROOT, fork

CONTRACT = {
    *("training.log", "metrics.jsonl", "run_config.json", "summary.json", "loss.png", "memory.png"),
    *("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"),
}
METRICS = {
    *("step", "loss", "learning_rate", "grad_norm", "loss_scale", "step_time_s", "tokens_per_s_per_gpu"),
    *("peak_reserved_gib", "real_tokens", "trained_tokens", "step_of_start"),
}
SUMMARY = {
    *("eval_loss_before", "eval_loss_after", "perplexity_before", "perplexity_after", "tokens_per_s_per_gpu"),
    *("peak_reserved_gib", "predicted_peak_gib", "mfu_4n", "hfu_6n", "train_rows", "train_tokens"),
    *("padding_share", "steps", "wall_s", "world_size"),
}


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def summary_of(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="session")
def parity_flags(quick) -> list[str]:
    return [*quick, "--lora_dropout", "0", "--max_steps", "3", "--tokens_per_micro_batch", "384"]


@pytest.fixture(scope="session")
def two_ranks(libraries, parity_flags, tmp_path_factory) -> Path:
    """Output of ZeRO-3 on 2 ranks, 2 rows each, no dropout: what the references are compared with."""
    out = tmp_path_factory.mktemp("two_ranks") / "out"
    run = fork(lambda: libraries.main([*parity_flags, "--output_dir", str(out)]), out.parent / "terminal.txt")
    code, text = run.wait()
    assert code == 0, text
    return out


def reference(config: dict, scratch: Path) -> int:
    """The run of a run_config.json in one process, without DeepSpeed."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from lora_sft import data, model, train
    from lora_sft.arguments import Arguments
    from lora_sft.preflight import Plan

    args, plan = Arguments(**config["arguments"]), Plan(**config["plan"] | {"zero_config": None})
    args = replace(args, output_dir=str(scratch / "reference"), tokens_per_micro_batch=768)
    tokenizer = AutoTokenizer.from_pretrained(plan.model_folder)
    data.set_up_tokenizer(tokenizer)
    rows = data.read_file(Path(args.data_path))
    train_rows, held_out = data.split_rows(rows, [], args.max_train_rows, args.max_eval_rows, args.seed)
    packed = data.prepare(train_rows, tokenizer, args.max_seq_len, 4, "train")
    evaluation = data.prepare(held_out, tokenizer, args.max_seq_len, 4, "eval")
    hf_args = train.training_arguments(args, plan, use_cpu=True)
    network = model.load_model(args, plan, tokenizer)
    trainer = train.PackedTrainer(model=network, args=hf_args, train_dataset=packed)
    trainer._save_checkpoint = lambda *_, **__: None  # it asks DeepSpeed for the adapter
    before = train.evaluate(network, evaluation, 4, torch.device("cpu"))
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "losses": [entry["loss"] for entry in steps],
        "grad_norms": [float(entry["grad_norm"]) for entry in steps],
        "before": before,
        "after": train.evaluate(network, evaluation, 4, torch.device("cpu")),
    }
    (scratch / "reference.json").write_text(json.dumps(result))
    save_file(get_peft_model_state_dict(network), scratch / "reference.safetensors")
    return 0


@pytest.fixture(scope="session")
def one_process(two_ranks, scratch) -> dict:
    """What `two_ranks` is compared with: losses, grad norms, evaluation; adapter tensors in reference.safetensors."""
    config = json.loads((two_ranks / "run_config.json").read_text())
    code, text = fork(lambda: reference(config, scratch), scratch / "reference.txt").wait()
    assert code == 0, text
    return json.loads((scratch / "reference.json").read_text())


def assert_same_course(out: Path, reference: dict, tolerance: float = 2e-6) -> None:
    rows = rows_of(out)
    assert [row["loss"] for row in rows] == pytest.approx(reference["losses"], abs=tolerance)
    assert [row["grad_norm"] for row in rows] == pytest.approx(reference["grad_norms"], rel=1e-4)


@pytest.mark.v100
def test_two_zero3_ranks_equal_one_process(two_ranks, one_process):
    assert_same_course(two_ranks, one_process)


def test_evaluation_equals_one_process(two_ranks, one_process):
    summary = summary_of(two_ranks)
    assert summary["eval_loss_before"] == pytest.approx(one_process["before"], abs=1e-6)
    assert summary["eval_loss_after"] == pytest.approx(one_process["after"], abs=1e-5)


def test_adapter_equals_one_process(two_ranks, one_process, scratch):
    from safetensors.torch import load_file

    ours, reference = (
        load_file(two_ranks / "adapter_model.safetensors"),
        load_file(scratch / "reference.safetensors"),
    )
    assert set(ours) == set(reference)
    assert len(ours) == 4 * 7 * 2  # layers x linear modules x (A, B)
    for name in ours:
        # By norm: where a gradient is almost zero, Adam turns its rounding into a whole step of one element.
        assert (ours[name] - reference[name]).norm() < 1e-3 * reference[name].norm(), name


def test_gradient_accumulation_equals_a_larger_micro_batch(start, parity_flags, one_process, tmp_path):
    """And nothing depends on whether activations are kept or computed again."""
    flags = [*parity_flags, "--tokens_per_micro_batch", "192", "--gradient_accumulation_steps", "2"]
    flags += ["--kept_layers", "2"]
    code, text = start(*flags, "--output_dir", tmp_path / "out").wait()
    assert code == 0, text
    assert "50% of the layers are computed again" in text
    assert_same_course(tmp_path / "out", one_process)


@pytest.mark.long
def test_parity_with_resident_layers_and_separate_hooks(start, parity_flags, one_process, tmp_path):
    """The other end of the JSON: persistence threshold above every matrix of a layer, no leaf module, gathers in a
    stream of their own, which the host must not outrun."""

    def refuse():
        from lora_sft import watch

        watch.let_host_run_ahead = None

    config = json.loads((ROOT / "deepspeed" / "zero3.json").read_text())
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 100_000, "overlap_comm": True}
    del config["zero_optimization"]["leaf_module"]
    (tmp_path / "zero.json").write_text(json.dumps(config))
    flags = [*parity_flags, "--deepspeed", tmp_path / "zero.json", "--output_dir", tmp_path / "out"]
    code, text = start(*flags, patch=refuse).wait()
    assert code == 0, text
    assert_same_course(tmp_path / "out", one_process)


def observe_partitions(seen: Path) -> None:
    """Leaves in `seen` what rank 0 holds at rest, which modules forward passes fetch, and how much is whole at once."""
    import deepspeed.utils.nvtx
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    from lora_sft import watch

    DeepSpeedEngine._zero3_consolidated_16bit_state_dict = None  # to save, it gathers the frozen base as well
    fetch = PartitionedParameterCoordinator.fetch_sub_module
    result = {"at_rest": {}, "fetched": [], "whole": []}  # whole: elements of the base, by step and fetch
    base: list = []

    def counting_fetch(self, module, forward):
        if forward and not result["whole"]:
            result["fetched"].append(type(module).__name__)
        fetch(self, module, forward)
        if result["whole"]:
            result["whole"][-1].append(sum(p.numel() for p in base))

    class Observer(watch.SetUp):
        def on_train_begin(self, *args, **kwargs):
            for name, p in self.trainer.model.named_parameters():
                partitioned = p.ds_status == ZeroParamStatus.NOT_AVAILABLE
                result["at_rest"][name] = [p.numel(), p.ds_numel, partitioned]
            result["fetched"].clear()
            super().on_train_begin(*args, **kwargs)  # runs forward passes

        def on_step_begin(self, *args, **kwargs):
            base[:] = [p for p in self.trainer.model.parameters() if not p.requires_grad]
            result["whole"].append([])

        def on_step_end(self, hf_args, state, control, **kwargs):
            offload = self.trainer.model_wrapped.optimizer.parameter_offload
            result["ahead"] = offload.get_param_coordinator().fast_sharding_for_leaf_module
            result["looked_through"] = len(gc.get_objects())  # for garbage
            result["ranges"] = deepspeed.utils.nvtx.enable_nvtx
            if state.is_world_process_zero:
                seen.write_text(json.dumps(result))

    PartitionedParameterCoordinator.fetch_sub_module, watch.SetUp = counting_fetch, Observer


def test_weights_are_partitioned_and_gathered_per_layer(start, quick, tmp_path):
    """At rest base and LoRA matrices hold nothing on a rank; a decoder layer is gathered as one unit; in forward and
    backward passes no more than two are whole (and the embedding or the head)."""
    config = json.loads((ROOT / "deepspeed" / "zero3.json").read_text())
    layer = 4 * 128 * 128 + 3 * 128 * 384  # elements of the tiny model's matrices
    config["zero_optimization"] |= {
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": 3 * layer,
        "stage3_max_reuse_distance": 2 * layer,
    }
    (tmp_path / "zero.json").write_text(json.dumps(config))
    flags = ["--max_steps", 4, "--deepspeed", tmp_path / "zero.json", "--output_dir", tmp_path / "out"]
    code, text = start(*quick, *flags, patch=lambda: observe_partitions(tmp_path / "seen.json")).wait()
    assert code == 0, text
    result = json.loads((tmp_path / "seen.json").read_text())
    assert result["ahead"]  # one stream
    assert result["looked_through"] < 10_000
    assert not result["ranges"]
    # Embedding, head and last norm; base matrices and norms of a layer, LoRA A and B.
    assert len(result["at_rest"]) == 3 + 4 * (7 + 2 + 7 * 2)
    for name, (held, _, partitioned) in result["at_rest"].items():
        assert partitioned, name
        assert held == 0, name
    fetched = result["fetched"]
    forwards = fetched.count("LlamaForCausalLM")
    assert forwards >= 3  # self-test and evaluation
    assert fetched.count("LlamaDecoderLayer") == 4 * forwards
    assert not {"LlamaMLP", "LlamaAttention"} & set(fetched)
    assert len(result["whole"]) == 4
    head = next(state[1] for name, state in result["at_rest"].items() if "lm_head" in name)
    for counts in result["whole"]:  # the first ones only record the order in which layers are needed
        assert max(layer, head) <= max(counts) <= 2 * layer + head, counts


def test_a_model_that_may_be_whole_stays_so_until_the_backward_pass(start, quick, tmp_path):
    """Also after the forward passes of self-test and evaluation, from which DeepSpeed remembers what to release."""
    flags = ["--max_steps", 4, "--output_dir", tmp_path / "out"]
    code, text = start(*quick, *flags, patch=lambda: observe_partitions(tmp_path / "seen.json")).wait()
    assert code == 0, text
    result = json.loads((tmp_path / "seen.json").read_text())
    base = sum(size for name, (_, size, _) in result["at_rest"].items() if "lora_" not in name)
    counts = result["whole"][-1]
    assert counts[len(counts) // 2] == base, counts  # the first module of the backward pass


def test_ranks_share_the_cores(libraries, monkeypatch, tmp_path):
    def look() -> int:
        import torch

        from lora_sft.launch import share_cores

        share_cores(4)
        print(torch.get_num_threads())
        return 0

    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(32)))
    assert fork(look, tmp_path / "terminal.txt").wait() == (0, "8\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert fork(look, tmp_path / "again.txt").wait()[1] != "8\n"  # the user's choice


def test_artefacts_follow_the_contract(two_ranks):
    assert {path.name for path in two_ranks.iterdir()} >= CONTRACT
    assert set(summary_of(two_ranks)) >= SUMMARY
    rows = rows_of(two_ranks)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row) >= METRICS
    summary, config = summary_of(two_ranks), json.loads((two_ranks / "run_config.json").read_text())
    assert summary["train_tokens"] == sum(row["real_tokens"] for row in rows)
    assert summary["perplexity_after"] == pytest.approx(math.exp(summary["eval_loss_after"]))
    assert summary["world_size"] == 2
    assert len(config["plan"]["data_sha256"]) == 64
    assert config["plan"]["zero_config"]["zero_optimization"]["stage"] == 3
    for picture in ("loss.png", "memory.png"):
        assert (two_ranks / picture).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.long
def test_rehearsal_learns(start, tiny_model, tmp_path):
    flags = ["--rehearse", "--model_name_or_path", tiny_model, "--seed", 1, "--max_steps", 20]
    code, text = start(*flags, "--output_dir", tmp_path / "out").wait()
    assert code == 0, text
    summary = summary_of(tmp_path / "out")
    assert summary["eval_loss_after"] < 0.95 * summary["eval_loss_before"]


@pytest.mark.long
def test_learning_rate_zero_learns_nothing(start, quick, tmp_path):
    code, text = start(
        *quick, "--max_steps", "1", "--learning_rate", "0", "--output_dir", tmp_path / "out"
    ).wait()
    assert code == 0, text
    summary = summary_of(tmp_path / "out")
    assert summary["eval_loss_after"] == summary["eval_loss_before"]


def allow_fp16_on_cpu():
    """DeepSpeed asks the CPU for fp16 instructions; its own fp16 path runs without them, slowly."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


@pytest.mark.parametrize(
    ("flags", "scale_power", "scales", "diagnosis"),
    [
        # The adapter's gradients are scaled with alpha / r: they overflow at every loss scale, down to the lowest.
        pytest.param(
            ["--lora_alpha", "2000000000"],
            1,
            [2, 1, 1, 1],
            "the forward pass is finite, so gradients overflow (first: base_model.model.model.layers.",
            marks=pytest.mark.long,
        ),
        # The first update throws the adapter so far that the next forward overflows.
        (
            ["--learning_rate", "1e5"],
            14,
            [2**14, 2**14, 2**13, 2**12, 2**11],  # dynamic: the adapters really train in fp16
            "the forward pass is already non-finite (base_model.model.model.layers.0.",
        ),
    ],
)
def test_fp16_overflow_ends_with_a_diagnosis(start, quick, tmp_path, flags, scale_power, scales, diagnosis):
    def give_up_early():
        from lora_sft import watch

        allow_fp16_on_cpu()
        watch.MAX_SKIPPED_IN_A_ROW = 4

    config = json.loads((ROOT / "deepspeed" / "zero3.json").read_text())
    config["fp16"]["initial_scale_power"] = scale_power
    (tmp_path / "zero.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    common = [
        "--dtype",
        "fp16",
        "--save_steps",
        "1",
        "--warmup_ratio",
        "0",
        "--deepspeed",
        tmp_path / "zero.json",
    ]
    code, text = start(*quick, *common, *flags, "--output_dir", out, patch=give_up_early).wait()
    assert code == 2, text
    assert "4 updates in a row were skipped for overflow" in text
    assert diagnosis in text
    assert "last good checkpoint: none yet" in text  # the update before the first bad step may have done it
    assert len(list(out.glob("checkpoint-*"))) <= 1  # nothing is saved while updates are skipped
    rows = rows_of(out)  # without the last step's: the run ends before it is logged
    assert [row["loss_scale"] for row in rows] == scales[: len(rows)]
    assert [row["skipped_update"] for row in rows][-3:] == [True] * 3
    assert text.count("error:") == 1  # both ranks raise, one line is printed


def test_divergence_outside_fp16_ends_the_run(start, quick, tmp_path):
    """There is no loss scale that could help: the next update would spoil the adapter for good."""
    flags = [*quick, "--learning_rate", "1e30", "--warmup_ratio", "0", "--output_dir", tmp_path / "out"]
    code, text = start(*flags).wait()
    assert code == 2, text
    assert "the loss is not finite (step 2" in text
    assert "the forward pass is already non-finite (base_model.model.model.layers.0." in text
    assert rows_of(tmp_path / "out")[-1]["step"] == 1


def test_a_model_that_sees_other_documents_is_refused(start, quick, tmp_path):
    def break_packing():
        from lora_sft import watch

        def leaky(model, batch):
            ones = batch["input_ids"].new_ones(batch["input_ids"].shape)  # a mask switches the detection off
            return model(**{k: v for k, v in batch.items() if k != "labels"}, attention_mask=ones).logits

        watch.logits_of = leaky

    code, text = start(*quick, "--output_dir", tmp_path / "out", patch=break_packing).wait()
    assert code == 2
    assert "packing self-test: packed documents see each other" in text


def test_logits_of_answers_only_give_the_whole_loss(libraries, tiny_model, tokenizer, scratch):
    """The loss and the gradient of what is computed in training equal those of all logits; a micro-batch
    without any answer has the loss 0 and a backward pass all the same."""
    from lora_sft import data
    from lora_sft.model import answers_only, to_device

    def compare() -> int:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        rows = data.read_file(ROOT / "rehearsal" / "preferences.jsonl")[:12]
        packed = data.pack(data.tokenise(rows, tokenizer, 192)[0], 192, 0)
        batch = to_device(packed, slice(0, 3), torch.device("cpu"))

        def loss_and_gradient(labels, **more):
            model.zero_grad()
            output = model(**batch | {"labels": labels}, **more, num_items_in_batch=100, use_cache=False)
            output.loss.backward()
            return output.loss.item(), model.model.layers[0].mlp.up_proj.weight.grad.clone(), output.logits

        loss, gradient, logits = loss_and_gradient(batch["labels"])
        assert logits.shape[:2] == batch["labels"].shape
        for labels in (batch["labels"], torch.full_like(batch["labels"], data.IGNORE)):
            with answers_only(model, labels) as shift_labels:
                found, its_gradient, logits = loss_and_gradient(labels, shift_labels=shift_labels)
            answers = int((labels[:, 1:] != data.IGNORE).sum())
            assert logits.shape[:2] == shift_labels.shape == (1, answers)
            if answers:
                assert abs(found - loss) < 1e-5 * loss
                assert (its_gradient - gradient).norm() < 1e-5 * gradient.norm()
            else:
                assert found == 0
                assert not its_gradient.any()
        assert model(**batch).logits.shape[:2] == batch["labels"].shape  # the hook is gone
        return 0

    code, text = fork(compare, scratch / "answers.txt").wait()
    assert code == 0, text


def test_packed_loss_equals_separate_documents(libraries, tiny_model, tokenizer, scratch):
    """Token-weighted loss of packed rows = that of every document alone."""
    from lora_sft import data
    from lora_sft.train import evaluate

    def compare() -> int:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        rows = data.read_file(ROOT / "rehearsal" / "preferences.jsonl")[:12]
        documents, _ = data.tokenise(rows, tokenizer, 192)
        packed = data.pack(documents, 192, 0)
        alone = [data.pack([document], 192, 0) for document in documents]
        assert len(packed) < len(alone)
        device = torch.device("cpu")
        losses = [evaluate(model, one, 1, device) * (one.labels[:, 1:] != -100).sum() for one in alone]
        counts = sum((one.labels[:, 1:] != -100).sum() for one in alone)
        assert abs(evaluate(model, packed, 2, device) - sum(losses) / counts) < 1e-5
        return 0

    code, text = fork(compare, scratch / "packed.txt").wait()
    assert code == 0, text
