"""Memory, time and rounding of `gift merge` on a synthetic Llama-3-8B, and of PEFT where it fits.

    python benchmarks/merge_8b.py --folder /tmp/merge --layers 32            # 16 GB, ours only
    python benchmarks/merge_8b.py --folder /tmp/merge --layers 4 --vocab 32000 --peft

Weights are random, names and shapes those of Llama-3-8B. Each merge runs in its own process, whose
peak resident memory the operating system counts; "extra" is above what the process held after its
imports. PEFT loads, merges and saves the same model. Runs are repeated in turn, medians shown. The
rounding columns compare the first layer with float64 arithmetic rounded once.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from gift.storage.shards import ShardWriter, TensorSpec, open_checkpoint, open_shard, read_tensor

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128
RANK, ALPHA = 64, 128
SHARD_BYTES = 5_000_000_000
BLOCK = 1 << 24
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def model_shapes(layers: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of Llama-3-8B with another number of layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (HIDDEN,)
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in PROJECTIONS.items()}
        shapes[f"{prefix}post_attention_layernorm.weight"] = (HIDDEN,)
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocab, HIDDEN)}


def write_file(path: Path, shapes: dict[str, tuple[int, ...]], std: float, seed: int) -> None:
    """A safetensors file of random bf16 tensors."""
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    specs = [TensorSpec(name, "BF16", shape, sizes[name]) for name, shape in shapes.items()]
    writer = ShardWriter(path, specs, list(shapes), {"format": "pt"})
    generator = torch.Generator().manual_seed(seed)
    for name, size in sizes.items():
        writer.begin(name)
        for begin in range(0, size // 2, BLOCK):
            count = min(BLOCK, size // 2 - begin)
            writer.write((torch.randn(count, generator=generator) * std).bfloat16())
    writer.finish()


def make_model(folder: Path, layers: int, vocab: int) -> None:
    """Writes a sharded model folder."""
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in model_shapes(layers, vocab).items():
        size = 2 * torch.Size(shape).numel()
        if filled + size > SHARD_BYTES and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file, shapes, 0.02, number)
        weight_map |= dict.fromkeys(shapes, file)
    total = sum(path.stat().st_size for path in folder.iterdir())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def make_adapter(folder: Path, layers: int) -> None:
    """Writes a PEFT adapter of rank 64 on all linear layers, its delta some 1 % of the weights."""
    folder.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for name, (rows, width) in PROJECTIONS.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            shapes[f"{key}.lora_A.weight"] = (RANK, width)
            shapes[f"{key}.lora_B.weight"] = (rows, RANK)
    write_file(folder / "adapter_model.safetensors", shapes, 0.0035, 99)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.split(".")[1] for name in PROJECTIONS}),
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def run_ours(model: Path, adapter: Path, output: Path, residual: bool) -> dict[str, float]:
    """Merges in this process; seconds without imports, memory with and without them in MB."""
    from gift.config import MergeConfig
    from gift.merge.command import merge

    before = peak_memory()
    started = time.perf_counter()
    merge(
        MergeConfig(model=str(model), adapter=[str(adapter)], output=output, save_residual=residual)
    )
    return _usage(started, before)


def run_peft(model: Path, adapter: Path, output: Path, safe: bool) -> dict[str, float]:
    """Load, merge and save with PEFT in this process."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    before = peak_memory()
    started = time.perf_counter()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(loaded, str(adapter)).merge_and_unload(safe_merge=safe)
    merged.save_pretrained(str(output), max_shard_size="5GB")  # pyright: ignore
    return _usage(started, before)


def peak_memory() -> float:
    """This process's peak resident memory in MB.

    Linux's own figure: getrusage may report the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _usage(started: float, before: float) -> dict[str, float]:
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = peak_memory()
    cpu = used.ru_utime + used.ru_stime
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "extra": peak - before}


def rounding(model: Path, adapter: Path, output: Path) -> tuple[float, int]:
    """Elements of layer 0 per 10,000 that are not float64 rounded once; the worst error in ulps."""
    source, merged = open_checkpoint(model).tensors, open_checkpoint(output).tensors
    factors = {
        entry.name: entry
        for entry in open_shard(adapter / "adapter_model.safetensors").entries
        if ".layers.0." in entry.name
    }
    wrong, count, worst = 0, 0, 0
    for name in PROJECTIONS:
        key = f"base_model.model.model.layers.0.{name}"
        a, b = (read_tensor(factors[f"{key}.lora_{side}.weight"]).double() for side in "AB")
        weight = read_tensor(source[f"model.layers.0.{name}.weight"])
        truth = (weight.double() + (ALPHA / RANK) * (b @ a)).bfloat16()
        found = read_tensor(merged[f"model.layers.0.{name}.weight"])
        distance = (ordered_bits(truth) - ordered_bits(found)).abs()
        wrong += int((distance > 0).sum())
        worst = max(worst, int(distance.max()))
        count += distance.numel()
    return 1e4 * wrong / count, worst


def ordered_bits(values: torch.Tensor) -> torch.Tensor:
    """Bit patterns of bf16 numbers as integers in the order of the numbers."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -32768 - bits, bits)


def measure(options: argparse.Namespace, run: str) -> dict[str, float]:
    """One merge in a process of its own, its precision and its size; the output is removed."""
    command = [sys.executable, __file__, "--folder", str(options.folder), "--run", run]
    started = time.perf_counter()
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{run} failed:\n{finished.stderr[-2000:]}")
    wall = time.perf_counter() - started
    output = options.folder / f"out-{run}"
    wrong, worst = rounding(options.folder / "model", options.folder / "adapter", output)
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e9
    shutil.rmtree(output)
    result = json.loads(finished.stdout.splitlines()[-1])
    return {**result, "wall": wall, "wrong": wrong, "worst": worst, "written": written}


def run_one(folder: Path, run: str) -> dict[str, float]:
    """The merge named `run`, in this process."""
    paths = (folder / "model", folder / "adapter", folder / f"out-{run}")
    if run.startswith("ours"):
        return run_ours(*paths, run.endswith("residual"))
    return run_peft(*paths, run.endswith("safe"))


COLUMNS = {
    "process s": ("wall", ".1f"),
    "merge s": ("seconds", ".1f"),
    "CPU s": ("cpu", ".1f"),
    "peak MB": ("peak", ".0f"),
    "extra MB": ("extra", ".0f"),
    "wrong of 10,000": ("wrong", ".2f"),
    "worst ulp": ("worst", ".0f"),
    "output GB": ("written", ".2f"),
}


def main() -> None:
    """Makes the model, runs each merge in a process of its own and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, removed after")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--peft", action="store_true", help="also PEFT, plain and safe_merge")
    parser.add_argument("--residual", action="store_true", help="also with --save-residual")
    parser.add_argument("--json", action="store_true", help="medians as JSON instead of a table")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_one(options.folder, options.run)))
        return
    model = options.folder / "model"
    runs = ["ours", *(["ours+residual"] if options.residual else [])]
    runs += ["peft", "peft-safe"] if options.peft else []
    try:
        make_model(model, options.layers, options.vocab)
        make_adapter(options.folder / "adapter", options.layers)
        size = sum(path.stat().st_size for path in model.iterdir()) / 1e9
        largest = max(entry.size for entry in open_checkpoint(model).tensors.values()) / 1e6
        results: dict[str, list[dict[str, float]]] = {run: [] for run in runs}
        for _ in range(options.repeat):
            for run in runs:
                results[run].append(measure(options, run))
        if options.json:
            medians = {
                run: {key: median(one[key] for one in measured) for key in measured[0]}
                for run, measured in results.items()
            }
            print(json.dumps(medians))
            return
        print(
            f"{size:.1f} GB of bf16 weights, {options.layers} layers, vocabulary {options.vocab}, "
            f"adapter of rank {RANK}; bound on extra memory {4 * largest + 500:.0f} MB"
        )
        print("| merge | " + " | ".join(COLUMNS) + " |")
        print("|---" * (1 + len(COLUMNS)) + "|")
        for run, measured in results.items():
            cells = [
                format(median(one[key] for one in measured), style)
                for key, style in COLUMNS.values()
            ]
            print(f"| {run} | " + " | ".join(cells) + " |")
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
