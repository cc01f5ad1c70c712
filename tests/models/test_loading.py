"""What is not a model is refused in three parts, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from llmcourse import models
from llmcourse.errors import DeviceError, ModelError


def three_parts(error: BaseException) -> str:
    lines = str(error).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("  Try ")
    return str(error)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ModelError) as error:
        models.load(tmp_path / "nowhere")
    assert "nowhere" in three_parts(error.value)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json") as error:
        models.load(tmp_path)
    three_parts(error.value)


def test_pickle_weights_are_never_opened(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelError, match=r"no \.safetensors") as error:
        models.load(tmp_path)
    three_parts(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": 0}, "experts"),
        ({"attention_bias": True}, "bias"),
        ({"hidden_size": None, "drop": "hidden_size"}, "hidden_size"),
    ],
)
def test_a_family_or_feature_that_would_be_computed_wrongly_is_refused(change, says, tmp_path):
    config = {
        "model_type": "llama",
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config |= change
    config.pop(config.pop("drop", ""), None)
    with pytest.raises(ModelError) as error:
        models.ModelConfig.from_hf(config)
    assert says in three_parts(error.value)


def test_truncated_safetensors_are_refused(tmp_path):
    from .test_against_transformers import hf_checkpoint, save_tokenizer

    hf_checkpoint("Llama", tmp_path)
    save_tokenizer(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError) as error:
        models.load(tmp_path)
    three_parts(error.value)


def test_weights_of_other_sizes_than_the_config_says_are_refused(tmp_path):
    from .test_against_transformers import hf_checkpoint, save_tokenizer

    hf_checkpoint("Llama", tmp_path)
    save_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 132}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"\[132, 48\]") as error:
        models.load(tmp_path)
    three_parts(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: {k: t.to(torch.float8_e4m3fn) if "proj" in k else t for k, t in w.items()}, "float8"),
        (lambda w: {k: t.to(torch.int8) if "proj" in k else t for k, t in w.items()}, "int8"),
        (
            lambda w: w | {"model.layers.1.self_attn.o_proj.bias": torch.zeros(48)},
            "mixer.out.bias has no place",
        ),
    ],
    ids=["float8", "int8", "a bias more"],
)
def test_weights_that_would_be_taken_for_others_are_refused(change, says, tmp_path):
    from safetensors.torch import load_file, save_file

    from .test_against_transformers import hf_checkpoint, save_tokenizer

    hf_checkpoint("Llama", tmp_path)
    save_tokenizer(tmp_path)
    save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as error:
        models.load(tmp_path, device="cpu", dtype="float32")
    assert says in three_parts(error.value)


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe{", b"{"])
def test_a_config_that_is_no_table_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError) as error:
        models.load(tmp_path)
    three_parts(error.value)


def test_a_truncated_gguf_is_refused(tmp_path, gguf_path):
    short = tmp_path / "short.gguf"
    short.write_bytes(gguf_path.read_bytes()[:5_000_000])
    with pytest.raises(ModelError, match="truncated") as error:
        models.load(short)
    three_parts(error.value)


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "notes.gguf").write_text("hello")
    with pytest.raises(ModelError) as error:
        models.load(tmp_path / "notes.gguf")
    three_parts(error.value)


def test_cuda_without_a_gpu_is_refused_with_the_build_named():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceError, match=torch.__version__.replace("+", r"\+")) as error:
        models.loading.resolve_device("cuda")
    three_parts(error.value)


def test_the_command_line_prints_three_lines_and_fails(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "llmcourse.cli", "chat", "--model", str(tmp_path / "no"), "--prompt", "hi"],
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert len(run.stderr.strip().splitlines()) == 3


def test_importing_the_package_loads_neither_torch_nor_jupyter():
    code = (
        "import sys, time; t = time.perf_counter(); import llmcourse, llmcourse.cli, llmcourse.course; "
        "s = time.perf_counter() - t; "
        "heavy = {'torch', 'triton', 'matplotlib', 'IPython', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy; assert s < 0.5, s"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
