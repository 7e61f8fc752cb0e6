"""The first questions that a store is asked, each answered in a word with what it rests on.

An answer is given where the 95 % t interval over paired seeds lies to one side of zero; otherwise
nothing was shown. One seed decides nothing.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from gradflow import captions, diagnosis, tables
from gradflow.page import Card
from gradflow.store import FINISHED
from gradflow.tables import Interval, interval

HURTS, HELPS, NEITHER = "hurts", "helps", "neither"
DEEPEST_LOST = "The deepest diverged"
LOST = "No pair has both final errors"


def cards(overview: pd.DataFrame, pairs: pd.DataFrame, diagnoses: pd.DataFrame) -> list[Card]:
    """What one group of comparable runs says of depth, of skips, and of the gradient at the start,
    and how many diverged where none of these says it.

    Args:
        overview: `tables.overview` of the group; pairs: its `tables.pairs`; diagnoses: those of its
            runs, with depth, arm and seed.
    """
    every = tables.ordered(overview["arm"])
    arms = [arm for arm in every if arm != "unnamed"]
    lost = tables.diverged(overview)
    depth = [card for arm in arms if (card := _of_depth(overview, lost, arm))]
    skip = [card for arm in arms if (card := _of_skip(overview, pairs, lost, arm))]
    told = [*depth, *skip]
    return [*_of_divergence(overview, lost, told), *told, *_of_gradient(diagnoses, every)]


def _undecided(found: Interval) -> str:
    if found.seeds == 1:
        return "One seed: cannot tell"
    return "No difference" if found.agree and found.mean == 0 else "Not shown"


def depth_effect(overview: pd.DataFrame, arm: str) -> tuple[int, int, Interval] | None:
    """The least and the greatest depth with final training errors, and the greatest's error minus
    the least's, paired by seed; None where two depths share no seed."""
    rows = overview[(overview["arm"] == arm) & overview["train_error"].notna()]
    rows = rows[rows["depth"].notna()].assign(seed=lambda f: f["seed"].map(str))
    depths = sorted({int(depth) for depth in rows["depth"]})
    if len(depths) < 2:
        return None
    shallow, deep = (
        rows[rows["depth"] == depth].groupby("seed")["train_error"].first().astype(float)
        for depth in (depths[0], depths[-1])
    )
    gaps = (deep - shallow).dropna()
    return (depths[0], depths[-1], interval(gaps.to_numpy())) if len(gaps) else None


def _of_depth(overview: pd.DataFrame, diverged: pd.DataFrame, arm: str) -> Card | None:
    effect, lost = depth_effect(overview, arm), _of_arms(diverged, [arm])
    asked = f"Does depth hurt {arm} networks?"
    ended = overview.loc[(overview["arm"] == arm) & overview["train_error"].notna(), "depth"]
    beyond = lost[lost["depth"] > ended.max()] if ended.notna().any() else lost[:0]
    if effect is None:
        return Card(asked, DEEPEST_LOST, f"{_told(lost)}.", NEITHER) if len(beyond) else None
    shallow, deep, found = effect
    word, kind = {
        1: ("Yes: more training error", HURTS),
        -1: ("No: less training error", HELPS),
        0: (_undecided(found), NEITHER),
    }[found.sign]
    if len(beyond):
        word, kind = DEEPEST_LOST, NEITHER
    rests = f"training error {found.words(sign=True)} from depth {shallow} to {deep}"
    return Card(asked, word, f"{'; '.join(filter(None, [rests, _told(lost)]))}.", kind)


def _of_skip(
    overview: pd.DataFrame, pairs: pd.DataFrame, diverged: pd.DataFrame, arm: str
) -> Card | None:
    rows = pairs[(pairs["arm"] == arm) & pairs["train_difference"].notna()] if len(pairs) else pairs
    asked = f"Does the skip help ({arm})?"
    lost = _of_arms(diverged, [tables.PLAIN, arm])
    if rows.empty or rows["depth"].isna().all():
        both = arm != tables.PLAIN and {tables.PLAIN, arm} <= set(overview["arm"])
        return Card(asked, LOST, f"{_told(lost)}.", NEITHER) if both and len(lost) else None
    rows = rows[rows["depth"] == rows["depth"].max()]
    deep = int(rows["depth"].max())
    found = interval(rows["train_difference"].to_numpy(dtype=float))
    word, kind = {
        1: ("Yes: less training error", HELPS),
        -1: ("No: more training error", HURTS),
        0: (_undecided(found), NEITHER),
    }[found.sign]
    ids = dict(zip(overview["run"], overview["run_id"], strict=True))
    first = rows.iloc[0]
    rests = f"plain error minus {arm} error, depth {deep}: {found.words(sign=True)}"
    told = _told(lost[lost["depth"] >= deep])
    return Card(
        asked, word, f"{'; '.join(filter(None, [rests, told]))}.", kind,
        (str(ids[first["plain_run"]]), str(ids[first["run"]])),
    )  # fmt: skip


def _of_arms(diverged: pd.DataFrame, arms: list[str]) -> pd.DataFrame:
    return diverged[diverged["arm"].isin(arms)].sort_values("depth")


def _told(lost: pd.DataFrame) -> str:
    return "; ".join(f"{row.arm}, depth {row.depth}: {row.text}" for row in lost.itertuples())


def _of_divergence(overview: pd.DataFrame, diverged: pd.DataFrame, told: list[Card]) -> list[Card]:
    """How many runs diverged, unless the other cards count them all."""
    compared = overview[~overview["match"].str.startswith("not compared")]
    ended = compared[compared["status"].isin(FINISHED)]
    lost = ended[ended["status"] == "diverged"]
    counted = " ".join(card.because for card in told)
    known = [_told(row) in counted for _, row in diverged.groupby(level=0)]
    if lost.empty or (lost["depth"].notna().all() and all(known)):
        return []
    first = lost.iloc[0]
    because = first["outcome"] if len(lost) == 1 else _told(diverged)
    word = f"{len(lost)} of {len(ended)} diverged"
    return [Card("Did training stay finite?", word, f"{because}.", HURTS)]


def _of_gradient(diagnoses: pd.DataFrame, arms: list[str]) -> list[Card]:
    """What the deepest networks' gradient is like at the first recorded step."""
    if diagnoses.empty:
        return []
    first = diagnoses[diagnoses["moment"] == "first"]
    known = first[first["depth"].notna()]
    rows = known[known["depth"] == known["depth"].max()] if len(known) else first
    told = {}
    for arm in arms:
        words = dict.fromkeys(rows.loc[rows["arm"] == arm, "diagnosis"])
        if words:
            told[arm] = ", ".join(words)
    if not told:
        return []
    evidence = captions.evidence(rows)
    ill = evidence[evidence["diagnosis"] != diagnosis.HEALTHY]
    shown = (ill if len(ill) else evidence).iloc[0]
    deep = rows["depth"].max() if len(known) else np.nan
    where = "" if pd.isna(deep) else f", depth {int(deep)}"
    named = arms != ["unnamed"]
    word = "; ".join(f"{arm}: {words}" if named else words for arm, words in told.items())
    because = f"{shown['arm']}: {shown['sentence']}." if named else f"{shown['sentence']}."
    return [
        Card(f"The gradient at the first step{where}", word, because, HURTS if len(ill) else HELPS)
    ]
