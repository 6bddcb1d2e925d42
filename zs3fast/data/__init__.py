"""Datasets in the layouts people have on disk, augmentation of the published recipes, samples by position."""

from zs3fast.data.datasets import Sample, SegmentationDataset
from zs3fast.data.folds import fold_classes
from zs3fast.data.opening import list_datasets, open_dataset
from zs3fast.data.pairs import test_pairs
from zs3fast.data.presence import class_pixels, images_per_class
from zs3fast.data.registered import register_dataset
from zs3fast.data.sampling import PairSet, PositionSampler, TrainingSet
from zs3fast.data.transforms import train_transform

__all__ = [
    "PairSet",
    "PositionSampler",
    "Sample",
    "SegmentationDataset",
    "TrainingSet",
    "class_pixels",
    "fold_classes",
    "images_per_class",
    "list_datasets",
    "open_dataset",
    "register_dataset",
    "test_pairs",
    "train_transform",
]
