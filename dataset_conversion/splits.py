"""Cross-validation splits in the form of nnU-Net's splits_final.json, for cases that must not be torn apart.

A split lies in the raw dataset; `nnunet_dsp prepare` copies it to nnUNet_preprocessed, where nnU-Net looks for it.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

Split = dict[str, list[str]]
SPLITS_FILE = "splits_final.json"


def read_splits(path: Path, cases: Collection[str]) -> list[Split]:
    """Read a splits file; ValueError names it where it is of another form or names cases that do not exist."""
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    form = isinstance(splits, list) and all(
        isinstance(s, dict) and isinstance(s.get("train"), list) and isinstance(s.get("val"), list) for s in splits
    )
    if not form:
        raise ValueError(f'{path}: expected a list of {{"train": [cases], "val": [cases]}}, one for each fold.')
    unknown = sorted({str(c) for s in splits for part in ("train", "val") for c in s[part]} - set(cases))
    if unknown:
        raise ValueError(
            f"{path} names {len(unknown)} case(s) that do not exist: {', '.join(unknown[:10])}. Correct or remove it."
        )
    return splits


def split_by_group(groups: Mapping[int, Sequence[str]], *, folds: int = 5, gap: int = 0) -> list[Split]:
    """Validate on consecutive groups (sections, patients) and leave the groups beside them out of the fold's training.

    Args:
        groups: cases by group number; neighbouring numbers mean neighbouring (similar) groups if `gap` > 0.
        folds: how many at most; fewer where there are fewer groups.
        gap: how many numbers beside a validation group are used for neither.

    Returns:
        One {"train", "val"} per fold, sorted; folds whose training would be empty are left out, so the list may be
        empty.
    """
    numbers = sorted(groups)
    folds = min(folds, len(numbers))
    splits = []
    for fold in range(folds):
        held_out = numbers[fold * len(numbers) // folds : (fold + 1) * len(numbers) // folds]
        train = [n for n in numbers if min(abs(n - h) for h in held_out) > gap]
        if train:
            splits.append(
                {
                    "train": sorted(c for n in train for c in groups[n]),
                    "val": sorted(c for n in held_out for c in groups[n]),
                }
            )
    return splits


def split_masked(
    masked: Sequence[str], weak: Sequence[str], source: Sequence[Split] = (), folds: int = 5
) -> list[Split]:
    """Weak cases train in every fold and validate in none; the masked ones take turns.

    The source dataset's own split is followed for the masked cases where it leaves each fold masked cases on both
    sides; otherwise they are dealt out. A single masked case is trained and validated on; without any there is no
    split.

    Returns:
        One {"train", "val"} per fold, sorted.
    """
    masked, weak = sorted(masked), sorted(weak)
    followed = []
    for fold in source:
        val = [c for c in masked if c in set(fold["val"])]
        train = [c for c in masked if c in set(fold["train"])]
        followed.append({"train": sorted(train + weak), "val": val})
        if not val or not train:
            followed = []
            break
    if followed:
        return followed
    if len(masked) == 1:
        return [{"train": sorted(masked + weak), "val": masked}]
    folds = min(folds, len(masked))
    splits = []
    for number in range(folds):
        val = masked[number::folds]
        splits.append({"train": sorted([c for c in masked if c not in val] + weak), "val": val})
    return splits
