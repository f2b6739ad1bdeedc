"""What updates are found to be without a model; with one: tests/integration/test_poison.py, test_update_forms.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedcore.config import EncryptType, Settings, UploadCompressType
from fedcore.core import admission
from fedcore.core.admission import Acceptance, Verdict
from fedcore.models.history import ModelHistory
from fedcore.services.screening import Finding, Screening
from fedcore.services.terms import update_limit
from fedcore.services.update_forms import UpdateForms
from fedcore.wire import codec
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.image import ImageTemplate
from fedcore.wire.messages import CompressFeatureMap, FeatureMap, RequestUpdateModel

LAYOUT = Layout((Weight("a", (3,)), Weight("b", (2,)), Weight("fixed", (2,), aggregated=False)))


def screening(
    kind: EncryptType = EncryptType.NOT_ENCRYPT, *, compressed: bool = False, bound: float = 0.0
) -> Screening:
    base = Settings()
    uploads = UploadCompressType.DIFF_SPARSE_QUANT if compressed else UploadCompressType.NO_COMPRESS
    settings = replace(
        base,
        encrypt=replace(base.encrypt, encrypt_type=kind),
        compression=replace(base.compression, upload_compress_type=uploads),
        fedcore=replace(base.fedcore, update=replace(base.fedcore.update, norm_bound=bound)),
    )
    image = ImageTemplate(LAYOUT).image({weight.name: np.zeros(weight.size) for weight in LAYOUT})
    models, nobody = ModelHistory(0, image), None
    forms = UpdateForms(settings, LAYOUT, models, nobody)
    return Screening(settings, LAYOUT, models, nobody, nobody, forms)  # type: ignore[arg-type]


def plain(*names: str, **more: Any) -> RequestUpdateModel:
    features = tuple(FeatureMap(name, np.ones(LAYOUT.by_name[name].size, np.float32)) for name in names)
    return RequestUpdateModel("job", "c", 1, features, "1", **more)


class TestShape:
    def test_a_plain_update_may_leave_weights_out(self) -> None:
        assert screening().shape(plain("b")) == (Finding.FIT, (), "")

    @pytest.mark.parametrize("kind", [EncryptType.PW_ENCRYPT, EncryptType.STABLE_PW_ENCRYPT])
    @pytest.mark.parametrize("bound", [0.0, 5.0])
    def test_a_masked_one_holds_every_aggregated_weight(self, kind: EncryptType, bound: float) -> None:
        """The masks of others on what is missing would stay in the sum."""
        masked = screening(kind, bound=bound)
        assert masked.shape(plain("a", "b"))[0] is Finding.FIT
        assert masked.shape(plain("a", "fixed")) == (Finding.INCOMPLETE, (), "b")

    def test_a_signed_one_as_well(self) -> None:
        signs = {"sign": 1, "index_array": np.int32([0])}
        signed = screening(EncryptType.SIGNDS)
        assert signed.shape(plain("b", "a", **signs)) == (Finding.FIT, (("b", 2), ("a", 3)), "")
        assert signed.shape(plain("b", **signs)) == (Finding.INCOMPLETE, (), "a")
        assert signed.shape(plain("b")) == (Finding.FIT, (), "")

    def test_what_is_no_update_is_unfit(self) -> None:
        strange = replace(plain("a"), feature_map=(FeatureMap("x", np.ones(1, np.float32)),))
        for each in (screening(), screening(EncryptType.PW_ENCRYPT), screening(compressed=True)):
            assert each.shape(strange)[0] is Finding.UNFIT
        assert screening(compressed=True).shape(plain("a", upload_compress_type=1))[0] is Finding.UNFIT


def test_the_missing_weight_is_named() -> None:
    verdict = admission.judge_update(Acceptance.UNFIT, "c", 1, 1, 7, missing="a.weight")
    assert verdict == Verdict(400, "The updated weight of parameter a.weight is missing, fl id: c")
    assert admission.judge_update(Acceptance.FULL, "c", 1, 1, 7, missing="a.weight").code == 300


@pytest.mark.parametrize("size", [1, 7, 50_000])
@pytest.mark.parametrize("count", [1, 150])
def test_the_longest_compressed_update_fits_a_slot(size: int, count: int) -> None:
    """All values travel, under long names that come twice."""
    layout = Layout(tuple(Weight(f"{i:03}" + "x" * 200, (size,)) for i in range(count)))
    names = tuple(weight.name for weight in layout)
    items = tuple(CompressFeatureMap(name, np.zeros(size, np.int8), -1.0, 1.0) for name in names)
    request = RequestUpdateModel(
        "job", "c" * 384, 1, None, "1", compress_feature_map=items, upload_compress_type=1, name_vec=names
    )
    signed = tuple(FeatureMap(name, np.empty(0, np.float32)) for name in names)
    other = RequestUpdateModel("job", "c" * 384, 1, signed, "1", sign=1, index_array=np.arange(100))
    assert max(len(codec.encode(request)), len(codec.encode(other))) + (1 << 16) < update_limit(layout)
