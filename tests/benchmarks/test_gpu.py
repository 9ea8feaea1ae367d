"""The bench for one GPU, on tiny shapes and the processor: floors, parts, what fails, arguments, and the script."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import gpu_models
import pytest
from gpu_models import SHAPES, TINY, Shape, copy_bandwidth, make_model, matmul_rate

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "millions"), [("0.6B", 596), ("1.7B", 1720), ("8B", 8190)])
def test_shapes_have_the_sizes_of_qwen3(name: str, millions: int) -> None:
    shape = SHAPES[name]
    embeddings = shape.ids * shape.hidden_size * (1 if shape.tied else 2)
    assert (shape.layers * shape.layer_weights + embeddings) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("name", [*TINY])
def test_a_floor_counts_the_weights_and_the_cache_that_a_model_has(name: str) -> None:
    shape = TINY[name]
    model: Any = make_model(shape, "cpu")
    matrices = [weight for key, weight in model.named_parameters() if weight.dim() == 2 and "embed_tokens" not in key]
    head = [] if not shape.tied else [model.get_output_embeddings().weight]
    assert shape.read_bytes == sum(weight.nbytes for weight in [*matrices, *head])
    cache = model(input_ids=gpu_models.torch.ones(1, 5, dtype=gpu_models.torch.int64)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 5 * shape.cache_bytes


def test_operations_of_a_forward_are_two_a_weight_and_four_a_pair() -> None:
    shape = Shape(4, 8, 1, 2, 1, 2, 10, tied=True)
    # 4·2·(2+1)·2 + 3·4·8 = 48 + 96 weights for each of 3 tokens, a head of 40 at 2 of them, 6 pairs of 2·2 numbers
    assert shape.layer_weights == 144
    assert shape.forward_flops(1, 2) == 2 * 144 * 3 + 2 * 40 * 2 + 4 * 4 * 6


def test_the_device_s_speeds_are_measured() -> None:
    assert copy_bandwidth("cpu", 1 << 16) > 1e6
    assert matmul_rate("cpu", 32) > 1e5


# --- parts -----------------------------------------------------------------------------------------------------------


def arguments_of(work: Path, **changes: Any) -> argparse.Namespace:
    given = {"device": "cpu", "tiny": True, "repeats": 2, "work": work, "out": work / "out.json", "part": None}
    return argparse.Namespace(**given | {"parts": []} | changes)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "points"), [("engine", 4), ("scorer", 2), ("learner", 2)])
def test_a_part_is_measured_against_its_floor(part: str, points: int, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    gpu.PARTS[part](arguments_of(tmp_path), found.append)
    assert len(found) == points
    for one in found:
        speed, share = one["tokens_per_s"], one["share_of_floor"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert share["median"] == pytest.approx(speed["median"] / one["floor_tokens_per_s"])
        assert one["peak_memory_mb"] > 0
    assert all(0 <= one["self_test"] < 0.05 for one in found if part != "learner")
    text = gpu.table({"device": "cpu", "machine": {"torch": "2"}, "parts": {part: {"points": found}}})
    assert text.count("\n| ") == points + 2 and "FAILED" not in text
    assert ("from a plain forward's" in text) == (part != "learner")
    assert (tmp_path / "1.7B/model.safetensors").is_file() == (part == "learner")  # the large teacher never is


@pytest.mark.slow
def test_a_compiled_step_is_measured_beside_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, and not translated to C++: that takes long, and tests/actors/engine/test_compiled.py does it."""

    def traced(function: Any, device: Any) -> Any:
        return gpu_models.torch.compile(function, dynamic=True, backend="eager")

    for module in ("slots", "decode"):
        monkeypatch.setattr(f"actors.engine.{module}.compiled", traced)
    found: list[dict[str, Any]] = []
    gpu.compiled(arguments_of(tmp_path), found.append)
    (one,) = found
    assert one["ratio"]["min"] > 0 and one["compile_s"] > 0
    text = gpu.table({"device": "cpu", "machine": {"torch": "2"}, "parts": {"compiled": {"points": found}}})
    assert text.count("\n| ") == 3


@pytest.mark.slow
def test_a_point_without_enough_memory_is_reported_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode_speed(model: Any, pair: Any, config: Any, prompts: Any, tokens: int) -> float:
        if len(prompts) == 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return 5.0

    monkeypatch.setattr(gpu, "decode_speed", decode_speed)
    found: list[dict[str, Any]] = []
    gpu.engine(arguments_of(tmp_path), found.append)
    assert [(one["slots"], "out_of_memory" in one) for one in found] == [(2, False), (4, True)] * 2
    assert "| 0.6B | 4 | out of memory | – | – | – |" in gpu.table(
        {"device": "cpu", "machine": {"torch": "2"}, "parts": {"engine": {"points": found}}}
    )


def test_a_part_that_fails_is_reported_with_its_points_and_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import json, sys\njson.dump([{'slots': 1}], open(sys.argv[6] + '/engine.json', 'w'))\nsys.exit('no luck')"
    (tmp_path / "gpu.py").write_text(script)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    found = gpu.run_part("engine", arguments_of(tmp_path))
    assert (found["error"], found["points"], found["log"].strip()) == ("ended with 1", [{"slots": 1}], "no luck")
    script = "import json, sys\njson.dump([{'self_test': 'they disagree'}], open(sys.argv[6] + '/engine.json', 'w'))"
    (tmp_path / "gpu.py").write_text(script)
    assert gpu.run_part("engine", arguments_of(tmp_path))["error"] == "they disagree"
    (tmp_path / "gpu.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(gpu, "SMALL", replace(gpu.SMALL, limits_s={"scorer": 0.3}))
    found = gpu.run_part("scorer", arguments_of(tmp_path))
    assert (found["error"], found["points"]) == ("not done within 0 s", []) and found["seconds"] < 30


def test_a_failed_part_does_not_end_the_others_and_is_in_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_part(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
        assert arguments.work.is_dir()
        failed = {"error": "ended with 1", "log": "a traceback"} if part == "engine" else {}
        return {"seconds": 1.0, "points": [], **failed}

    monkeypatch.setattr(gpu, "run_part", run_part)
    words = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "o.json")]
    assert gpu.main([*words, "--only", "scorer,engine"]) == 1
    said = capsys.readouterr()
    assert "FAILED: engine: ended with 1" in said.out and "a traceback" in said.err
    assert [*json.loads((tmp_path / "o.json").read_text())["parts"]] == ["engine", "scorer"]
    assert gpu.main([*words, "--only", "loop"]) == 0


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cpu", "--tiny"], "expected --out"),
        (["--device", "tpu", "--out", "{}/o.json"], "--device 'tpu': expected cuda, cuda:N or cpu"),
        (["--device", "cpu", "--out", "{}/o.json"], "the real shapes are for a GPU; expected --tiny"),
        (["--device", "cuda:99", "--out", "{}/o.json"], "--device cuda:99: torch sees"),
        (["--device", "cpu", "--tiny", "--out", "{}"], "expected a file in a folder that is there"),
        (["--device", "cpu", "--tiny", "--out", "{}/o.json", "--only", "head"], "--only: 'head' is not a part"),
        (["--device", "cpu", "--tiny", "--out", "{}/o.json", "--repeats", "x"], "a whole number of at least 1"),
    ],
)
def test_bad_arguments_exit_with_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        gpu.main([word.format(tmp_path) for word in words])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_the_limits_of_all_parts_are_under_ten_minutes() -> None:
    assert gpu.BIG.limits_s.keys() == gpu.PARTS.keys()
    assert sum(gpu.BIG.limits_s.values()) <= 600 - 4 * gpu._GRACE_S  # and imports


def script(*words: str, python: str = "") -> subprocess.CompletedProcess[str]:
    own = {"PYTHON": python} if python else {}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
    return subprocess.run(
        [str(ROOT / "benchmarks/gpu.sh"), *words], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
def test_the_script_runs_the_whole_loop_on_the_processor(tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    done = script("--device", "cpu", "--tiny", "--only", "loop", "--out", str(path))
    assert done.returncode == 0, done.stderr
    [point] = json.loads(path.read_text())["parts"]["loop"]["points"]
    assert point["steps_per_s"] > 0 and point["tokens_forwarded_per_token_scored"] >= 1
    assert "| 0.6B, 1.7B |" in done.stdout


def test_a_python_without_the_packages_is_refused_in_one_sentence(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    done = script("--device", "cpu", "--tiny", "--out", str(tmp_path / "o.json"), python=str(bare))
    assert done.returncode == 2
    assert "lacks torch>=2.8, transformers>=5.23, redis>=6.4" in done.stderr and "as wheels in" in done.stderr


def test_what_the_python_lacks_comes_from_wheels(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    (folder / "wheels").mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks/gpu.sh", folder)
    name, facts = "carried", "carried-1.0.dist-info"
    with zipfile.ZipFile(folder / "wheels" / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "WORD = 'here'")
        wheel.writestr(f"{facts}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{facts}/RECORD", "")
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["carried>=1.0", "pytest>=8"]\n')
    (folder / "gpu.py").write_text(
        "import carried, sys\nprint(carried.WORD, carried.__file__, *sys.argv[1:])\nsys.exit(3)"
    )
    environment = os.environ | {"PYTHON": sys.executable}
    command = [str(folder / "gpu.sh"), "--out", "x y"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 3, done.stderr
    word, place, *words = done.stdout.split(maxsplit=2)
    assert (word, words) == ("here", ["--out x y\n"])
    assert not Path(place).exists()  # nothing is left behind
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["carried>=1.1", "pytest>=8"]\n')
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, "lacks carried>=1.1 (it has 1.0); expected" in done.stderr) == (2, True)
