"""The saved adapter: key set, faults that must be found, round trip, merging into a plain model."""

import json
import re
import shutil

import pytest

from harness import fork, in_child

LAYERS, MODULES = 4, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def trained(adapter):
    return adapter


def expected_keys() -> set[str]:
    return {
        f"base_model.model.model.layers.{layer}.{'mlp' if 'gate' in m or 'up' in m or 'down' in m else 'self_attn'}"
        f".{m}.lora_{side}.weight"
        for layer in range(LAYERS)
        for m in MODULES
        for side in "AB"
    }


def test_exact_key_set(trained):
    from safetensors.numpy import load_file

    stored = load_file(trained / "adapter_model.safetensors")
    assert set(stored) == expected_keys()
    assert all(tensor.shape[0 if "lora_A" in name else 1] == 16 for name, tensor in stored.items())
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 32)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda t, name: t.pop(name), "1 keys missing"),
        (lambda t, name: t.update(surplus=t[name]), "1 unexpected keys, e.g. surplus"),
        (lambda t, name: t.update({name: t[name][:0]}), "is empty"),
        (lambda t, name: t.update({name: t[name] * float("nan")}), "has non-finite values"),
        (lambda t, name: [x.zero_() for key, x in t.items() if "lora_B" in key], "every lora_B is zero"),
    ],
)
def test_faults_are_found(trained, tmp_path, fault, found):
    def look():
        from safetensors.torch import load_file

        from lora_sft import adapter

        stored = load_file(trained / "adapter_model.safetensors")
        assert adapter.problems(stored, expected_keys()) == []
        fault(stored, min(stored))
        problems = adapter.problems(stored, expected_keys())
        assert any(found in problem for problem in problems), problems

    in_child(look, tmp_path)


def test_a_file_that_differs_from_the_live_tensors_is_a_bug(start, quick, tmp_path):
    """exit code 1, no summary: the run does not count as finished."""

    def corrupt():
        from lora_sft.train import PackedTrainer

        save = PackedTrainer.save_model

        def spoiled(self, output_dir=None, _internal_call=False):
            save(self, output_dir, _internal_call)
            if output_dir is None and self.args.process_index == 0:
                from safetensors.torch import load_file, save_file

                path = f"{self.args.output_dir}/adapter_model.safetensors"
                tensors = load_file(path)
                tensors[max(tensors)] += 1e-3
                save_file(tensors, path)

        PackedTrainer.save_model = spoiled

    code, text = start(*quick, "--max_steps", "2", "--output_dir", tmp_path / "out", patch=corrupt).wait()
    assert code == 1
    assert "differs from the live tensor" in text
    assert not (tmp_path / "out" / "summary.json").exists()


def test_reloaded_by_peft_gives_the_evaluated_loss(trained, tiny_model, tokenizer, tmp_path):
    def compare():
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        from harness import ROOT
        from lora_sft import data
        from lora_sft.train import evaluate

        config = json.loads((trained / "run_config.json").read_text())["arguments"]
        rows = data.read_file(ROOT / "rehearsal" / "preferences.jsonl")
        _, held_out = data.split_rows(
            rows, [], config["max_train_rows"], config["max_eval_rows"], config["seed"]
        )
        packed = data.prepare(held_out, tokenizer, config["max_seq_len"], 2, "eval")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), trained)
        loss = evaluate(model, packed, 2, torch.device("cpu"))
        expected = json.loads((trained / "summary.json").read_text())["eval_loss_after"]
        assert abs(loss - expected) < 1e-6, (loss, expected)

    in_child(compare, tmp_path)


@pytest.fixture
def merge(transformers, tmp_path):
    """merge(*flags) -> (exit code, output) of merge_adapter.py."""
    import merge_adapter

    return lambda *flags: fork(
        lambda: merge_adapter.main([str(flag) for flag in flags]), tmp_path / "merge.txt"
    ).wait()


@pytest.fixture
def spoil(trained, tmp_path):
    """spoil(change) -> a copy of the adapter whose tensors went through `change(tensors)`."""

    def copy(change):
        from safetensors.numpy import load_file, save_file

        shutil.copytree(trained, tmp_path / "spoiled", ignore=shutil.ignore_patterns("checkpoint-*"))
        tensors = load_file(trained / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "spoiled" / "adapter_model.safetensors")
        return tmp_path / "spoiled"

    return copy


def test_merged_model_equals_base_with_adapter(trained, merge, tmp_path):
    code, text = merge("--adapter", trained, "--output_dir", tmp_path / "merged")
    assert code == 0, text
    assert "28 weights changed" in text

    def compare():
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = json.loads((trained / "adapter_config.json").read_text())["base_model_name_or_path"]
        reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained).eval()
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        ids = AutoTokenizer.from_pretrained(tmp_path / "merged").apply_chat_template(
            [{"role": "user", "content": "How do I boil an egg?"}],
            add_generation_prompt=True,
            return_tensors="pt",
        )["input_ids"]
        with torch.no_grad():
            assert (merged(ids).logits - reference(ids).logits).abs().max() < 1e-4
            with reference.disable_adapter():
                assert (merged(ids).logits - reference(ids).logits).abs().max() > 1e-2

    in_child(compare, tmp_path)


def test_merging_needs_an_adapter_a_base_and_an_empty_folder(trained, merge, tmp_path):
    code, text = merge("--adapter", tmp_path, "--output_dir", tmp_path / "m")
    assert code == 2
    assert "no adapter_config.json; give the folder of a finished fine-tuning run" in text
    code, text = merge("--adapter", trained, "--base", "no/model", "--output_dir", tmp_path / "m")
    assert code == 2
    assert "name it with --base" in text
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    code, text = merge("--adapter", trained, "--output_dir", tmp_path / "full")
    assert code == 2
    assert "is not empty" in text


@pytest.mark.parametrize("changed", [{"hidden_size": 64, "intermediate_size": 96}, {"num_hidden_layers": 3}])
def test_merging_with_another_base_is_refused(trained, tiny_model, merge, tmp_path, changed):
    def build():
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(tiny_model, **changed)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")

    in_child(build, tmp_path)
    shutil.copyfile(tiny_model / "tokenizer.json", tmp_path / "other" / "tokenizer.json")
    code, text = merge("--adapter", trained, "--base", tmp_path / "other", "--output_dir", tmp_path / "m")
    assert code == 2, text
    assert "is it another base model?" in text
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "m.part").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(min(t)), "1 tensors are in one of them only"),
        (lambda t: [t[name].fill(0) for name in t if "lora_B" in name], "changes nothing in"),
        (lambda t: t[max(t)].fill(float("inf")), "has NaN or infinite values; the training diverged"),
        (lambda t: t[max(t)].fill(3e38), "PEFT cannot merge it"),
        (
            lambda t: [t.update({name.replace(".weight", ".default.weight"): t.pop(name)}) for name in list(t)],
            ".default",
        ),
    ],
)
def test_merging_a_spoiled_adapter_is_refused(spoil, merge, tmp_path, change, message):
    """PEFT alone fills in what is missing, and merges zeros, without an error."""
    code, text = merge("--adapter", spoil(change), "--output_dir", tmp_path / "m")
    assert code == 2, text
    assert message in text
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"something_new": 1}, "something_new cannot be merged here"),
        ({"layer_replication": [[0, 4]]}, "layer_replication cannot be merged here"),
        ({"r": "sixteen"}, "does not fit"),
        (
            {"base_model_name_or_path": "../Llama-2/"},
            "base model ../Llama-2/: no folder here .* name it with --base",
        ),
        ({"base_model_name_or_path": "saves/llama/tiny"}, "name it with --base"),
        ({"base_model_name_or_path": None}, "name it with --base"),
    ],
)
def test_merging_what_the_configuration_does_not_allow_is_refused(spoil, merge, tmp_path, changes, message):
    folder = spoil(lambda tensors: None)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
    code, text = merge("--adapter", folder, "--output_dir", tmp_path / "m")
    assert code == 2, text
    assert re.search(message, text.splitlines()[-1])


def make_adapter(base, folder, **options) -> None:
    """By PEFT, with an effect."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)


def test_patterns_and_embeddings_are_merged_as_by_peft(tiny_qwen2, merge, tmp_path):
    """PEFT's own file: it holds the embeddings that LoRA targets, too."""
    names = ["q_proj", "v_proj", "embed_tokens", "lm_head"]
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.self_attn.v_proj": 64}}
    in_child(lambda: make_adapter(tiny_qwen2, tmp_path / "a", target_modules=names, **patterns), tmp_path)
    code, text = merge("--adapter", tmp_path / "a", "--output_dir", tmp_path / "m")
    assert code == 0, text
    assert "10 weights changed" in text

    def compare():
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_qwen2), tmp_path / "a")
        expected = expected.merge_and_unload().state_dict()
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[name], expected[name]) for name in merged)

    in_child(compare, tmp_path)


def test_one_of_two_tied_embeddings_cannot_be_merged(tiny_qwen2, merge, tmp_path):
    def build():
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(tiny_qwen2, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
        make_adapter(tmp_path / "tied", tmp_path / "a", target_modules=["q_proj", "embed_tokens"])

    in_child(build, tmp_path)
    shutil.copyfile(tiny_qwen2 / "tokenizer.json", tmp_path / "tied" / "tokenizer.json")
    code, text = merge("--adapter", tmp_path / "a", "--output_dir", tmp_path / "m")
    assert code == 2, text
    assert "changes one of two tied embeddings" in text


def test_what_is_remembered_is_what_a_walk_finds(tiny_model, tmp_path):
    def look():
        from transformers import AutoModelForCausalLM

        from lora_sft.arguments import parse
        from lora_sft.model import add_adapters, remember_modules

        model = add_adapters(AutoModelForCausalLM.from_pretrained(tiny_model), parse([]))
        layer = model.get_base_model().model.layers[1]
        remember_modules(model)
        for module in (model, layer):
            walk = type(module).named_parameters
            assert list(module.named_parameters()) == list(walk(module))
            assert list(module.named_parameters("a")) == list(walk(module, "a"))
            assert list(module.named_parameters(recurse=False)) == list(walk(module, recurse=False))
        assert [*model.modules(), *model.modules()] == 2 * list(type(model).modules(model))
        for mode in (False, False, True, True):
            assert model.train(mode) is model
            assert {module.training for module in model.modules()} == {mode}
        model.eval()
        assert not layer.training

    in_child(look, tmp_path)
