"""Every config key of the project, once, and where the YAML files are.

Keys that detectron2 has keep detectron2's meaning. "Section" is a section of "Rethinking 'Batch'
in BatchNorm" (arXiv 2105.07576) unless it says MABN (arXiv 2001.06838).
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rethinking_bn._detectron2 import require_detectron2

if TYPE_CHECKING:  # the files are found without detectron2, too
    from detectron2.config import CfgNode

# beside the package in a checkout, inside it in a wheel
_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")
_CONFIGS = next(filter(Path.is_dir, _FOLDERS), _FOLDERS[1])


def our_keys() -> CfgNode:
    """Return this project's keys with their defaults."""
    require_detectron2("rethinking_bn.config")
    from detectron2.config import CfgNode

    parts = ("BACKBONE", "DISTILL", "DOMAIN_BN", "GN", "MABN", "RETINANET", "ROI_HEADS")
    c = CfgNode({"DATASETS": {}, "MODEL": {part: {} for part in parts}})
    c.MODEL.RETINANET.BN = CfgNode()
    c.SOLVER = CfgNode({"AVERAGE": {}, "FREEZE_BN": {}})
    c.TEST = CfgNode({"DIAGNOSE": {}, "PRECISE_BN": {}})

    # --- Data of one's own -----------------------------------------------------------------------
    # Data sets in COCO's format, each (name, annotations.json, folder of the images); registered in
    # every process. Relative paths begin at the folder that DETECTRON2_DATASETS names (./datasets).
    c.DATASETS.COCO_FORMAT = ()

    # --- An iteration in several passes ------------------------------------------------ section 4
    # Forward/backward passes per optimiser step of each rank, whose gradients are averaged. An
    # iteration stays one step over SOLVER.IMS_PER_BATCH images; what is normalised together are the
    # images of one pass. Must divide the images per rank.
    c.SOLVER.ACCUMULATION_STEPS = 1

    # --- Weights averaged over the training ------------------------- docs/averaging.md
    # "ema", "swa" (the mean of the weights at the updates) or "" (none).
    c.SOLVER.AVERAGE.KIND = ""
    # The EMA keeps min(DECAY, (1 + n) / (10 + n)) of itself at the update after n others.
    c.SOLVER.AVERAGE.DECAY = 0.999
    # Iterations before the average begins, and from one update to the next.
    c.SOLVER.AVERAGE.START = 0
    c.SOLVER.AVERAGE.PERIOD = 1
    # Learning rates of SWA's schedule, from START on: (rate,) is constant, (first, last) falls from
    # one to the other within each PERIOD. (): the solver's own schedule goes on.
    c.SOLVER.AVERAGE.LR = ()
    # The average's BatchNorm statistics: "estimate" (by population training on what TEST.PRECISE_BN
    # describes, enabled or not), "average" (as the weights), "copy" (the model's at the update).
    c.SOLVER.AVERAGE.STATISTICS = "estimate"

    # --- Freezing near the end ------------------------------------------------ section 4, Figure 6
    # The first iteration whose BN-like layers normalise by population statistics, which are
    # estimated as TEST.PRECISE_BN says (whether it is enabled or not) and stay. -1: never. Not
    # scaled with SOLVER.REFERENCE_WORLD_SIZE.
    c.SOLVER.FREEZE_BN.START = -1
    # Whether the layers' weight and bias are frozen, too.
    c.SOLVER.FREEZE_BN.AFFINE = False

    # --- Fine-tuning a part ---------------------------------------------------- docs/fixres.md
    # Patterns (fnmatch) of the names of the modules to train; all others keep their weights and
    # their norms the population statistics. Empty: everything is trained.
    c.SOLVER.TRAIN_ONLY = ()

    # --- RetinaNet taught by another (META_ARCHITECTURE: DistilledRetinaNet) docs/distillation.md
    # The teacher: a config file of any detectron2 RetinaNet, and its trained weights. They are read
    # when training begins; inference needs neither.
    c.MODEL.DISTILL.TEACHER_CONFIG = ""
    c.MODEL.DISTILL.TEACHER_WEIGHTS = ""
    # T by which both sides' logits are divided; the loss is multiplied by its square.
    c.MODEL.DISTILL.TEMPERATURE = 5.0
    # Of the soft loss, a mean over all classes of the anchors that the focal loss counts.
    c.MODEL.DISTILL.WEIGHT = 1.0

    # --- Loading weights ----------------------------------------------------------------
    # Whether heads of ours take weights that lack the population statistics of their BN, because
    # they were trained with another norm or none: those then start from mean 0 and variance 1.
    c.MODEL.ALLOW_MISSING_STATISTICS = False

    # --- Speed ----------------------------------------------------------- docs/performance.md
    # Whether torch.compile compiles each norm layer of ours (rethinking_bn.layers.compile_norms).
    c.MODEL.COMPILE_NORMS = False

    # --- RetinaNet's head (META_ARCHITECTURE: ConfigurableHeadRetinaNet) ---------- section 5
    # Which head, by its name in RETINANET_HEAD. Ours read MODEL.RETINANET.NORM as "BN" (statistics
    # of this rank), "SyncBN" (pooled over ranks) or another name of rethinking_bn.layers.get_norm.
    c.MODEL.RETINANET.HEAD_NAME = "RetinaNetHead"
    # The next three are each "shared" (one set for all feature levels), "domain_specific" (one set
    # per level) or "" (the head's own choice; MultiDomainBNRetinaNetHead's is "shared").
    # The statistics that a layer normalises by during SGD training. Table 5, "SGD statistics".
    c.MODEL.RETINANET.BN.TRAIN_STATS = ""
    # The statistics that it normalises by at inference. Table 5, "population statistics".
    c.MODEL.RETINANET.BN.POPULATION_STATS = ""
    # The scale and shift after the normalisation. Table 5, "affine".
    c.MODEL.RETINANET.BN.AFFINE = ""

    # --- Norms in Mask R-CNN's heads ----------------------------------------------- section 6
    # Images whose RoIs are normalised together by a BN of this rank, in training and in population
    # training; must divide the images per rank. 0: all images on the rank. Tables 3 and 6.
    c.MODEL.ROI_HEADS.NORM_IMAGES = 0

    # --- Norms in the backbone (build_norm_*_backbone) ------------------------------ section 4
    # Images that a BN of backbone and FPN normalises together in training (ghost BN); must divide
    # the images of one forward on a rank. 0: all of them. Figure 5.
    c.MODEL.BACKBONE.NORM_IMAGES = 0
    # Groups of "GN" in this package's components, which must divide the channels.
    c.MODEL.GN.NUM_GROUPS = 32

    # --- Domains in the data: BN of build_norm_*_backbone and RetinaNet's head ------- section 5
    # One group (list of data set names) per domain, such as [["clean"], ["fog", "snow"]]; every
    # data set of the run, test sets too, is in one of them. Empty: no domains.
    c.MODEL.DOMAIN_BN.DATASETS = ()
    # As MODEL.RETINANET.BN's choices, but between the domains: "shared" or "domain_specific".
    c.MODEL.DOMAIN_BN.TRAIN_STATS = "domain_specific"
    c.MODEL.DOMAIN_BN.POPULATION_STATS = "domain_specific"
    c.MODEL.DOMAIN_BN.AFFINE = "domain_specific"

    # --- Moving Average Batch Normalization (norm "MABN") ------------------------- MABN, section 4
    # Images whose statistics the backward pass averages over time; a multiple of BATCH_SIZE.
    c.MODEL.MABN.SIMULATED_BATCH_SIZE = 32
    # Images in one forward of a rank. 0: SOLVER.IMS_PER_BATCH divided by the number of ranks and
    # by SOLVER.ACCUMULATION_STEPS, whose result must divide SIMULATED_BATCH_SIZE for training.
    c.MODEL.MABN.BATCH_SIZE = 0
    # Fraction of the new value in the running mean square (torch's meaning of momentum).
    c.MODEL.MABN.MOMENTUM = 0.02
    # Iterations that use the statistics of the mini-batch before the moving averages take over.
    c.MODEL.MABN.WARMUP_ITERS = 100
    # The correction r is clipped to [1 / R_MAX, R_MAX].
    c.MODEL.MABN.R_MAX = 5.0
    # Whether training is refused while MODEL.WEIGHTS is empty: for configs that fine-tune weights
    # which nobody publishes in detectron2's format. Evaluation and --resume are not affected.
    c.MODEL.MABN.REQUIRE_WEIGHTS = False

    # --- Inference -------------------------------------------------------------------- section 4
    # What BN-like layers normalise by when a model is evaluated: "population" (their population
    # statistics) or "batch" (the mini-batch of this rank; frozen layers keep theirs).
    c.TEST.STATISTICS = "population"

    # --- Diagnosis of a run's BatchNorm ---------------------------------------- sections 3 to 6
    # Iterations between two diagnoses during training, on the images of TEST.PRECISE_BN (NUM_ITER
    # batches, 32 at most); their numbers are scalars, diagnose/*. 0: never.
    c.TEST.DIAGNOSE.PERIOD = 0

    # --- Population training; ENABLED and NUM_ITER are detectron2's ----------------- section 3
    # Names of registered data sets, labelled or not. Empty: DATASETS.TRAIN. Another domain's images
    # give that domain's statistics (Table 4).
    c.TEST.PRECISE_BN.DATASETS = ()
    # Images per iteration on all ranks together. 0: those of one pass of training on all ranks,
    # SOLVER.IMS_PER_BATCH / SOLVER.ACCUMULATION_STEPS. Table 2.
    c.TEST.PRECISE_BN.IMS_PER_BATCH = 0
    # How images are prepared: "train" (training's augmentation) or "test" (inference's, without
    # labels, so the model runs as in inference; Table 4's last row).
    c.TEST.PRECISE_BN.TRANSFORMS = "train"
    # Whether FrozenBatchNorm2d gets new statistics, too: of a trained model (--eval-only), to adapt
    # all of it to another domain (Table 4). Training refuses it.
    c.TEST.PRECISE_BN.THAW = False
    # Worker processes of its loader, per rank.
    c.TEST.PRECISE_BN.NUM_WORKERS = 0
    return c


def add_rethinking_bn_config(cfg: CfgNode) -> None:
    """Add the project's keys to detectron2's ``cfg``, in place; those it has keep their values.

    Raises:
        AttributeError: when ``cfg`` is frozen and lacks a key.
    """
    for node, key, value, _ in list(_lacking(our_keys(), cfg)):
        setattr(node, key, value)


def with_our_keys(cfg: CfgNode) -> CfgNode:
    """Return a config of any project with our keys: itself, or a copy with our defaults."""
    if next(_lacking(our_keys(), cfg), None) is None:
        return cfg
    full = cfg.clone()
    full.defrost()
    add_rethinking_bn_config(full)
    if cfg.is_frozen():
        full.freeze()
    return full


def check_has_keys(cfg: CfgNode) -> None:
    """Raise a ValueError that says what to call, if a config lacks keys of this project."""
    for *_, name in _lacking(our_keys(), cfg):
        raise ValueError(
            f"the config has no {name}: call rethinking_bn.add_rethinking_bn_config(cfg) right "
            "after detectron2.config.get_cfg()"
        )


def _lacking(ours: CfgNode, cfg: Any, prefix: str = "") -> Iterator[tuple[CfgNode, str, Any, str]]:
    """Yield the keys that ``cfg`` lacks: the node that lacks it, key, value, and key with dots."""
    for key, value in ours.items():
        if key not in cfg:
            yield cfg, key, value, prefix + key
        elif isinstance(value, dict):
            yield from _lacking(value, cfg[key], f"{prefix}{key}.")


def check_divides(key: str, images: int, ranks: int) -> None:
    """Raise a ValueError, naming the key, unless its images can be divided among the ranks."""
    if images < 1 or images % ranks:
        raise ValueError(f"{key} {images} cannot be divided among {ranks} process(es)")


def images_per_pass(cfg: CfgNode, ranks: int) -> int:
    """Return how many images a forward/backward pass of a rank has in training.

    Raises:
        ValueError: naming the keys, where SOLVER.IMS_PER_BATCH cannot be divided so.
    """
    images, passes = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS
    check_divides("SOLVER.IMS_PER_BATCH", images, ranks)
    if passes < 1 or images // ranks % passes:
        raise ValueError(
            f"SOLVER.ACCUMULATION_STEPS {passes} does not divide the {images // ranks} images per "
            f"process (SOLVER.IMS_PER_BATCH {images}, {ranks} process(es))"
        )
    return images // ranks // passes


def needs_population_loader(cfg: CfgNode, *, training: bool = True) -> bool:
    """Return whether a run reads TEST.PRECISE_BN's images, to estimate statistics or diagnose."""
    average = cfg.SOLVER.AVERAGE
    estimates = bool(average.KIND) and average.STATISTICS == "estimate"
    return cfg.TEST.PRECISE_BN.ENABLED or (
        training and (estimates or cfg.SOLVER.FREEZE_BN.START >= 0 or cfg.TEST.DIAGNOSE.PERIOD > 0)
    )


def check_statistics(cfg: CfgNode) -> str:
    """Return TEST.STATISTICS; raise a ValueError if it is not one of its two values."""
    return _one_of("TEST.STATISTICS", cfg.TEST.STATISTICS, ("population", "batch"))


def check_transforms(cfg: CfgNode) -> str:
    """Return TEST.PRECISE_BN.TRANSFORMS; raise a ValueError if it is not one of its two values."""
    return _one_of("TEST.PRECISE_BN.TRANSFORMS", cfg.TEST.PRECISE_BN.TRANSFORMS, ("train", "test"))


def _one_of(key: str, chosen: str, values: tuple[str, ...]) -> str:
    if chosen not in values:
        raise ValueError(f"{key} must be one of {values}, got {chosen!r}")
    return chosen


def check_thaw(cfg: CfgNode) -> None:
    """Raise a ValueError if a training is to estimate FrozenBatchNorm2d."""
    if cfg.TEST.PRECISE_BN.THAW:
        raise ValueError(
            "TEST.PRECISE_BN.THAW changes what training takes as constant: use it with --eval-only"
        )


def list_config_files() -> list[str]:
    """Return the names that :func:`get_config_file` knows, sorted, with forward slashes."""
    return sorted(path.relative_to(_CONFIGS).as_posix() for path in _CONFIGS.rglob("*.yaml"))


def get_config_file(name: str) -> str:
    """Return the absolute path of one of the project's config files.

    Args:
        name: relative to ``configs/``, for example ``"shapes/retinanet_bn_row1.yaml"``.

    Raises:
        ValueError: if there is no such file; the message lists close names.
    """
    known = list_config_files()
    if name not in known:
        close = get_close_matches(name, known, n=8, cutoff=0.5) or known
        raise ValueError(f"no config file {name!r} in {_CONFIGS}; close names: {', '.join(close)}")
    return str((_CONFIGS / name).resolve())
