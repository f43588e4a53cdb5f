"""Makes the golden files of the linear cross-entropy: `python tests/golden/make_ce.py`.

Outputs and gradients are derived here by hand, in NumPy and float64, token by token, so that they
judge `gift_kernels.reference` as well as the kernels. Inputs are bfloat16 numbers held in float32:
the same file is the truth for every dtype. The keys: inputs by their argument's name; `loss` and
the statistics; gradients `d_<input>`. The metadata holds the remaining arguments as JSON.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent
Arrays = dict[str, np.ndarray]
CASES: dict[str, dict[str, Any]] = {
    "ce_weights": {"reduction": "weighted_mean"},
    "ce_self": {"token_weight": "self", "reduction": "none", "weight_power": 0.5},
    "ce_guide": {
        "reduction": "mean",
        "normalizer": 11.0,
        "logit_scale": 0.5,
        "logit_softcap": 12.0,
        "guide_logit_scale": 2.0,
        "guide_logit_softcap": 16.0,
        "guide_temperature": 1.5,
        "weight_power": 2.0,
        "weight_floor": 0.3,
        "weight_threshold": 0.05,
    },
}


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds to 8 significant bits."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 256) / 256, exponent).astype(np.float32)


def make_inputs(options: dict[str, Any], seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    count, size, guide_size, vocab_size = 14, 12, 10, 61
    target = np.minimum(rng.zipf(1.3, count) - 1, vocab_size - 1)
    target[0] = vocab_size - 1

    def side(width: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
        head = rng.normal(size=(vocab_size, width)) / np.sqrt(width)
        towards = head[target] / (head[target] ** 2).sum(1, keepdims=True)
        hidden = 2 * rng.normal(size=(count, width)) + rng.uniform(-1, 14, (count, 1)) * towards
        return as_bfloat16(hidden / scale), as_bfloat16(head)

    inputs: Arrays = {}
    inputs["hidden"], inputs["lm_head_weight"] = side(size, options.get("logit_scale", 1))
    if "guide_temperature" in options:
        guide = side(guide_size, options["guide_logit_scale"])
        inputs["guide_hidden"], inputs["guide_lm_head_weight"] = guide
        inputs["bias"] = as_bfloat16(rng.normal(size=vocab_size))
        inputs["guide_bias"] = as_bfloat16(rng.normal(size=vocab_size))
    elif "token_weight" not in options:
        inputs["token_weight"] = as_bfloat16(rng.uniform(size=count) ** 2)
        inputs["token_weight"][3:5] = 0, 1
    shape = (count,) if options["reduction"] == "none" else ()
    inputs["upstream"] = as_bfloat16(rng.uniform(-2, 2, shape))
    inputs["target"] = np.where(rng.uniform(size=count) < 0.15, -100, target)
    return inputs


def logits_of(
    hidden: np.ndarray, head: np.ndarray, bias: Any, scale: float, softcap: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [V] of one token, and their derivative by (head @ hidden + bias)."""
    raw = scale * (head @ hidden + (0 if bias is None else bias))
    if softcap is None:
        return raw, np.full_like(raw, scale)
    bent = np.tanh(raw / softcap)
    return softcap * bent, scale * (1 - bent**2)


def softmax(logits: np.ndarray) -> tuple[np.ndarray, float]:
    """Probabilities [V] and log-sum-exp."""
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum(), float(logits.max() + np.log(shifted.sum()))


def weight_of(value: float, options: dict[str, Any]) -> float:
    if value < options.get("weight_threshold", 0):
        return 0.0
    return max(value, options.get("weight_floor", 0)) ** options.get("weight_power", 1)


def solve(inputs: Arrays, options: dict[str, Any]) -> Arrays:
    """Loss, statistics and gradients of one case."""
    wide = {k: v.astype(np.float64) for k, v in inputs.items() if k != "target"}
    hidden, head, target = wide["hidden"], wide["lm_head_weight"], inputs["target"]
    names = ("nll", "confidence", "lse", "entropy", "top1", "largest", "weight")
    stats = {name: np.zeros(len(target)) for name in names}
    d_raw = np.zeros((len(target), len(head)))  # of each token's nll
    for i in np.flatnonzero(target != -100):
        cap = options.get("logit_softcap")
        z, slope = logits_of(
            hidden[i], head, wide.get("bias"), options.get("logit_scale", 1.0), cap
        )
        p, lse = softmax(z)
        y = target[i]
        stats["nll"][i] = lse - z[y]
        stats["confidence"][i] = p[y]
        stats["lse"][i] = lse
        stats["entropy"][i] = -(p * np.log(p)).sum()
        stats["top1"][i] = z.argmax() == y
        stats["largest"][i] = p.max()
        d_raw[i] = (p - (np.arange(len(p)) == y)) * slope
        if "guide_hidden" in wide:
            z, _ = logits_of(
                wide["guide_hidden"][i],
                wide["guide_lm_head_weight"],
                wide["guide_bias"],
                options["guide_logit_scale"],
                options["guide_logit_softcap"],
            )
            p, _ = softmax(z / options["guide_temperature"])
        source = wide["token_weight"][i] if "token_weight" in wide else p[y]
        stats["weight"][i] = weight_of(source, options)

    weight, upstream = stats["weight"], wide["upstream"]
    losses = weight * stats["nll"]
    results: Arrays = dict(stats)
    if options["reduction"] == "none":
        results["loss"], factor = losses, upstream * weight
    else:
        divisor = options.get("normalizer", weight.sum())
        results["loss"] = losses.sum() / divisor
        factor = upstream * weight / divisor
        if "token_weight" in wide:
            slope = (stats["nll"] - results["loss"]) / divisor
            results["d_token_weight"] = np.where(target != -100, upstream * slope, 0)
    d_raw *= factor[:, None]
    results["d_hidden"] = d_raw @ head
    results["d_lm_head_weight"] = d_raw.T @ hidden
    if "bias" in wide:
        results["d_bias"] = d_raw.sum(0)
    return {name: np.asarray(value, np.float64) for name, value in results.items()}


def main() -> None:
    for seed, (name, options) in enumerate(CASES.items()):
        inputs = make_inputs(options, seed)
        tensors = inputs | solve(inputs, options)
        tensors = {key: np.array(value, order="C") for key, value in tensors.items()}
        path = FOLDER / f"{name}.safetensors"
        save_file(tensors, path, metadata={"options": json.dumps(options)})
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
