"""MODEL.DOMAIN_BN: groups of data sets as domains, from the loaders to plain weights."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from rethinking_bn.checkpoint import select_domain
from rethinking_bn.data.domains import build_test_loader
from rethinking_bn.engine import Trainer
from rethinking_bn.engine.check_config import check_data_sets
from rethinking_bn.engine.checks import check_model
from rethinking_bn.engine.loaders import build_population_loader, build_train_loader
from rethinking_bn.layers import SplitBatchNorm2d, row_domains
from rethinking_bn.layers.frozen import is_frozen
from tests.engine.tiny import register_data, tiny_config, write_data
from tests.modeling.models import training_batch
from tests.modeling.roi_cases import SHUFFLED, mask_config, norms

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
GROUPS = [["clean"], ["fog", "snow"]]


def config(groups: Any = GROUPS, **overrides: Any) -> CfgNode:
    keys = {
        "MODEL__META_ARCHITECTURE": "ConfigurableHeadRetinaNet",
        "MODEL__BACKBONE__NAME": "build_norm_retinanet_resnet_fpn_backbone",
        "MODEL__RETINANET__HEAD_NAME": "SharedBNRetinaNetHead",
        "MODEL__FPN__NORM": "SyncBN",
        "MODEL__DOMAIN_BN__DATASETS": groups,
    }
    return tiny_config("clean", "no output", **{**keys, **overrides})


def splits(model: nn.Module) -> list[SplitBatchNorm2d]:
    return [layer for layer in model.modules() if isinstance(layer, SplitBatchNorm2d)]


def marked(domains: list[int]) -> list[dict[str, Any]]:
    batch = training_batch(len(domains))
    return [{**image, "domain": d} for image, d in zip(batch, domains, strict=True)]


def test_backbone_fpn_and_head_follow_the_domains() -> None:
    model = build_model(config())
    layers = splits(model)
    assert len(layers) == 53 + 6 + 2 and all(layer.num_domains == 2 for layer in layers)
    assert {layer.sync for layer in splits(model.backbone.bottom_up)} == {False}
    assert all(layer.sync for layer in (model.backbone.fpn_lateral3.norm,))
    with EventStorage():
        sum(model(marked([1, 1])).values()).backward()
        for domain, expected in (("0", {0}), ("1", {1})):
            name = f"{domain}.num_batches_tracked"
            assert {int(layer.get_buffer(name)) for layer in layers} == expected
        model(marked([0, 1]))
        assert {int(layer.get_buffer("0.num_batches_tracked")) for layer in layers} == {1}
        with pytest.raises(ValueError, match="has no 'domain'"):
            model(training_batch())
        assert all(layer._rows is None for layer in layers)


def test_inference_by_an_images_own_or_by_a_named_domain() -> None:
    model = build_model(config()).eval()
    with torch.no_grad():
        for layer in splits(model):
            layer.get_buffer("1.running_mean").fill_(1)
    image = marked([0])[0]

    def features(**row: Any) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = model.backbone.register_forward_hook(lambda m, a, out: seen.append(out["p3"]))
        model([{**image, **row}])
        handle.remove()
        return seen[0]

    with torch.no_grad():
        clean, other = features(domain=0), features(domain=1)
        assert not torch.equal(clean, other)
        with row_domains(model, 1):
            assert torch.equal(features(domain=0), other)
            del image["domain"]
            assert torch.equal(features(), other)


def test_frozen_stages_keep_their_domains_statistics() -> None:
    model = build_model(config(MODEL__BACKBONE__FREEZE_AT=2)).train()
    assert all(is_frozen(layer) for layer in splits(model.backbone.bottom_up.res2))
    assert not any(is_frozen(layer) for layer in splits(model.backbone.bottom_up.res3))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"MODEL__RESNETS__NORM": "MABN"}, "MODEL.RESNETS.NORM is 'MABN', which knows no domains"),
        ({"MODEL__FPN__NORM": "BatchStatBN"}, "MODEL.FPN.NORM is 'BatchStatBN'"),
        ({"MODEL__DOMAIN_BN__AFFINE": "both"}, "MODEL.DOMAIN_BN.AFFINE must be one of"),
        ({"MODEL__RETINANET__HEAD_NAME": "CycleBNRetinaNetHead"}, "levels must share theirs"),
        ({"MODEL__RETINANET__HEAD_NAME": "RetinaNetHead"}, "which knows no domains"),
        ({"MODEL__BACKBONE__NORM_IMAGES": 1}, "NORM_IMAGES is 1, but SplitBatchNorm2d"),
        ({"MODEL__META_ARCHITECTURE": "RetinaNet"}, "RetinaNet does not tell which image"),
        (
            {"MODEL__BACKBONE__NAME": "build_retinanet_resnet_fpn_backbone"},
            r"backbone\..* is a .*BatchNorm.*, which knows no domains",
        ),
        (
            {
                "MODEL__RESNETS__NORM": "FrozenBN",
                "MODEL__FPN__NORM": "GN",
                "MODEL__GN__NUM_GROUPS": 2,
                "MODEL__RETINANET__NORM": "",
                "MODEL__RETINANET__HEAD_NAME": "MultiDomainBNRetinaNetHead",
            },
            "no norm of the model would follow them",
        ),
        ({"groups": [["clean"], ["clean"]]}, "names 'clean' twice"),
        ({"groups": [["clean"], []]}, "a list of groups"),
        ({"groups": ["clean", "fog"]}, "must be a list of groups"),
    ],
)
def test_what_knows_no_domains_is_refused_before_training(
    overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(config(**overrides))


def test_roi_norms_are_refused() -> None:
    overrides = {
        "MODEL__META_ARCHITECTURE": "DomainRCNN",
        "MODEL__BACKBONE__NAME": "build_norm_resnet_fpn_backbone",
        "MODEL__DOMAIN_BN__DATASETS": GROUPS,
        "MODEL__MASK_ON": False,
    }
    with pytest.raises(ValueError, match=r"roi_heads\.box_head.* which knows no domains"):
        check_model(mask_config(**overrides, **SHUFFLED))
    model = build_model(mask_config(**overrides, **norms(""))).eval()
    assert len(model(marked([0, 1]))) == 2


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    names = []
    for name in ("clean", "fog"):
        (tmp_path / name).mkdir()
        write_data(tmp_path / name, 6)
        names.append(register_data(tmp_path / name))
    return names


def test_unknown_and_ungrouped_data_sets_are_refused(data: list[str]) -> None:
    clean, fog = data
    for groups, message in (
        ([[clean], ["fogg"]], "no data set is registered as 'fogg'"),
        ([[fog]], "is in no group of MODEL.DOMAIN_BN.DATASETS"),
    ):
        cfg = config(groups, DATASETS__TRAIN=(clean,), DATASETS__TEST=(clean,))
        with pytest.raises(ValueError, match=message):
            check_data_sets(cfg)


def test_every_loader_marks_images_and_training_follows(
    data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clean, fog = data
    cfg = config(
        [[clean], [fog]],
        DATASETS__TRAIN=(clean, fog),
        DATASETS__TEST=(fog,),
        OUTPUT_DIR=str(tmp_path),
        SOLVER__MAX_ITER=2,
        SOLVER__CHECKPOINT_PERIOD=2,
        TEST__EVAL_PERIOD=2,
        TEST__PRECISE_BN__ENABLED=True,
    )
    for loader in (build_train_loader(cfg), build_population_loader(cfg)):
        batches = iter(loader)
        images = [image for _ in range(3) for image in next(batches)]
        assert all(("fog" in image["file_name"]) == image["domain"] for image in images)
        assert {image["domain"] for image in images} == {0, 1}
    for index, name in enumerate((clean, fog)):
        loaded = [image for batch in build_test_loader(cfg, name) for image in batch]
        assert len(loaded) == 6 and all(image["domain"] == index for image in loaded)
    trainer = Trainer(cfg)
    trainer.train()
    stem = trainer.model.backbone.bottom_up.stem.conv1.norm
    assert not torch.equal(stem.get_buffer("0.running_mean"), stem.get_buffer("1.running_mean"))

    # plain weights of one domain, in stock detectron2
    plain = tmp_path / "plain.pth"
    source = str(tmp_path / "model_final.pth")
    command = [source, str(plain), "--domain", "1", "--levels", "5"]
    assert runpy.run_path(str(TOOL))["main"](command) == 0
    stock = tiny_config(fog, tmp_path, MODEL__FPN__NORM="BN")
    model = build_model(stock).eval()
    DetectionCheckpointer(model).load(str(plain))
    ours = trainer.model.eval()
    image = next(iter(build_test_loader(cfg, fog)))
    with torch.no_grad():
        x = ours.preprocess_image(image)
        with row_domains(ours, 1):
            expected = ours.head([ours.backbone(x.tensor)[f] for f in ours.head_in_features])
        got = model.head([model.backbone(x.tensor)[f] for f in model.head_in_features])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_selecting_a_domain_names_what_is_wrong() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), SplitBatchNorm2d(4, 2, affine="shared"))
    with torch.no_grad():
        model[1].get_buffer("1.running_var").fill_(3)
    selected = select_domain(model.state_dict(), 1)
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    plain.load_state_dict(selected)
    assert (plain[1].running_var == 3).all()
    with pytest.raises(ValueError, match="domains 0 to 1, not 2"):
        select_domain(model.state_dict(), 2)
    with pytest.raises(ValueError, match="there is none"):
        select_domain(plain.state_dict(), 0)
