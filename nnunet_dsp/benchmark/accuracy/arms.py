"""Arms and settings by name, and what each of them trains on: pure, and without a look at any file.

An arm is a trainer with its options and the part of the annotations it gets; a setting says what the cases without
mask carry. Together with the counts and a seed they give a Run: one training. Arms that come to the same training in
several settings are one Run.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

KINDS = ("tags", "points", "boxes", "scribbles", "rectangles")
UNLABELLED = "unlabelled"
VANILLA = "nnUNetTrainer"
DSP = "nnUNetTrainerDSP"
WEAK_DEFAULT = ("tags", "points", "boxes")

PROMPT = "nnUNetTrainerPrompt"
ONE_SHOT = f"{PROMPT}OneShot"
PRETRAINED = ":pretrained"
SECOND = ":second"
PRETRAINING_SEED = 0  # once for all seeds

Source = Literal["full", "masks", "weak", "ignore", "pseudo", "second", "pretrain"]
Options = tuple[tuple[str, Any], ...]

WITHOUT: dict[str, dict[str, Any]] = {
    "loss": {"dsp_weight": 0.0},
    "pseudo": {"pseudo_label_weight": 0.0},
    "head": {"head": "standard"},
    "marginal": {"marginal_weight": 0.0},
    "doubt": {"pseudo_labels_in_boxes": "all"},
    "image": {"image_weight": 0.0},
    "box": {"box_weight": 0.0},
    "point": {"point_weight": 0.0},
    "mask": {"mask_weight": 0.0},
}
"""What `dsp-PART` sets: the part is left out."""


@dataclass(frozen=True)
class Arm:
    """One way to use the annotations of a setting.

    Attributes:
        name: as the user wrote it.
        source: what the training cases are: "full" (every mask), "masks" (the masked cases alone), "weak" (masks and
            weak annotations), "ignore" (masks, and weak annotations painted into a mask with nnU-Net's ignore label),
            "pseudo" (masks, and predictions of the `masks` arm for the other images), "oneshot" (one masked case, and
            another one for the prompt).
        trainer: name of the trainer, without the benchmark's schedule.
        kinds: the kinds of weak annotation it gets; None: all of the setting.
        options: entries under "nnunet_dsp" in the plans.
        pretrained: the training starts from weights of a training on the data of --pretrain.
        second: a new nnU-Net is trained on the predictions of this arm, and is the arm's result.
    """

    name: str
    source: Source | Literal["oneshot"]
    trainer: str = VANILLA
    kinds: tuple[str, ...] | None = None
    options: Options = ()
    pretrained: bool = False
    second: bool = False


FAMILIES: dict[str, Callable[[str], Arm]] = {}
"""Makers of arms by the part of the name before ':'; they take the whole name. This is where new families enter."""


def family(prefix: str) -> Callable[[Callable[[str], Arm]], Callable[[str], Arm]]:
    """Decorator: `function(name)` makes the arms called PREFIX or PREFIX:..."""

    def register(function: Callable[[str], Arm]) -> Callable[[str], Arm]:
        FAMILIES[prefix] = function
        return function

    return register


@family("dsp")
def dsp_arm(name: str) -> Arm:
    """`dsp[:KIND[+KIND...]|:unlabelled|:released][-PART[-PART...]]`."""
    head, *parts = name.split("-")
    _, _, what = head.partition(":")
    options: dict[str, Any] = {}
    kinds: tuple[str, ...] | None = None
    trainer = DSP
    if what == "released":
        trainer = f"{DSP}_released"
    elif what == UNLABELLED:
        kinds = ()
    elif what or head.endswith(":"):
        kinds = parse_kinds(what, f"arm `{name}`")
    for part in parts:
        if part not in WITHOUT:
            raise ValueError(f"arm `{name}`: nothing is called {part!r} that could be left out.{_near(part, WITHOUT)}")
        options |= WITHOUT[part]
    return Arm(name, "weak", trainer, kinds, tuple(sorted(options.items())))


@family("prompt")
def prompt_arm(name: str) -> Arm:
    """`prompt:oneshot`: one masked case trains, further ones are unused; the prompt comes from the rectangle of another
    case where the setting has rectangles, else from a second masked case. `prompt:partial`: the masks and a rectangle
    in each other image."""
    arms = {
        "prompt:oneshot": Arm(name, "oneshot", ONE_SHOT),
        "prompt:partial": Arm(name, "ignore", PROMPT, ("rectangles",)),
    }
    if name not in arms:
        raise ValueError(f"There is no arm {name!r}.{_near(name, arms)}")
    return arms[name]


PLAIN = {
    "masks": Arm("masks", "masks"),
    "full": Arm("full", "full"),
    "ignore": Arm("ignore", "ignore"),
    "selftrain": Arm("selftrain", "pseudo"),
}


def parse_arm(name: str, custom: Mapping[str, Arm] | None = None) -> Arm:
    """The arm of that name. NAME:pretrained starts from pre-trained weights; NAME:second trains a second network.

    Args:
        custom: arms the user defined (parse_custom_arm).

    Raises:
        ValueError: no such arm, with the nearest name.
    """
    if custom and name in custom:
        return custom[name]
    if name in PLAIN:
        return PLAIN[name]
    if name.endswith(SECOND):
        return _second(name, parse_arm(name.removesuffix(SECOND), custom))
    if name.endswith(PRETRAINED):
        return _pretrained(name, parse_arm(name.removesuffix(PRETRAINED), custom))
    prefix = re.split(r"[:\-]", name, maxsplit=1)[0]
    if prefix in FAMILIES:
        return FAMILIES[prefix](name)
    known = [*PLAIN, *FAMILIES, *(f"dsp-{part}" for part in WITHOUT), *(custom or ())]
    raise ValueError(f"There is no arm {name!r}.{_near(name, known)}")


def _second(name: str, arm: Arm) -> Arm:
    if arm.second or arm.source not in ("weak", "ignore"):
        why = "is one already" if arm.second or arm.source == "pseudo" else "has no partly annotated images"
        instead = " `selftrain` is the masks arm with a second network." if arm.name == "masks" else ""
        raise ValueError(
            f"arm `{name}`: a second network learns what the first predicts where nobody annotated, but {arm.name} "
            f"{why}.{instead}"
        )
    return replace(arm, name=name, second=True)


def _pretrained(name: str, arm: Arm) -> Arm:
    if arm.second:
        raise ValueError(
            f"arm `{name}`: the second network starts anew. {arm.name.removesuffix(SECOND)}{PRETRAINED}{SECOND} "
            "pre-trains the first one."
        )
    if arm.pretrained:
        raise ValueError(f"arm `{name}`: {PRETRAINED} stands there twice.")
    if arm.trainer.startswith("nnUNetTrainerCRAC"):
        raise ValueError(f"arm `{name}`: {arm.trainer} trains on instances, and pre-training on masks is no use to it.")
    return replace(arm, name=name, pretrained=True)


def parse_custom_arm(text: str) -> Arm:
    """`NAME=TRAINER[@DATA][:key=value,...]`.

    DATA is masks, full, ignore, pseudo, oneshot, weak (the default: everything in the setting), unlabelled, or kinds
    such as points+boxes. The values are JSON where they can be read as such (numbers, true, null), else text.

    Raises:
        ValueError: another form, or a name that is taken.
    """
    match = re.fullmatch(r"([A-Za-z0-9_.+\-]+)=([A-Za-z_]\w*)(?:@([a-z+]+))?(?::(.+))?", text)
    if match is None:
        raise ValueError(f"--arm: expected NAME=TRAINER[@DATA][:key=value,...], but got {text!r}.")
    name, trainer, data, rest = match.groups()
    if name in PLAIN or re.split(r"[:\-]", name, maxsplit=1)[0] in FAMILIES:
        raise ValueError(f"--arm {text}: the name {name} belongs to one of the benchmark's own arms. Choose another.")
    options: dict[str, Any] = {}
    for item in re.split(r",(?=[^,=]+=)", rest) if rest else []:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--arm {text}: expected key=value after the colon, but got {item!r}.")
        try:
            options[key.strip()] = json.loads(value)
        except ValueError:
            options[key.strip()] = value.strip()
    source: Source | Literal["oneshot"] = "weak"
    kinds: tuple[str, ...] | None = None
    if data in ("masks", "full", "ignore", "pseudo", "oneshot", "weak"):
        source = data  # type: ignore[assignment]
    elif data == UNLABELLED:
        kinds = ()
    elif data:
        kinds = parse_kinds(data, f"--arm {text}")
    return Arm(name, source, trainer, kinds, tuple(sorted(options.items())))


class Setting(NamedTuple):
    """What the cases without mask carry.

    Attributes:
        name: as the user wrote it.
        kinds: in the order of KINDS; () for unlabelled.
        dealt: each case gets one of the kinds, in turn, instead of all of them.
    """

    name: str
    kinds: tuple[str, ...]
    dealt: bool = False


def parse_setting(name: str) -> Setting:
    """`masks+KIND[+KIND...]`, `masks+unlabelled`, `mixed` (tags, points and boxes on each case) or `dealt[:KINDS]`.

    Raises:
        ValueError: something else.
    """
    if name == "mixed":
        return Setting(name, WEAK_DEFAULT)
    if name == "dealt":
        return Setting(name, WEAK_DEFAULT, dealt=True)
    if name.startswith("dealt:"):
        kinds = parse_kinds(name.partition(":")[2], f"setting {name!r}")
        return Setting(name, kinds, dealt=len(kinds) > 1)
    if name == f"masks+{UNLABELLED}":
        return Setting(name, ())
    if name.startswith("masks+"):
        return Setting(name, parse_kinds(name.partition("+")[2], f"setting {name!r}"))
    examples = ("mixed", "dealt", "masks+unlabelled", *(f"masks+{kind}" for kind in KINDS))
    raise ValueError(f"There is no setting {name!r}.{_near(name, examples)}")


def parse_kinds(text: str, where: str) -> tuple[str, ...]:
    """ "points+boxes" in the order of KINDS.

    Raises:
        ValueError: an unknown kind, or none.
    """
    given = text.split("+")
    for kind in given:
        if kind not in KINDS:
            raise ValueError(f"{where}: expected kinds joined by '+', but got {text!r}.{_near(kind, KINDS)}")
    return tuple(kind for kind in KINDS if kind in given)


def _near(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else f" Known: {', '.join(known)}."


# --- trainings


@dataclass(frozen=True)
class Data:
    """What a training sees; equal Data are one dataset.

    Attributes:
        source: see Arm.
        masks, weak: how many cases keep their mask, and how many have weak annotations or none.
        seed: which cases.
        kinds: kinds of weak annotation kept.
        dealt: the kinds that were dealt out one to a case; () where each case carries all.
        prompt_from: what dataset.json names as the prompt's case: the second "mask", or the case with a "rectangle".
        made_by: id of the training whose predictions are labels, where that is not the plain `masks` arm's.
    """

    source: Source
    masks: int = 0
    weak: int = 0
    seed: int = 0
    kinds: tuple[str, ...] = ()
    dealt: tuple[str, ...] = ()
    prompt_from: str = ""
    made_by: str = ""

    @property
    def name(self) -> str:
        """A name for folders, letters, digits, '_' and '-' only."""
        if self.source in ("full", "pretrain"):
            return self.source
        text = f"m{self.masks}"
        if self.source != "masks":
            text += f"_w{self.weak}"
        text += f"_s{self.seed}_{self.source}"
        if self.source in ("weak", "ignore", "second"):
            text += "_" + "-".join(self.kinds or (UNLABELLED,))
        if self.dealt:
            text += "_dealt-" + "-".join(self.dealt)
        if self.prompt_from:
            text += f"_prompt-{self.prompt_from}"
        if self.made_by:
            first, _, trainer = self.made_by.partition("__")
            readable = re.fullmatch(r"\w{1,60}", trainer) and not _is_unusual(first, trainer)
            text += "_" + (trainer if readable else _digest(self.made_by))
        return text


@dataclass(frozen=True)
class Run:
    """One training: equal ids are the same training, whichever arms and settings ask for it.

    Attributes:
        seed: of the initialisation.
        needs: id of the training whose predictions the data is made of.
        pretrained: id of the training whose weights it starts from.
    """

    data: Data
    trainer: str
    options: Options
    seed: int
    needs: str | None = None
    pretrained: str | None = None

    @property
    def after(self) -> tuple[str, ...]:
        """The trainings that have to come first."""
        return tuple(name for name in (self.needs, self.pretrained) if name is not None)

    @property
    def is_pretraining(self) -> bool:
        return self.data.source == "pretrain"

    @property
    def id(self) -> str:
        """A name for folders that says all that makes this training differ from others of the same benchmark."""
        text = f"{self.data.name}__{self.trainer}"
        settings = ",".join(f"{key}={_short(value)}" for key, value in self.options)
        if settings:
            text += "__" + (settings if re.fullmatch(r"[\w.,=+\-]{1,80}", settings) else _digest(self.options))
        if self.pretrained is not None:
            text += "__pretrained"
        return text if self.data.source != "full" else f"{text}__s{self.seed}"


def _is_unusual(data: str, trainer: str) -> bool:
    """Whether the name of a first network's data is of another source than this trainer usually has.

    Names of second networks leave the usual one out. Vanilla and prompt trainers have painted labels, others weak ones.
    """
    usual = "ignore" if trainer.partition("__")[0] == VANILLA or trainer.startswith(PROMPT) else "weak"
    found = re.match(r"m\d+_w\d+_s\d+_(ignore|weak)(?:_|$)", data)
    return found is not None and found[1] != usual


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Facts:
    """What there is to deal out.

    Attributes:
        cases: number of training cases.
        boxes_exclude: whether boxes are complete for every foreground class, so that outside them is background.
    """

    cases: int
    boxes_exclude: bool = False


class Row(NamedTuple):
    """A place in the tables: which run an arm has in a setting, at these counts, for this seed."""

    arm: str
    setting: str
    masks: int
    weak: int
    seed: int
    run: str


@dataclass
class Grid:
    """All that is asked for: the runs, each once, those that others need first; the rows; and what was left out."""

    runs: dict[str, Run] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def depth(self, run: Run) -> int:
        """How many trainings have to come before it, one after the other."""
        return max((1 + self.depth(self.runs[name]) for name in run.after), default=0)

    def add(self, run: Run) -> None:
        """
        Raises:
            RuntimeError: another training has the same id, so that one would be taken for the other.
        """
        known = self.runs.setdefault(run.id, run)
        if known != run:
            raise RuntimeError(f"Two trainings are called {run.id}: {known} and {run}.")


def left_out_texts(left_out: Mapping[str, str]) -> list[str]:
    """A sentence for each arm that was left out.

    Args:
        left_out: see Grid; why, by which arm and where.
    """
    return [f"Left out: {what}: {why}." for what, why in left_out.items()]


def data_of(arm: Arm, setting: Setting, masks: int, weak: int, seed: int, facts: Facts) -> Data | str:
    """What an arm trains on in a setting, in the one form that equal data have; or why it has nothing to train on."""
    masks_only = Data("full") if masks == facts.cases else Data("masks", masks, seed=seed)
    if arm.source == "full":
        return Data("full")
    if arm.source in ("masks", "pseudo", "oneshot") and masks == 0:
        return "there is no mask"
    if arm.source == "masks":
        return masks_only
    if arm.source == "oneshot":
        if "rectangles" in setting.kinds and not setting.dealt and weak:
            return Data("ignore", 1, 1, seed, ("rectangles",), prompt_from="rectangle")
        return Data("masks", 2, seed=seed, prompt_from="mask") if masks > 1 else masks_only
    kinds = setting.kinds if arm.kinds is None else arm.kinds
    missing = [kind for kind in kinds if kind not in setting.kinds]
    if missing:
        return f"the setting has no {' and '.join(missing)}"
    if weak == 0:
        return masks_only if masks else "there is no mask and no other case"
    if arm.source == "pseudo":
        return Data("pseudo", masks, weak, seed)
    if arm.source == "ignore":
        painted = {"points", "scribbles", "rectangles"} | ({"boxes"} if facts.boxes_exclude else set())
        kinds = tuple(kind for kind in kinds if kind in painted)
        if not kinds:  # tags, and boxes that exclude nothing, are nothing to nnU-Net
            return masks_only if masks else "nothing of it can be painted into a mask"
    dealt = setting.kinds if setting.dealt and kinds else ()
    return Data(arm.source, masks, weak, seed, kinds, dealt)


def make_grid(
    arms: Sequence[Arm],
    settings: Sequence[Setting],
    masks: Sequence[int],
    weak: Sequence[int | Literal["rest"]],
    seeds: Sequence[int],
    facts: Facts,
) -> Grid:
    """Every arm in every setting, at every count, for every seed.

    Raises:
        ValueError: counts that the cases do not reach.
    """
    grid = Grid()
    for number in masks:
        if not 0 <= number <= facts.cases:
            raise ValueError(f"--masks: expected 0 to {facts.cases}, the number of training cases, but got {number}.")
    for setting in settings:
        for number in masks:
            for count in weak:
                rest = facts.cases - number
                others = rest if count == "rest" else count
                if not 0 <= others <= rest:
                    raise ValueError(
                        f"--weak: expected 0 to {rest} with {number} of {facts.cases} cases masked, or 'rest', but "
                        f"got {count}."
                    )
                for seed in seeds:
                    for arm in arms:
                        _add(grid, arm, setting, number, others, seed, facts)
    return grid


def _add(grid: Grid, arm: Arm, setting: Setting, masks: int, weak: int, seed: int, facts: Facts) -> None:
    data = data_of(arm, setting, masks, weak, seed, facts)
    if isinstance(data, str):
        grid.left_out[f"{arm.name} in {setting.name} with {masks} masks"] = data
        return
    if arm.second and data.source in ("full", "masks"):
        grid.left_out[f"{arm.name} in {setting.name} with {masks} masks"] = "no image is left to predict"
        return
    needs = pretrained = None
    if arm.pretrained:
        start = pretraining(arm)
        grid.add(start)
        pretrained = start.id
    if data.source == "pseudo":
        first = Run(Data("masks", masks, seed=seed), arm.trainer, arm.options, seed, pretrained=pretrained)
        grid.add(first)
        needs = first.id
        if first != Run(first.data, VANILLA, (), seed):
            data = replace(data, made_by=needs)
    run = Run(data, arm.trainer, arm.options, seed, needs, pretrained)
    grid.add(run)
    if arm.second:
        run = Run(replace(data, source="second", made_by=run.id), VANILLA, (), seed, run.id)
        grid.add(run)
    row = Row(arm.name, setting.name, masks, weak, seed, run.id)
    if row not in grid.rows:
        grid.rows.append(row)


def pretraining(arm: Arm) -> Run:
    """The training on other data whose weights an arm starts from.

    Prompt trainers start from nnUNetTrainerPrompt on all its cases, with the same options; nnUNetTrainerDSP from
    nnU-Net's own trainer, for its head is new in any case; any other from itself.
    """
    trainer, options = arm.trainer, arm.options
    if trainer.startswith(PROMPT):
        trainer = trainer.replace(ONE_SHOT, PROMPT)
        options = tuple((key, value) for key, value in options if key != "one_shot_case")
    elif trainer.startswith(DSP):
        trainer, options = VANILLA, ()
    return Run(Data("pretrain"), trainer, options, PRETRAINING_SEED)
