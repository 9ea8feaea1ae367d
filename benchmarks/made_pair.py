"""Makes a pair of random models in which arithmetic decides the speed, with prompts and a config.

    .venv/bin/python benchmarks/made_pair.py runs/made-pair [--seed 0]

Student and teacher are Qwen3 models of about 10 and 30 million parameters over 8,192 ids: large enough that a step is
matrix products and not overhead, small enough for two CPU cores. Nothing sensible can be learned from them. Their end
token has a probability of practically 0, so every rollout is as long as the limit, whoever writes it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

IDS = 8192
PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
_SPECIALS = {"<pad>": PAD_ID, "<eos>": EOS_ID, "<unk>": UNKNOWN_ID}
PROMPT_WORDS = (16, 32)  # fewest and most of a prompt
PROMPTS = 2048
MAX_COMPLETION = 512
_CONSTANT = 4.0  # the residual's first number, the same at every position and depth
_END_LOGIT = -60.0  # about: of the end token
_LOGIT_SD = 2.0  # of the others: neither all alike nor one certain


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a model; its heads are 64 wide."""

    hidden_size: int
    intermediate_size: int
    layers: int


STUDENT = Shape(hidden_size=256, intermediate_size=768, layers=7)
TEACHER = Shape(hidden_size=448, intermediate_size=1344, layers=9)


def make_tokenizer(ids: int = IDS) -> PreTrainedTokenizerFast:
    """One token a word ("w17"), between spaces; `ids` of them with the three special ones."""
    vocabulary = _SPECIALS | {f"w{number}": number for number in range(len(_SPECIALS), ids)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=PROMPT_WORDS[1] + MAX_COMPLETION,
    )


def make_model(shape: Shape, seed: int) -> Qwen3ForCausalLM:
    """Random weights, float32. The end token's row of the head reads only the residual's constant, negatively."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=IDS,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.hidden_size // 64,
            num_key_value_heads=shape.hidden_size // 64,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
            dtype="float32",
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        model.model.embed_tokens.weight[:, 0] = _CONSTANT
        for layer in model.model.layers:  # no layer adds to the first number
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        head = model.lm_head.weight.normal_(std=_LOGIT_SD / shape.hidden_size**0.5)
        head[:, 0] = 0.0
        head[EOS_ID] = 0.0
        head[EOS_ID, 0] = _END_LOGIT / _CONSTANT
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    return model


def make_config(folder: Path) -> str:
    """A YAML config of a run on the pair in `folder`."""
    tree = {
        "name": "made",
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher"), "slots": 64},
        "data": {
            "task": "dataset",
            "path": str(folder / "prompts.jsonl"),
            "verifier": "none",
            "max_prompt_length": PROMPT_WORDS[1],
        },
        "rollout": {"slots": 32, "chunk_tokens": 32, "max_completion_length": MAX_COMPLETION},
        "termination": {
            "policy": "none",
            "window": 32,
            "patience": 4,
            "grace_tokens": 64,
            "eta": 0.6,
            "teacher_top_k": 32,
            "min_calibration": 64,
            "buffer_size": 512,
            "warmup_steps": 3,
            "control_fraction": 0.2,
        },
        "learner": {"max_steps": 20, "batch_size": 32, "learning_rate": 5.0e-4, "warmup_ratio": 0.05},
        "eval": {"every_steps": 0},
        "redis": {"maxmemory_mb": 2048},
    }
    head = "# Made by benchmarks/made_pair.py: a random pair, on which only speed can be measured.\n"
    return head + yaml.safe_dump(tree, sort_keys=False)


def make_pair(folder: Path, *, seed: int = 0) -> Path:
    """Write student/, teacher/, prompts.jsonl and made.yaml into `folder`; returns the config's path.

    The same seed and versions of the packages give the same files.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        for number, (name, shape) in enumerate((("student", STUDENT), ("teacher", TEACHER))):
            make_model(shape, 2 * seed + number).save_pretrained(folder / name)
            make_tokenizer().save_pretrained(folder / name)
    write_prompts(folder / "prompts.jsonl", seed=seed)
    config = folder / "made.yaml"
    config.write_text(make_config(folder))
    return config


def write_prompts(path: Path, *, seed: int, ids: int = IDS) -> None:
    """Rows of a prompt each: random words of `make_tokenizer(ids)`."""
    rng, words = random.Random(seed), [f"w{number}" for number in range(len(_SPECIALS), ids)]
    rows = [{"prompt": " ".join(rng.choices(words, k=rng.randint(*PROMPT_WORDS)))} for _ in range(PROMPTS)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where to write the pair, for example runs/made-pair")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    if arguments.seed < 0:
        parser.error(f"--seed {arguments.seed}: expected a whole number from 0")
    if arguments.folder.is_file():
        parser.error(f"{arguments.folder}: is a file; expected a folder, new or to be written over")
    print(make_pair(arguments.folder, seed=arguments.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
