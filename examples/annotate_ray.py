"""Annotates rows on a Ray cluster: each actor loads the guide once and takes batches of rows.

    python examples/annotate_ray.py MODEL "data/*.jsonl" OUTPUT --actors 8 --gpus 1

OUTPUT is a folder of Parquet files with `input_ids`, `labels` and `token_weight` of every row, on
which `gift.integrations.WeightedTrainer` trains:

    datasets.load_dataset("parquet", data_dir=OUTPUT, split="train")
"""

import argparse

import ray

from gift.annotate import Annotator


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="the guide: a folder that every machine sees, or a hub id")
    parser.add_argument("data", help="JSONL rows; a file, a folder or a pattern")
    parser.add_argument("output", help="folder for Parquet files")
    parser.add_argument("--actors", type=int, default=1, help="guides at a time")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each")
    parser.add_argument("--rows", type=int, default=512, help="rows of a batch")
    options = parser.parse_args()
    annotated = ray.data.read_json(options.data).map_batches(
        Annotator,
        fn_constructor_kwargs={"model": options.model, "max_length": 2048},
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_gpus=options.gpus,
        batch_size=options.rows,
    )
    # A row that was dropped, because it is too long, has no tokens.
    kept = annotated.filter(lambda row: len(row["input_ids"]) > 0)
    kept.select_columns(["input_ids", "labels", "token_weight"]).write_parquet(options.output)


if __name__ == "__main__":
    main()
