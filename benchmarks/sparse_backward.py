"""An experiment, no part of the product: dH from the few probabilities that matter.

    python -m benchmarks.sparse_backward [--model FOLDER --data ROWS.jsonl]

With a frozen head dH_i = w_i (Σ_v p_iv W_v − W_y). Entries v ≠ y with w_i p_iv > τ are kept; the
others have the mass m_i, known from the log-sum-exp, and are replaced by m_i times an expected row
of the head: its mean μ, or tilted towards the hidden state, μ + C h with C the covariance of W's
rows, which is what a head of Gaussian rows would give. What is left of row i is Xᵀ e_i, with X the
rows of W less μ and e_i the dropped probabilities less those the correction stands for, so that

    ‖error of row i‖ ≤ w_i σ ‖e_i‖      σ the largest singular value of X

is certified: σ is known once for a head, and ‖e_i‖ from Σ p² and Σ p z over all columns less those
kept. Measured are kept entries, dropped mass, errors of dH (all rows as one vector) against
float64, the bound of the tilted form, how many candidates a kernel meets because log-sum-exps are
known only for the columns seen, and the cost of a Triton form in units by bytes and products.

Without a model the states are the peaked and flat ones of `benchmarks.data`.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import CECase
from benchmarks.data import make_inputs

EXPONENTS = (10, 12, 14, 16)  # of τ = 2^-exponent
CHUNKS = 5  # of columns, as many as a call makes of 128 thousand
# Llama 3.1 8B's head at 8192 tokens on an H200: tokens, D, V; seconds of a unit, bytes a second.
TOKENS, HIDDEN, VOCAB = 8192, 4096, 128256
UNIT_SECONDS, BANDWIDTH = 11.5e-3, 4e12


class States(NamedTuple):
    """hidden [N, D], head [V, D] and weights [N] in float64, targets [N]."""

    hidden: Tensor
    head: Tensor
    target: Tensor
    weight: Tensor


def synthetic(kind: Any) -> States:
    """1024 rows of a head of 32768 x 512."""
    inputs = make_inputs(CECase("cpu-large", 1024, "float32", data=kind), torch.device("cpu"))
    hidden, head, weight = inputs.hidden, inputs.weight, inputs.token_weight
    return States(hidden.detach().double(), head.detach().double(), inputs.target, weight.double())


def of_model(folder: Path, data: Path, tokens: int) -> States:
    """States of the first response tokens; the model's own confidences are the weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hidden, targets = [], []
    for line in data.read_text().splitlines():
        row = json.loads(line)
        message = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        text = tokenizer(prompt + row["response"], add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            states = model.base_model(text.input_ids).last_hidden_state[0]
        hidden.append(states[start - 1 : -1])
        targets.append(text.input_ids[0, start:])
        if sum(map(len, targets)) >= tokens:
            break
    states, target = torch.cat(hidden)[:tokens].double(), torch.cat(targets)[:tokens]
    head = model.get_output_embeddings().weight.detach().double()
    confidence = torch.log_softmax(states @ head.T, 1).gather(1, target[:, None])[:, 0].exp()
    return States(states, head, target, confidence)


class Statistics(NamedTuple):
    """What the experiment needs of a head, and of all rows."""

    mean: Tensor  # [D]
    covariance: Tensor  # [D, D]
    sigma: float
    logits: Tensor  # [N, V]
    probability: Tensor  # [N, V], 0 at the target
    exact: Tensor  # [N, D] dH without weights


def prepare(states: States) -> Statistics:
    """In float64."""
    hidden, head, target, _ = states
    mean = head.mean(0)
    covariance = (head.T @ head) / len(head) - torch.outer(mean, mean)
    sigma = float(torch.linalg.eigvalsh(covariance)[-1] * len(head)) ** 0.5
    logits = hidden @ head.T
    probability = logits.softmax(1)
    own = probability.gather(1, target[:, None])
    probability.scatter_(1, target[:, None], 0)
    exact = probability @ head - (1 - own) * head[target]
    return Statistics(mean, covariance, sigma, logits, probability, exact)


def candidates(states: States, known: Statistics, weight: Tensor, tau: float) -> Tensor:
    """How many entries pass τ by the log-sum-exp of the target and the columns seen so far [N]."""
    seen = known.logits.gather(1, states.target[:, None])[:, 0]
    count = torch.zeros_like(seen)
    for columns in known.logits.chunk(CHUNKS, 1):
        seen = torch.logaddexp(
            seen, columns.logsumexp(1)
        )  # the target twice: a bound still, less ln 2
        bound = (seen - 0.7)[:, None]
        count += (weight[:, None] * (columns - bound).exp() > tau).sum(1)
    return count


def measure(states: States, known: Statistics, weight: Tensor, tau: float) -> dict[str, float]:
    """One line of the table."""
    hidden, head = states.hidden, states.head
    kept = weight[:, None] * known.probability > tau
    dropped = torch.where(kept, 0, known.probability)
    mass = dropped.sum(1, keepdim=True)
    rest = dropped @ head  # what the sparse sum leaves out
    tilt = hidden @ known.covariance
    truth = (weight[:, None] * known.exact).norm()

    def error(correction: Tensor) -> float:
        return float((weight[:, None] * (rest - correction)).norm() / truth)

    # ‖p − m (1 + z − mean z) / V‖² over the dropped p: what the tilt leaves of the probabilities.
    centred = (known.logits - (hidden @ known.mean)[:, None]) / len(head)
    residual = (dropped - mass * (1 / len(head) + centred)).norm(dim=1)
    per_row = kept.sum(1).double()
    looked_at = candidates(states, known, weight, tau).double().mean()
    counted = weight > 0
    return {
        "kept": float(per_row[counted].mean()),
        "p99": float(per_row[counted].quantile(0.99)),
        "candidates": float(looked_at),
        "mass": float((weight * mass[:, 0]).sum() / weight.sum()),
        "none": error(torch.zeros_like(rest)),
        "mean": error(mass * known.mean),
        "tilt": error(mass * (known.mean + tilt)),
        "bound": float(known.sigma * (weight * residual).norm() / truth),
        "units": cost(float(per_row.mean()), float(looked_at)),
    }


def cost(kept: float, looked_at: float) -> float:
    """Units of a Triton form with so many entries a row, at TOKENS, HIDDEN and VOCAB.

    One product with the head; exponentials in 16 bits stored and read once; candidates of 8 bytes
    written and read; rows of the head gathered in 16 bits; one product with the covariance.
    """
    stored = TOKENS * (2 * 2 * VOCAB + 2 * 8 * looked_at)
    gathered = TOKENS * 2 * HIDDEN * (kept + 1)
    return 1 + HIDDEN / VOCAB + (stored + gathered) / BANDWIDTH / UNIT_SECONDS


def main() -> None:
    """Prints a table for each kind of states and weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, help="JSONL of instruction and response")
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data go together")
    if options.model is not None:
        kinds = {"model": of_model(options.model, options.data, options.tokens)}
    else:
        kinds = {kind: synthetic(kind) for kind in ("peaked", "flat")}
    for kind, states in kinds.items():
        known = prepare(states)
        weights = {"uniform": torch.ones_like(states.weight), "confidence": states.weight}
        for name, weight in weights.items():
            print(f"\n{kind}, {name} weights, {len(weight)} tokens, head {list(states.head.shape)}")
            for exponent in EXPONENTS:
                found = measure(states, known, weight, 2.0**-exponent)
                line = "  ".join(f"{key} {value:.3g}" for key, value in found.items())
                print(f"tau 2^-{exponent}: {line}", flush=True)


if __name__ == "__main__":
    main()
