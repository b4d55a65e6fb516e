"""Memory of a conversion, measured by the kernel's own high-water mark in a process of
its own: the largest tensor and some scratch.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

MIB = 1024 * 1024
PROBE = """
import re, sys
from pathlib import Path
import megatron_ray.checkpoint.hf.__main__ as command

def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", status)[1]) * 1024

way, source, out, small, *options = sys.argv[1:]
# A small one first: what code is used is then in memory already (of torch's libraries
# alone that is tens of MiB).
assert command.main([way, small, out + "-small", *options]) == 0
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
assert command.main([way, source, out, *options]) == 0
print(memory("VmHWM") - before)
"""
"""Not ru_maxrss: a new program inherits that of the process that started it."""


def write_llama(folder: Path, layers: int, hidden: int) -> tuple[int, int]:
    """A folder of bf16 weights, a file per layer; (bytes of all, bytes of the largest
    tensor).
    """
    folder.mkdir()
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1000,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    weights |= {
        "mlp.gate_proj": (4 * hidden, hidden),
        "mlp.up_proj": (4 * hidden, hidden),
        "mlp.down_proj": (hidden, 4 * hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {
        **weights,
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    where: dict[str, str] = {}
    total = 0
    frame = {
        "model.embed_tokens.weight": (1000, hidden),
        "lm_head.weight": (1000, hidden),
        "model.norm.weight": (hidden,),
    }
    for part in range(layers + 1):
        named = (
            frame
            if part == layers
            else {
                f"model.layers.{part}.{name}.weight": shape
                for name, shape in shapes.items()
            }
        )
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in named.items()
        }
        save_file(tensors, folder / f"part-{part}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(named, f"part-{part}.safetensors")
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return total, 4 * hidden * hidden * 2


def peak_bytes(*arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def judge(tmp_path: Path, layers: int, hidden: int, least: int, spare: int) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux to measure a peak")
    total, largest = write_llama(tmp_path / "hf", layers, hidden)
    write_llama(tmp_path / "small", 1, 64)
    assert total >= least
    inwards = peak_bytes(
        "import", str(tmp_path / "hf"), str(tmp_path / "ours"), str(tmp_path / "small")
    )
    assert inwards <= spare + largest, f"import took {inwards // MIB} MiB of {total // MIB}"
    outwards = peak_bytes(
        "export",
        str(tmp_path / "ours"),
        str(tmp_path / "again"),
        str(tmp_path / "ours-small"),
        "--dtype",
        "bf16",
    )
    assert outwards <= spare + largest, (
        f"export took {outwards // MIB} MiB of {total // MIB}"
    )


def test_a_conversion_needs_the_largest_tensor_and_some_scratch(tmp_path: Path) -> None:
    judge(tmp_path, layers=6, hidden=1024, least=200 * 10**6, spare=64 * MIB)


@pytest.mark.parity
def test_two_gigabytes_are_converted_in_half_of_one(tmp_path: Path) -> None:
    judge(tmp_path, layers=16, hidden=2048, least=2 * 10**9, spare=512 * MIB)
