"""The benchmarks run, and the test that compares chains can tell alike from different."""

import copy
import json
import subprocess
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from recorder import use_recorder

from puma_lightning import ProgressiveUnmasking
from puma_lightning.chain.student import Sample

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str):
    @pytest.fixture
    def imported(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return import_module(name)

    return imported


published_chain, published = script("published_chain"), script("_published")
train_step, block, sampling, data = script("train_step"), script("block"), script("sampling"), script("data")
eos, host, gpu = script("eos"), script("host"), script("gpu")


@pytest.fixture
def bytes_of_a_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``bytes.py``, whose name is that of nothing to import but of a type too."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = spec_from_file_location("bytes_of_a_step", BENCHMARKS / "bytes.py")
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_bytes_are_those_counted_by_hand(bytes_of_a_step):
    counts = bytes_of_a_step.Counts()
    x, weight, buffer = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, 5)
    with counts:
        counts.part = "product"
        product = x @ weight.t()
        counts.part = "in place"
        product.exp_()
        counts.part = "into a buffer"
        torch.sub(product, 1.0, out=buffer)
        counts.part = "chosen"
        buffer.gather(1, torch.zeros(3, 1, dtype=torch.long))
        counts.part = "copied"
        buffer.copy_(product)
    found = {name: (each["operators"], each["read"], each["written"]) for name, each in counts.found.items()}
    assert found.pop("chosen")[1:] == (3 * 4 + 3 * 8 + 0, 3 * 4 + 3 * 8)  # with the zeros that are made for the index
    assert found == {
        "product": (1, 4 * (12 + 20), 4 * 15),
        "in place": (1, 4 * 15, 4 * 15),
        "into a buffer": (1, 4 * 15, 4 * 15),
        "copied": (1, 4 * 15, 4 * 15),
    }
    assert counts.found["product"]["flops"] == 2 * 3 * 4 * 5


def test_bytes_of_all_parts_of_a_step_are_counted(bytes_of_a_step):
    shape = copy.deepcopy(bytes_of_a_step.SHAPES["tinygsm"])
    shape["backbone"] |= {"num_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    parts = bytes_of_a_step.count(shape, ProgressiveUnmasking(4, threshold=0.9))
    assert {"backbone, forward", "head and loss", "backward", "clipping", "optimizer", "average"} < set(parts)
    logits = shape["masked"] * shape["backbone"]["vocab_size"]
    moved = parts["head and loss"]["read"] + parts["head and loss"]["written"]
    assert 32 * logits < moved < 36 * logits


def test_script_is_a_function_of_sequence_position_and_count(published_chain):
    setting = published_chain.Setting("", 12, (2, 5), 4)
    x0, prompt_mask = published_chain.sequences(np.array([7, 8, 7], np.uint64), setting)
    assert x0[0].equal(x0[2]) and prompt_mask[0].equal(prompt_mask[2]) and not x0[0].equal(x0[1])
    assert set(prompt_mask.sum(1).tolist()) <= {2, 5}
    log_probs = published_chain.scripted_log_probs(x0, torch.tensor([3, 3, 4]))
    assert log_probs.exp().sum(-1).allclose(torch.ones(3, 12))
    assert log_probs.isneginf().nonzero()[:, 2].unique().tolist() == [published_chain.MASK]
    assert not log_probs[0].equal(log_probs[2])


def test_comparison_of_chains_tells_alike_from_different(published_chain):
    rng = np.random.default_rng(0)

    def chains(shift: float):
        revealed = rng.integers(0, 5, (1500, 4)) + (rng.random((1500, 1)) < shift)
        number = np.arange(1500).repeat(4)
        cells = np.stack([number, 0 * number, np.tile(np.arange(4), 1500), revealed.ravel()], axis=1)
        return published_chain.Started(cells, np.full(1500, 4))

    def p_value(one, other) -> float:
        return published_chain.compare(published_chain.occupancy(one, other), rng)["p"]

    alike = [p_value(chains(0), chains(0)) for _ in range(10)]
    assert min(alike) > 1e-3 and max(alike) > 0.2
    assert p_value(chains(0), chains(0.1)) < 1e-3


def test_train_step_measures_all_processes(train_step):
    shape = train_step.Shape(8, 16, 1, 2, False, 6, 8, 2, 4, 3)
    measured = train_step.measure(shape, rounds=2, warmup=1, accelerator="cpu", precision="32-true", label="tiny")
    results = measured["results"]
    assert list(results) == ["RandomMasking", "PUMA", "PUMA tau=0.9"]
    for result in results.values():
        assert 0 < result["step_ms"]["min"] <= result["step_ms"]["median"] <= result["step_ms"]["max"]
    assert set(results["RandomMasking"]["ratios_to_baseline"]["step"].values()) == {1.0}


def test_the_host_is_timed_in_a_loop_and_under_a_trainer(host):
    assert 0 < host.in_a_loop(2, 4) < 60
    assert all(0 < host.under_a_trainer(steps, 4, 8) < 60 for steps in (1, 4))
    assert 0 < host.recorded(4, 12, 16) < 60


def test_train_step_takes_the_textbooks_step_in_turn(train_step):
    shape = train_step.Shape(8, 16, 1, 2, False, 6, 8, 2, 4, 3, tied=True)
    measured = train_step.measure(shape, 2, 1, "cpu", "32-true", "tiny", others=[train_step.TEXTBOOK])
    compared = measured["compared"]
    assert set(compared["times_as_fast"]) == {"textbook"}
    assert set(compared["masked_share"]) == {"PUMA tau=0.9", "textbook"}
    assert compared["seconds"]["textbook"]["min"] > 0


@pytest.mark.parametrize("large", [None, 1], ids=["logits", "statistics"])
def test_the_textbooks_step_is_ours(train_step, monkeypatch, large):
    """One step from the same weights on the same sequences, as the plain formula has it, gives the same gradients."""
    shape = train_step.Shape(8, 16, 1, 2, False, 6, 8, 2, 4, 3, tied=True)
    backbone = train_step.build(shape, torch.device("cpu"))
    textbook = train_step.Textbook(shape, copy.deepcopy(backbone), 1)
    monkeypatch.setattr(textbook.optimizer, "step", lambda: None)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    batch = textbook.stream.peek()
    textbook.step()
    module = train_step.MaskedDiffusion(backbone, shape.vocab_size - 1)
    module.large_vocabulary = large
    weights = torch.full((shape.batch_size,), 1 / shape.batch_size)
    module.loss(batch["chains"], weights)[0].backward()
    gradients = [[p.grad for p in net.parameters()] for net in (textbook.backbone, backbone)]
    torch.testing.assert_close(*gradients)


def test_sampling_gives_the_same_tokens_on_both_sides(sampling):
    sizes = "--batch-size 3 --length 12 --vocab-size 60 --hidden-size 16 --num-layers 1 --num-heads 2 --rounds 2"
    case = sampling.Case(sampling.parser().parse_args(sizes.split()))
    for side in case.sides:
        case.run(side)
    assert case.samples["ours"].equal(case.samples["textbook"])
    assert case.samples["ours"][case.prompt_mask].equal(case.xt[case.prompt_mask])


def test_data_measures_what_is_delivered_and_consumed(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = tmp_path / "small.yaml"
    small = yaml.safe_load((BENCHMARKS.parent / "configs/quickstart.yaml").read_text())
    small["data"]["init_args"].update(order=4, clues=6, num_train=70, num_val=4, num_test=4)
    small["model"]["init_args"]["backbone"]["init_args"].update(hidden_size=16, num_layers=1, max_length=16)
    small["model"]["init_args"]["forward_process"]["init_args"]["num_stages"] = 4
    config.write_text(yaml.safe_dump(small))
    measured = data.measure(config, rounds=2, batches=3, steps=4)
    assert measured["batch_size"] == 64 and measured["length"] == 16
    assert measured["sequences_consumed_per_second_at_most"] == pytest.approx(64 / measured["step_seconds"], rel=0.1)


def test_the_published_model_takes_our_weights_by_its_own_names(published):
    """Its MLP is w3(w1(x) * silu(w2(x))), so that w2 is the gate."""
    names = {
        "emb.weight": "embed_tokens.weight",
        "lm_head.weight": "lm_head.weight",
        "final_norm.weight": "norm.weight",
        "layers.3.attn_norm.weight": "layers.3.input_layernorm.weight",
        "layers.3.attn.q_proj.weight": "layers.3.self_attn.q_proj.weight",
        "layers.3.attn.o_proj.weight": "layers.3.self_attn.o_proj.weight",
        "layers.0.mlp_norm.weight": "layers.0.post_attention_layernorm.weight",
        "layers.0.mlp.w1.weight": "layers.0.mlp.up_proj.weight",
        "layers.0.mlp.w2.weight": "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.w3.weight": "layers.0.mlp.down_proj.weight",
    }
    assert {name: published.our_name(name) for name in names} == names
    with pytest.raises(SystemExit, match=r"layers.0.other"):
        published.our_name("layers.0.other")


def test_block_measures_both_sides_of_training_and_sampling(block):
    sizes = "--hidden-size 16 --num-layers 1 --num-heads 2 --vocab-size 32 --length 32 --num-blocks 2 4 --block-sizes 8"
    args = block.parser().parse_args([*sizes.split(), "--rounds", "2"])
    trained, sampled = block.train(args), block.generate(args)
    assert list(trained) == ["2", "4"] and list(sampled) == ["8"]
    for measured in (*trained.values(), *sampled.values()):
        (other,) = measured["times_as_fast"].values()
        assert other["cpu"]["of_medians"] > 0
    # 24 positions after the prompt of 8, two in each pass, and a pass to read each block but the last.
    assert sampled["8"]["forward_passes"] == 12 + 3


def test_ends_of_answers_are_told_apart(eos):
    program = "def simple_math_problem() -> int:\n    result = 3\n    return result"
    rows = [program + "\0\0", program, program[:-20] + "\0", program + "\nx = 1\0", program + "\0junk\0"]
    width = max(map(len, rows)) + 1
    tokens = torch.tensor([[7, *map(ord, row.ljust(width - 1, "\0" if "\0" in row else " "))] for row in rows])

    def decode(ids, given):
        return {"completion": "".join(map(chr, ids[1:].tolist())).split("\0")[0].rstrip(" ")}

    sample = Sample(tokens, torch.zeros_like(tokens), torch.arange(5))
    batch = {"prompt_mask": torch.arange(width).expand(5, -1) < 1, "answer": ["3"] * 5}
    found = eos.judged(sample, batch, SimpleNamespace(decode=decode, eos_id=0))
    assert found["right"] == [True, True, False, True, True]
    assert found["no_eos"] == [False, True, False, False, False]
    assert found["cut"] == [False, False, True, False, False]
    assert found["runs_on"] == [False, False, False, True, False]
    assert found["text_after_eos"] == [False, False, False, False, True]
    assert found["length"][0] == found["length"][4] == len(program) and found["passes"] == [0, 1, 2, 3, 4]


@pytest.fixture
def small_gpu_run(tmp_path):
    """``gpu.py`` on a CPU, as its command line runs it."""

    def run(*words: str) -> dict:
        command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
        subprocess.run([*command, *words], check=True, capture_output=True, timeout=200)
        assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
        return json.loads((tmp_path / "gpu.json").read_text())["parts"]

    return run


def test_every_part_of_the_gpu_benchmark_says_what_it_found(small_gpu_run):
    """Or why it found nothing, as on a CPU."""
    parts = small_gpu_run("--only", "capability", "tinygsm")
    assert parts["capability"]["skipped"]
    side, recorded = parts["tinygsm"]["compiled"], parts["tinygsm"]["recorded, 20 in an execution"]
    assert side["ms_a_step"] >= side["ms_of_the_host"] > 0
    assert recorded == {"skipped": "a CUDA graph needs a GPU"}


def test_a_part_that_fails_or_takes_too_long_is_told(monkeypatch, gpu):
    def dies(command, timeout, **options):
        if timeout < 1:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(stdout="Traceback", returncode=3)

    monkeypatch.setattr(gpu.subprocess, "run", dies)
    assert gpu.part("sudoku", 9) == {"failed": "ended with 3"}
    assert gpu.part("sudoku", 0.5) == {"failed": "not over after 0 s"}


def test_recorded_sides_of_the_gpu_benchmark_train(monkeypatch, gpu):
    """With the recorder in the place of CUDA; and recorded steps are the unrecorded ones there."""
    use_recorder(monkeypatch)
    args = SimpleNamespace(device="cpu", tiny=True)
    process = ProgressiveUnmasking(4, threshold=0.2)
    recorded = gpu.losses(gpu.run(args, "tinygsm", process, 16, 4, captured=True, executions=4, logger=False))
    with gpu.unrecorded():
        plain = gpu.losses(gpu.run(args, "tinygsm", process, 16, 4, captured=True, logger=False))
    assert len(recorded) == 20 and gpu.difference(recorded, plain) == 0
