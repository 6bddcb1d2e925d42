"""What the processes of a test run; little is imported, since each of them imports it again."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict

import numpy as np
import torch

from tests.evaluation.toy import PAIRS, ToyDataset, toy_labels, toy_masks
from zs3fast.evaluation import PartialResults, evaluate, evaluate_pairs
from zs3fast.utils.distributed import dist_env, rank_and_world


def both_reports(partial_folder=None, resume=False):
    """Comparable parts of a report over label maps and of one over pairs."""
    dataset = ToyDataset()
    partial = None
    if partial_folder is not None:
        partial = PartialResults(partial_folder, {"what": "toy"}, resume, every=0)
    labels = evaluate(toy_labels, dataset, partial=partial)
    pairs = evaluate_pairs(toy_masks, dataset, PAIRS)
    return [(r.table, r.images, [asdict(i) for i in r.items], r.scores.to_dict()) for r in (labels, pairs)]


def same(first, second):
    return all(np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(first, second, strict=True))


def worker(rank, port, folder, count):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with dist_env("cpu"):
        assert rank_and_world() == (rank, count)
        result = both_reports(f"{folder}/partial", resume=True)
    with open(f"{folder}/{rank}.pickle", "wb") as file:
        pickle.dump(result, file)
