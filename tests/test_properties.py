"""Properties that hold for whatever comes in: labels, boxes, the manifest, thresholds, records, URIs."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfssd.config import Thresholds
from dfssd.data.boxes import corners, iou, unflip
from dfssd.data.checks import Label, Problem, check_label
from dfssd.data.formats.yolo import parse_yolo_text
from dfssd.data.manifest import Manifest, Row, read_manifest, write_manifest
from dfssd.errors import DamagedFile, DfssdError, mask
from dfssd.pseudo.fusion import fuse
from dfssd.pseudo.thresholds import ScoreCounts, policy_thresholds
from dfssd.runtime.outputs import damaged_outputs, digest_of
from dfssd.runtime.records import differences
from dfssd.runtime.storage import Storage
from dfssd.train import checkpoint

quick = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
share = st.floats(0, 1, width=32)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@pytest.fixture(scope="module")
def store():
    folder = tempfile.mkdtemp()
    yield Storage(folder)
    shutil.rmtree(folder)


@st.composite
def boxes(draw, columns=7, most=4, classes=3):
    """(n,columns) boxes inside the image; candidates lie above the floor score."""
    rows = []
    for _ in range(draw(st.integers(0, most))):
        w, h = (draw(st.floats(0.015625, 1, width=32)) for _ in range(2))
        cx, cy = (draw(share) * (1 - side) + side / 2 for side in (w, h))
        rows.append(
            [draw(st.integers(0, classes - 1)), cx, cy, w, h, draw(st.floats(0.0625, 1, width=32)), draw(share)][
                :columns
            ]
        )
    return np.array(rows, np.float32).reshape(-1, columns)


@quick
@given(
    st.one_of(
        st.text(max_size=200),
        st.lists(st.lists(finite, max_size=9).map(lambda r: " ".join(map(str, r)))).map("\n".join),
    )
)
def test_a_label_file_is_boxes_inside_the_image_or_a_named_problem(text):
    found = check_label(parse_yolo_text(text), 64, 48, classes=3)
    if isinstance(found, Problem):
        assert found.reason
        return
    assert found.ndim == 2 and found.shape[1] == 5 and np.isfinite(found).all()
    edges = corners(found)
    assert (edges >= -1e-5).all() and (edges <= 1 + 1e-5).all()
    assert ((found[:, 0] >= 0) & (found[:, 0] < 3) & (found[:, 0] == found[:, 0].round())).all()
    assert (found[:, 3:] > 0).all()


@quick
@given(boxes(5))
def test_good_labels_survive_as_they_are(given_boxes):
    text = "\n".join(f"{int(c)} {x:.9g} {y:.9g} {w:.9g} {h:.9g}" for c, x, y, w, h in given_boxes.tolist())
    label = parse_yolo_text(text)
    assert isinstance(label, Label)
    found = check_label(label, 640, 640, classes=3)
    if not isinstance(found, Problem) and len(found) == len(given_boxes):  # equal boxes count once
        order = [np.lexsort(some.round(4).T[::-1]) for some in (found, given_boxes)]
        np.testing.assert_allclose(found[order[0]], given_boxes[order[1]], atol=1e-4)


@quick
@given(boxes(), st.booleans(), st.booleans())
def test_mirroring_twice_changes_nothing_and_keeps_overlaps(some, left_right, up_down):
    turned = unflip(some, left_right, up_down)
    np.testing.assert_allclose(unflip(turned, left_right, up_down), some, atol=1e-6)
    before, after = (iou(corners(b), corners(b)) for b in (some, turned))
    np.testing.assert_allclose(before, after, atol=2e-3)
    assert ((before >= 0) & (before <= 1 + 1e-5)).all() and np.allclose(np.diag(before), 1, atol=1e-4)
    np.testing.assert_allclose(before, before.T)


@quick
@given(st.lists(boxes(), min_size=1, max_size=4), st.floats(0.3, 0.9), st.floats(0.01, 0.5), st.integers(1, 8))
def test_fused_boxes_are_few_sorted_and_never_surer_than_the_surest_view(views, limit, floor, most):
    fused = fuse(views, limit, floor, most)
    assert len(fused) <= most and np.isfinite(fused).all()
    assert (fused[:, 5] >= floor - 1e-6).all() and (np.diff(fused[:, 5]) <= 1e-6).all()
    highest = max((v[:, 5].max() for v in views if len(v)), default=0.0)
    assert (fused[:, 5] <= highest + 1e-5).all() and (fused[:, 6] <= 1 + 1e-5).all()


@quick
@given(
    st.lists(st.one_of(st.none(), boxes(5)), min_size=1, max_size=5),
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), min_size=3, max_size=3, unique=True
    ),
    st.sampled_from(["train", "val", "test", "unlabelled-only"]),
)
def test_the_manifest_gives_back_what_it_got(store, labels, names, split):
    rows = [Row(f"{k:016x}", f"/data/ü {k}.png", 64 + k, 48, split, b is not None, k, b) for k, b in enumerate(labels)]
    write_manifest(store, Manifest(rows, names, {"seed": 1}))
    first = store.read("manifest.parquet")
    back = read_manifest(store)
    assert back.names == names and back.meta["seed"] == 1
    for a, b in zip(rows, back.rows, strict=True):
        for field in ("image_id", "uri", "width", "height", "split", "labelled", "group"):
            assert getattr(a, field) == getattr(b, field)
        assert (a.boxes is None) == (b.boxes is None), "nobody labelled it is not the same as free of defects"
        if a.boxes is not None:
            np.testing.assert_array_equal(a.boxes, b.boxes)
    write_manifest(store, Manifest(rows[::-1], names, {"seed": 1}))
    assert store.read("manifest.parquet") == first, "equal content is an equal file"


@quick
@given(
    st.lists(boxes(classes=2), min_size=1, max_size=8),
    st.sampled_from(["fixed", "ema", "gmm", "match"]),
    st.floats(0.05, 0.95),
    st.tuples(st.floats(0, 10), st.floats(0, 10)),
)
def test_thresholds_are_within_their_limits_and_more_pass_a_lower_one(candidates, policy, tau, rates):
    scores = ScoreCounts.empty(2)
    for one in candidates:
        scores.add(one)
    config = Thresholds(threshold_policy=policy, tau=tau)
    found = policy_thresholds(config, policy, scores, np.array(rates), steps=100)
    assert found.shape == (2,) and np.isfinite(found).all()
    if policy != "fixed":
        assert (found >= config.lowest(policy) - 1e-9).all() and (found <= config.tau_max + 1e-9).all()
    assert (scores.per_image(found * 0.9) >= scores.per_image(found)).all()
    assert scores.per_image(np.zeros(2)).sum() * scores.images == pytest.approx(sum(map(len, candidates)))


anything = st.recursive(
    st.none() | st.booleans() | finite | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@quick
@given(st.one_of(st.binary(max_size=80), anything.map(lambda value: json.dumps(value).encode())))
def test_a_record_is_whole_or_a_damage_with_name_and_remedy(store, content):
    store.write("x/stage.json", content)
    try:
        record = store.read_record("x/stage.json", ("config", "digest"), "restore it")
    except DamagedFile as error:
        assert error.where.endswith("x/stage.json") and error.todo == "restore it"
    else:
        assert {"config", "digest"} <= set(record)


@quick
@given(
    st.dictionaries(st.text(max_size=5), anything, max_size=4),
    st.dictionaries(st.text(max_size=5), anything, max_size=4),
)
def test_differences_are_none_for_equal_settings_and_seen_from_both_sides(a, b):
    assert differences(a, a) == []
    assert len(differences(a, b)) == len(differences(b, a))


@quick
@given(st.dictionaries(st.sampled_from("abcd"), st.binary(min_size=1, max_size=20), min_size=1), st.data())
def test_any_change_of_an_output_is_found(store, files, data):
    for name, content in files.items():
        store.write(f"o/{name}", content)
    place = store.at("o")
    outputs = {name: place.digest(name) for name in files}
    assert damaged_outputs(place, outputs, read=("a", "b", "c", "d")) == {}
    victim = data.draw(st.sampled_from(sorted(files)))
    other = data.draw(st.binary(max_size=20).filter(lambda c: c != files[victim]))
    place.write(victim, other)
    assert set(damaged_outputs(place, outputs, read=("a", "b", "c", "d"))) == {victim}
    changed = {**outputs, victim: place.digest(victim)}
    assert digest_of(changed) != digest_of(outputs)


@settings(quick, max_examples=8)
@given(st.integers(0, 3), st.data())
def test_of_checkpoints_with_some_bytes_changed_the_newest_whole_one_is_loaded(changes, data):
    import torch

    with tempfile.TemporaryDirectory() as folder:
        place = Storage(folder)
        for step in (1, 2, 3):
            checkpoint.store_newest(place, step, {"step": step, "fingerprint": "f", "w": torch.ones(3) * step}, 3)
        hurt = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=changes, max_size=changes, unique=True))
        for step in hurt:
            file = Path(folder) / checkpoint.folder_name(step) / "state.pt"
            content = bytearray(file.read_bytes())
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
            file.write_bytes(content)
        whole = [s for s in (1, 2, 3) if s not in hurt]
        if whole:
            assert checkpoint.load_newest(place, "f")["step"] == max(whole)
        else:
            with pytest.raises(DfssdError, match="none of them is whole"):
                checkpoint.load_newest(place, "f")


word = st.text("abcdefghijklmnop0123456789-_.", min_size=1, max_size=8).filter(lambda w: set(w) != {"."})


@quick
@given(
    st.sampled_from(["s3://bucket", "file:///bucket"]),
    st.lists(word, max_size=3),
    st.lists(word, min_size=1, max_size=3),
)
def test_a_place_below_a_uri_keeps_its_query(scheme, prefix, parts):
    query = "?region=eu-west-1&endpoint_override=127.0.0.1%3A9" if scheme.startswith("s3") else ""
    base = Storage("/".join([scheme, *prefix]) + query)
    below = base.at(*parts)
    assert below.uri.endswith(query) and below.root == "/".join([base.root, *parts]) and "?" not in below.root
    assert below.query == base.query == query and base.uri_of(*parts) == below.uri
    assert Storage(below.uri).root == below.root


@quick
@given(st.text("abcXYZ019+=%", min_size=4, max_size=12), st.text("abcXYZ019+=%!$", min_size=4, max_size=12))
def test_no_password_of_a_uri_is_left_in_a_message(user, password):
    said = mask(f"cannot open s3://{user}:{password}@bucket/x?secret_key={password}&region=eu: no")
    assert "@bucket/x" in said and "region=eu: no" in said
    assert said == "cannot open s3://***@bucket/x?secret_key=***&region=eu: no"
