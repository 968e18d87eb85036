"""embed.py and search.py: what they write, that they go on where they were stopped, and what they find."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_pre_process_folder import make_photos, script, signals_as_before, spoil, table  # noqa: F401

import embed
import search
import utils.embeddings
import utils.neighbours
from datasets import load_split
from models import Pooling, build_model
from models.export import export_onnx
from utils.embeddings import network_hash, open_embeddings
from utils.errors import run_script
from utils.images import find_images
from utils.neighbours import Neighbours, Settings

SIZE = 32
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A network with weights by chance; it says that it was trained on images of 32 px."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("network") / "net.pth"
    data = {"training": {"images": f"uint8 (9, {SIZE}, {SIZE}, 3) sha256 00"}}
    torch.save({"model": build_model("resnet_small", 4, 12).state_dict(), "epoch": 1, "data": data,
                "config": {"backbone": "resnet_small"}}, path)  # fmt: skip
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_photos(tmp_path / "photos")


@pytest.fixture
def execute(monkeypatch, capsys) -> Callable[..., SimpleNamespace]:
    """Run embed.py or search.py in this process as the command line would."""

    def run(module, *argv: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv), "--device", "cpu"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_script(module.main)
        captured = capsys.readouterr()
        return SimpleNamespace(code=caught.value.code or 0, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def embedded(execute, checkpoint, photos, tmp_path) -> Path:
    done = execute(embed, "--images", photos, "--checkpoint_path", checkpoint, "--out", tmp_path / "e.npy")
    assert (done.code, done.err) == (0, "")
    return tmp_path / "e.npy"


def failed(result: SimpleNamespace, *words: str) -> None:
    assert result.code == 2, result.err
    assert ".py: error: " in result.err and result.err.count("\n") == 1, result.err
    for word in words:
        assert word in result.err


# ------------------------------------------------------------------------------------------------ embed.py


def test_a_folder_gets_the_embeddings_of_the_data_set_made_of_it(execute, script, checkpoint, embedded, tmp_path):  # noqa: F811
    assert script("--image_size", SIZE)[0] == 0
    given = ["--dataset", "mine", "--data_dir", tmp_path / "data", "--checkpoint_path", checkpoint]
    assert execute(embed, *given, "--out", tmp_path / "d.npy").code == 0
    rows, paths = np.load(embedded), [row["path"] for row in table(embedded.with_suffix(".csv"))]
    assert rows.shape == (12, 12) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert paths == [str(path) for path in find_images(tmp_path / "photos")]
    other = table(tmp_path / "d.csv")
    assert sorted(row["path"] for row in other) == paths
    order = [paths.index(row["path"]) for row in other]
    np.testing.assert_allclose(np.load(tmp_path / "d.npy"), rows[order], atol=1e-6)
    assert np.abs(np.diff(rows, axis=0)).max() > 0.01  # so the line above can tell rows apart


def test_one_half_of_a_data_set_is_what_the_plain_network_gives(execute, script, checkpoint, photos, tmp_path):  # noqa: F811
    assert script("--labels", "subfolders")[0] == 0
    given = ["--dataset", "mine", "--data_dir", tmp_path / "data", "--split", "validation", "--test_batch", 4]
    frozen = ["--backbone", "resnet_small", "--weights", checkpoint]
    assert execute(embed, *given, *frozen, "--out", tmp_path / "v.npy").code == 0
    images = load_split(tmp_path / "data", "mine", "validation").images
    model = build_model("resnet_small", weights=str(checkpoint)).eval()
    with torch.no_grad():
        expected = model.features(model.normalization(torch.from_numpy(np.array(images[:, 1:15, 1:15]))))[0]
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected.numpy(), atol=1e-6)
    assert [row["class"] for row in table(tmp_path / "v.csv")] == ["owl"] * 3 + ["rat"] * 3


def test_half(execute, checkpoint, embedded, photos, tmp_path):
    given = ["--images", photos, "--checkpoint_path", checkpoint, "--half", "--out", tmp_path / "h.npy"]
    assert execute(embed, *given).code == 0
    half = np.load(tmp_path / "h.npy")
    assert half.dtype == np.float16 and np.array_equal(half, np.load(embedded).astype(np.float16))


@pytest.mark.parametrize("save_every", [0, 1e9])
def test_interrupted_it_goes_on_to_the_same_bytes(execute, checkpoint, photos, tmp_path, monkeypatch, save_every):
    """A crash at any point: what was saved is not made again, what was not is; the files are those of one run."""
    monkeypatch.setattr(utils.embeddings, "SAVE_EVERY", save_every)
    given = ["--images", photos, "--checkpoint_path", checkpoint, "--test_batch", 2, "--workers", 0]
    assert execute(embed, *given, "--out", tmp_path / "whole.npy").code == 0
    seen, extract = [], utils.features.extract_features

    def counted(model, batches, precision, **rest):
        if len(seen) == 3:
            raise RuntimeError("killed")
        seen.append(len(batches[0]))
        return extract(model, batches, precision, **rest)

    monkeypatch.setattr(utils.features, "extract_features", counted)
    # killed outright: nothing of `close` happens
    monkeypatch.setattr(
        utils.embeddings.EmbeddingWriter, "close", lambda self: (self._out.flush(), self._table.flush())
    )
    with pytest.raises(RuntimeError, match="killed"):
        embed.main([*map(str, given), "--device=cpu", "--out", str(tmp_path / "cut.npy")])
    assert not (tmp_path / "cut.npy").exists() and (tmp_path / "cut.npy.part").stat().st_size > 0
    monkeypatch.undo()
    done = [0]
    monkeypatch.setattr(
        utils.features, "extract_features", lambda *a, **k: done.append(len(a[1][0])) or extract(*a, **k)
    )
    again = execute(embed, *given, "--out", tmp_path / "cut.npy")
    assert (again.code, again.err) == (0, "")
    assert sum(done) == (6 if save_every == 0 else 12) and ("going on after 6 of 12" in again.out) == (save_every == 0)
    for kind in ("npy", "csv"):
        assert (tmp_path / f"cut.{kind}").read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_a_request_to_stop_keeps_what_is_done(execute, checkpoint, photos, tmp_path, monkeypatch):
    from utils.stopping import Stopped, StopRequest

    calls = []

    def check(self):
        calls.append(1)
        if len(calls) == 5:
            raise Stopped(2)

    monkeypatch.setattr(StopRequest, "check", check)
    given = ["--images", photos, "--checkpoint_path", checkpoint, "--test_batch", 2, "--out", tmp_path / "e.npy"]
    stopped = execute(embed, *given)
    assert stopped.code == 130 and "the same command goes on" in stopped.out
    monkeypatch.undo()
    again = execute(embed, *given)
    assert again.code == 0 and "going on after 6 of 12 images" in again.out
    assert len(np.load(tmp_path / "e.npy")) == len(table(tmp_path / "e.csv")) == 12


def test_layers_pool_and_mirror_average_are_those_of_the_search_too(execute, photos, tmp_path):
    out = tmp_path / "e.npy"
    given = ["--images", photos, "--backbone", "resnet_small", "--weights", "none", "--image_size", SIZE, "--out", out]
    assert execute(embed, *given, "--layers", "layer2,layer3", "--pool", "gem,max", "--flip_eval").code == 0
    rows, _ = open_embeddings(out)
    assert rows.shape == (12, 64 + 128)
    found = execute(search, "--embeddings", out, "--query", photos, "--k", 1, "--json", tmp_path / "hits.json")
    assert found.code == 0, found
    # a query is embedded as the images were: its distance to another is what the rows say
    hits = json.loads((tmp_path / "hits.json").read_text())
    order = [row["path"] for row in table(out.with_suffix(".csv"))]
    for one in hits:
        (hit,) = one["hits"]
        expected = np.linalg.norm(rows[order.index(one["query"])] - rows[order.index(hit["path"])])
        assert hit["distance"] == pytest.approx(expected, abs=1e-5)
    # and other pools are another network
    failed(execute(embed, *given, "--layers", "layer2,layer3", "--flip_eval"), "pool was gem,max and is avg")


def test_what_is_complete_is_not_made_again(execute, embedded, checkpoint, photos, monkeypatch):
    before = embedded.read_bytes()
    monkeypatch.setattr(utils.features, "extract_features", None)
    again = execute(embed, "--images", photos, "--checkpoint_path", checkpoint, "--out", embedded)
    assert again.code == 0 and "is complete already, 12 rows" in again.out and embedded.read_bytes() == before


def test_two_networks_are_never_mixed(execute, embedded, checkpoint, photos, tmp_path):
    saved = torch.load(checkpoint)
    saved["model"]["feat_ext.0.bias"][3] += 1e-3
    torch.save(saved, tmp_path / "other.pth")
    given = ["--images", photos, "--checkpoint_path", tmp_path / "other.pth", "--out", embedded]
    failed(execute(embed, *given), "network_sha256 was", "--overwrite")
    assert execute(embed, *given, "--overwrite").code == 0
    _, facts = open_embeddings(embedded)
    assert facts["checkpoint"] == str(tmp_path / "other.pth")
    # nor with an unfinished file
    for kind in ("npy", "csv", "json"):
        embedded.with_suffix(f".{kind}").rename(f"{embedded.with_suffix('')}.{kind}.part")
    part = Path(f"{embedded.with_suffix('')}.json.part")
    part.write_text(
        json.dumps(facts | {"progress": [12, 12, Path(f"{embedded.with_suffix('')}.csv.part").stat().st_size]})
    )
    given[3] = checkpoint
    failed(execute(embed, *given), "network_sha256 was", "--overwrite")
    assert execute(embed, *given, "--overwrite").code == 0


@pytest.mark.parametrize("change, words", [
    (lambda photos: (photos / "cat/00.jpg").unlink(), "the images have changed"),
    (lambda photos: (photos / "cat/00.jpg").write_bytes(b"other"), "the images have changed"),
])  # fmt: skip
def test_other_images_need_overwrite(execute, embedded, checkpoint, photos, change, words):
    change(photos)
    failed(execute(embed, "--images", photos, "--checkpoint_path", checkpoint, "--out", embedded), words, "--overwrite")


def test_the_hash_is_of_what_makes_embeddings():
    torch.manual_seed(0)
    model = build_model("resnet_small", 4, 12)
    before = network_hash(model)
    model.clustering[2].weight.data += 1
    assert network_hash(model) == before
    model.base_model.bn1.running_mean += 1
    assert network_hash(model) != before


def test_unreadable_images(execute, checkpoint, photos, tmp_path):
    good = find_images(photos)
    bad = spoil(photos)
    given = ["--images", photos, "--checkpoint_path", checkpoint, "--out", tmp_path / "e.npy", "--test_batch", 4]
    failed(execute(embed, *given), str(bad[0]), "is not an image", "--skip_bad")
    done = execute(embed, *given, "--skip_bad")
    assert done.code == 0 and "9 rows" in done.out and "3 unreadable images are left out" in done.out
    rows, facts = open_embeddings(tmp_path / "e.npy")
    assert [row["path"] for row in table(tmp_path / "e.csv")] == [str(path) for path in good if path not in bad]
    assert [path for path, _ in facts["unreadable"]] == [str(path) for path in bad] and len(rows) == 9


@pytest.mark.parametrize("argv, words", [
    ([], "give either --images, or --dataset"),
    (["--images", "a", "--dataset", "b"], "give either --images, or --dataset"),
    (["--images", "a"], "give either --checkpoint_path, or --backbone"),
    (["--images", "a", "--checkpoint_path", "b"], "give --out FILE.npy"),
    (["--images", "a", "--checkpoint_path", "b", "--onnx", "c.onnx"], "--onnx writes the network alone"),
    (["--images", "a", "--checkpoint_path", "b", "--out", "c.txt"], "must end in .npy"),
    (["--images", "a", "--checkpoint_path", "b", "--out", "no/c.npy"], "its folder does not exist"),
    (["--dataset", "a", "--checkpoint_path", "b", "--out", "c.npy", "--skip_bad"], "--skip_bad goes with --images"),
    (["--images", "no", "--backbone", "resnet_small", "--weights", "none", "--out", "c.npy"], "no: no such folder"),
    (["--image", "a"], "did you mean --images?"),
    (["--images", ""], "--images: expected a path, got ''"),
    (["--images", "a", "--backbone", "resnet18", "--seed", 2**32], "--seed: must be at most 4294967295"),
    (["--images", "a", "--backbone", "resnet18", "--workers", 1025], "--workers: must be at most 1024"),
    (["--images", "a", "--checkpoint_path", "b", "--layers", "layer3"], "--layers goes with --backbone"),
])  # fmt: skip
def test_embed_refuses(execute, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    failed(execute(embed, *argv), words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backbone, layers", [("resnet_small", None), ("resnet_small", "layer1,layer3"),
                                              ("googlenet", None), ("googlenet_caffe", None)])  # fmt: skip
@pytest.mark.parametrize("features", ["embedding", "pooled"])
@pytest.mark.filterwarnings("ignore")  # torch's remarks on its exporter
def test_onnx_gives_what_pytorch_gives(tmp_path, backbone, layers, features):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    flip = layers is not None
    model = build_model(backbone, 4, 12, pooling=Pooling.parse(layers, "gem" if flip else "avg", unit=False)).eval()
    export_onnx(model, tmp_path / "net.onnx", 40, features, flip)
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)
    ours = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(["features"], {"images": images})[0]
    with torch.no_grad():
        pooled, embedding = model.features(model.normalization(torch.from_numpy(images)), flip)
    expected = (embedding if features == "embedding" else pooled).numpy()
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    assert np.abs(expected - expected[0]).max() > 1e-3 and not list(tmp_path.glob(".*"))


@pytest.mark.filterwarnings("ignore")
def test_embed_writes_onnx_for_the_size_of_the_checkpoint(execute, checkpoint, tmp_path):
    onnx = pytest.importorskip("onnx")
    done = execute(embed, "--checkpoint_path", checkpoint, "--onnx", tmp_path / "net.onnx")
    assert done.code == 0 and "(batch, 28, 28, 3)" in done.out and "squashed to 32 px" in done.out
    shape = onnx.load(tmp_path / "net.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_param or d.dim_value for d in shape.dim] == ["batch", 28, 28, 3]


# ------------------------------------------------------------------------------------------------ search.py


@pytest.mark.parametrize("engine", ["faiss", "torch"])
def test_hits_are_the_nearest_others(execute, embedded, photos, tmp_path, monkeypatch, engine):
    if engine == "faiss":
        pytest.importorskip("faiss")
    monkeypatch.setattr(utils.neighbours, "has_faiss", lambda: engine == "faiss")
    given = ["--embeddings", embedded, "--query", photos / "owl", photos / "cat/00.jpg", "--k", 3]
    done = execute(search, *given, "--json", tmp_path / "hits.json")
    assert (done.code, done.err) == (0, "") and f"exact search ({engine})" in done.out
    rows = np.load(embedded).astype(np.float64)
    paths = [row["path"] for row in table(embedded.with_suffix(".csv"))]
    answers = json.loads((tmp_path / "hits.json").read_text())
    assert [one["query"] for one in answers] == [
        *(str(p) for p in find_images(photos / "owl")),
        str(photos / "cat/00.jpg"),
    ]
    for one in answers:
        own = paths.index(one["query"])
        distances = np.linalg.norm(rows - rows[own], axis=1)
        nearest = [i for i in np.argsort(distances, kind="stable") if i != own][:3]
        assert [hit["path"] for hit in one["hits"]] == [paths[i] for i in nearest]
        assert [hit["rank"] for hit in one["hits"]] == [1, 2, 3]
        np.testing.assert_allclose([hit["distance"] for hit in one["hits"]], distances[nearest], atol=1e-5)
        for hit in one["hits"]:
            assert f"   {hit['rank']}  {hit['distance']:.4f}  {hit['path']}\n" in done.out


def test_a_query_from_elsewhere_finds_its_twin(execute, embedded, photos, tmp_path):
    (tmp_path / "copy.jpg").write_bytes((photos / "dog/03.jpg").read_bytes())
    done = execute(search, "--embeddings", embedded, "--query", tmp_path / "copy.jpg", "--json", tmp_path / "h.json")
    assert done.code == 0
    hits = json.loads((tmp_path / "h.json").read_text())[0]["hits"]
    assert hits[0]["path"] == str(photos / "dog/03.jpg") and hits[0]["distance"] < 1e-5 and len(hits) == 10


def test_contact_sheet(execute, embedded, photos, tmp_path):
    (photos / "rat/11.JPEG").unlink()
    given = ["--embeddings", embedded, "--query", photos / "cat", "--k", 11, "--sheet", tmp_path / "s.png"]
    assert execute(search, *given).code == 0
    sheet = np.array(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (3 * 170 + 8, 12 * 136 + 24, 3)
    with Image.open(find_images(photos / "cat")[0]) as image:
        image.thumbnail((128, 128), Image.Resampling.LANCZOS)
        tile = np.array(image)
    left, top = 8 + (128 - tile.shape[1]) // 2, 8 + (128 - tile.shape[0]) // 2
    assert np.array_equal(sheet[top : top + tile.shape[0], left : left + tile.shape[1]], tile)
    assert (sheet[8:136, 152 + 136 * 10 : 272 + 136 * 10] != 255).any()  # the last hit is drawn


def test_rows_of_arrays_are_shown(tmp_path):
    from utils.sheets import thumbnail

    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "a_img.npy", pixels)
    assert np.array_equal(np.array(thumbnail(f"{tmp_path / 'a_img.npy'}#2")), pixels[2])
    assert thumbnail(f"{tmp_path / 'a_img.npy'}#3").size == (128, 128)


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_the_recall_of_an_approximate_index_is_measured(index):
    pytest.importorskip("faiss")
    rows = np.random.default_rng(0).standard_normal((1200, 8)).astype(np.float32)
    poor = Neighbours(rows, Settings(index, nprobe=1, ef_search=1))
    good = Neighbours(rows, Settings(index, nprobe=1000, ef_search=1200))
    assert poor.recall(5)[0] < 0.9 < 0.999 < good.recall(5)[0] <= 1
    share, sample = poor.recall(5)
    drawn = np.random.default_rng(0).permutation(1200)[:sample]
    found = poor.search(rows[drawn], 6)[1]
    hits = 0
    for own, mine in zip(drawn, found, strict=True):
        order = np.argsort(np.square(rows - rows[own]).sum(1), kind="stable")
        hits += len(set(order[order != own][:5].tolist()) & set(mine.tolist()))
    assert sample == 1000 and share == pytest.approx(hits / 5000, abs=1e-3)
    distances, found = good.search(rows[:7], 4)
    expected = Neighbours(rows, Settings()).search(rows[:7], 4)
    assert np.array_equal(found, expected[1]) and np.array_equal(distances, expected[0])


def test_approximate_search_from_the_command_line(execute, embedded, photos):
    pytest.importorskip("faiss")
    done = execute(search, "--embeddings", embedded, "--query", photos / "cat", "--k", 2, "--index", "hnsw")
    assert done.code == 0 and "recall@2 against exact search: 100.00 % (on 12 of the images)" in done.out


def test_search_refuses_a_changed_network_and_takes_a_moved_one(execute, embedded, checkpoint, photos, tmp_path):
    given = ["--embeddings", embedded, "--query", photos / "cat/00.jpg"]
    facts = json.loads(embedded.with_suffix(".json").read_text())
    embedded.with_suffix(".json").write_text(json.dumps(facts | {"checkpoint": str(tmp_path / "gone.pth")}))
    failed(execute(search, *given), "gone.pth: no such file")
    assert execute(search, *given, "--checkpoint_path", checkpoint).code == 0
    saved = torch.load(checkpoint)
    saved["model"]["feat_ext.0.bias"][3] += 1e-3
    torch.save(saved, tmp_path / "gone.pth")
    failed(execute(search, *given), "gone.pth: is no longer the network that made")


@pytest.mark.parametrize("argv, words", [
    (["--query", "a.jpg"], "give --embeddings FILE.npy and --query PATH"),
    (["--embeddings", "e.npy"], "give --embeddings FILE.npy and --query PATH"),
    (["--embeddings", "none.npy", "--query", "a.jpg"], "none.npy: no such file; make it with embed.py"),
    (["--embeddings", "e.npy", "--query", "a.jpg", "--nprobe", "3"], "--nprobe goes with --index ivf"),
    (["--embeddings", "e.npy", "--query", "a.jpg", "--sheet", "s.jpg"], "must end in .png"),
    (["--embeddings", "e.npy", "--query", "a.jpg", "--json", "no/h.json"], "its folder does not exist"),
    (["--embeddings", "e.npy", "--query", "a.jpg", "--index", "ifv"], "did you mean ivf?"),
])  # fmt: skip
def test_search_refuses(execute, argv, words):
    failed(execute(search, *argv), words)


def test_search_refuses_queries_that_are_no_images(execute, embedded, tmp_path):
    failed(execute(search, "--embeddings", embedded, "--query", "nowhere.jpg"), "--query nowhere.jpg: no such file")
    (tmp_path / "text.jpg").write_text("no image")
    failed(execute(search, "--embeddings", embedded, "--query", tmp_path / "text.jpg"), "text.jpg: is not an image")


def test_approximate_search_needs_faiss(execute, embedded, photos, monkeypatch):
    monkeypatch.setattr(utils.neighbours, "has_faiss", lambda: False)
    failed(execute(search, "--embeddings", embedded, "--query", photos / "cat", "--index", "ivf"), "needs faiss")
