"""The vision server: the Open Inference Protocol, answers equal to offline ones, and it survives nonsense."""

from __future__ import annotations

import base64
import io
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from vision_support import save

from qtoolkit.serve import vision_app, vision_protocol
from qtoolkit.vision import data, measure, models, runtime
from qtoolkit.vision.pipeline import compress


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits classifier with 2:4 weights; it is not trained, which serving does not care about."""
    from safetensors.torch import save_file

    place = tmp_path_factory.mktemp("vision")
    save_file(dict(models.resolve("digits").network.state_dict()), place / "weights.safetensors")
    compress("digits", "nm", place / "digits", weights=place / "weights.safetensors")
    return place / "digits"


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with TestClient(vision_app.build_app("digits", runtime.load(folder))) as found:
        yield found


def pixels(count: int, start: int = 0) -> torch.Tensor:
    return data.load("digits-test", models.table()["digits"]).x[start : start + count]


def request(x: torch.Tensor, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(x.shape), "data": x.flatten().tolist()}
    return {"id": "7", "inputs": [{**tensor, **changes}]}


def offline(folder: Path, x: torch.Tensor) -> torch.Tensor:
    loaded = runtime.load(folder)
    return measure.logits(loaded.network, data.Images(x, torch.zeros(len(x))), loaded.architecture)


def test_health_and_metadata(client: TestClient) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2").json()["name"] == "qtoolkit"
    found = client.get("/v2/models/digits").json()
    assert found["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 1, 8, 8]}]
    assert found["parameters"]["scheme"] == "2:4"
    assert client.get("/v2/models/digits/versions/1/ready").json()["ready"] is True
    assert client.get("/v2/models/other").status_code == 404
    assert "digits" in client.get("/").text


def test_answers_equal_offline_ones(client: TestClient, folder: Path) -> None:
    x = pixels(5)
    reply = client.post("/v2/models/digits/infer", json=request(x))
    assert reply.status_code == 200
    found = reply.json()
    logits = torch.tensor(found["outputs"][0]["data"]).view(found["outputs"][0]["shape"])
    expected = offline(folder, x)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # another batch, another order of sums
    assert found["outputs"][1]["data"] == expected.argmax(dim=1).tolist()
    assert (found["id"], found["model_name"]) == ("7", "digits")
    normal = data.normalise(x, models.table()["digits"])
    again = client.post("/v2/models/digits/infer", json=request(normal, datatype="FP32", data=normal.tolist())).json()
    assert again["outputs"][1] == found["outputs"][1]


def test_the_float_network_answers_beside_the_compressed_one(folder: Path) -> None:
    x, weights = pixels(3), str(folder.parent / "weights.safetensors")
    loaded = runtime.load(folder)
    with TestClient(vision_app.build_app("digits", loaded, loaded.made_from(weights))) as client:
        assert client.get("/v2/models/digits-float").json()["parameters"]["scheme"] == "float"
        assert client.get("/v2/models/digits-float/ready").json() == {"name": "digits-float", "ready": True}
        replies = [client.post(f"/v2/models/{n}/infer", json=request(x)).json() for n in ("digits", "digits-float")]
    for reply, network in zip(replies, (loaded.network, models.resolve("digits", weights).network), strict=True):
        logits = torch.tensor(reply["outputs"][0]["data"]).view(3, 10)
        with torch.inference_mode():
            torch.testing.assert_close(logits, network(data.normalise(x, loaded.architecture)), rtol=1e-5, atol=1e-5)
        assert reply["parameters"]["compute_ms"] > 0


def test_encoded_images_are_accepted(client: TestClient, folder: Path) -> None:
    x = pixels(2)
    files = []
    for image in x:
        file = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(file, "png")
        files.append(base64.b64encode(file.getvalue()).decode())
    reply = client.post("/v2/models/digits/infer", json=request(x, datatype="BYTES", shape=[2], data=files))
    assert reply.json()["outputs"][1]["data"] == offline(folder, x).argmax(dim=1).tolist()


def test_class_names_of_a_transformers_classifier_are_told(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(10))
    model = str(save("vit", tmp_path / "model"))
    compress(model, "nm", tmp_path / "out", changes={"calibration.data": str(tmp_path / "x.npz")})
    with TestClient(vision_app.build_app("vit", runtime.load(tmp_path / "out"))) as client:
        assert client.get("/v2/models/vit").json()["parameters"]["labels"][3] == "kind 3"
        names = [row["name"] for row in client.get("/v2/models/vit").json()["outputs"]]
        pixels = torch.from_numpy(x[:2]).permute(0, 3, 1, 2)
        found = client.post("/v2/models/vit/infer", json=request(pixels)).json()["outputs"]
    assert [row["name"] for row in found] == names == ["logits", "classes", "labels"]
    assert found[2]["data"] == [f"kind {index}" for index in found[1]["data"]]


NONSENSE = {
    "no JSON": b"{",
    "no object": b"[1]",
    "deep": b"[" * 100_000,
    "no inputs": b'{"inputs": []}',
    "another name": b'{"inputs": [{"name": "x", "datatype": "UINT8", "shape": [1, 1, 1, 1], "data": [0]}]}',
}
WRONG: dict[str, dict[str, Any]] = {
    "datatype": {"datatype": "INT3"},
    "shape": {"shape": [1, 1, 9, 9]},
    "huge shape": {"shape": [1 << 40, 1, 8, 8]},
    "shape of words": {"shape": ["a"]},
    "too few": {"data": [0]},
    "ragged": {"data": [[0], [0, 1]]},
    "words": {"data": ["a"] * 64},
    "out of range": {"data": [256] * 64},
    "fractions": {"data": [0.5] * 64},
    "huge numbers": {"datatype": "FP32", "data": [10**400] * 64},
    "no data": {"data": None},
    "another size": {"shape": [1, 1, 4, 16]},
    "not base64": {"datatype": "BYTES", "shape": [1], "data": ["?"]},
    "no image": {"datatype": "BYTES", "shape": [1], "data": [base64.b64encode(b"hello").decode()]},
    "image count": {"datatype": "BYTES", "shape": [2], "data": []},
    "bytes of numbers": {"datatype": "BYTES", "shape": [1], "data": [3]},
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_gets_a_400_and_the_server_lives(client: TestClient, name: str) -> None:
    reply = client.post("/v2/models/digits/infer", content=NONSENSE[name])
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]
    assert client.post("/v2/models/digits/infer", json=request(pixels(1))).status_code == 200


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_tensor_gets_a_400_that_says_why(client: TestClient, name: str) -> None:
    reply = client.post("/v2/models/digits/infer", json=request(pixels(1), **WRONG[name]))
    assert reply.status_code == 400, reply.text
    assert len(reply.json()["error"]) < 400


def test_nan_and_too_many_images_are_refused(client: TestClient) -> None:
    body = json.dumps(request(pixels(1), datatype="FP32", data=[float("nan")] * 64))
    assert client.post("/v2/models/digits/infer", content=body).status_code == 400
    many = torch.zeros(vision_protocol.MOST_IMAGES + 1, 1, 8, 8, dtype=torch.uint8)
    assert client.post("/v2/models/digits/infer", json=request(many)).status_code == 400


def test_a_body_that_never_ends_gets_a_413(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_app, "MOST_BYTES", 1000)
    assert client.post("/v2/models/digits/infer", content=b" " * 2000).status_code == 413


def test_the_command_answers_1000_requests_of_32_clients_and_stops_in_order(folder: Path) -> None:
    words = [
        sys.executable,
        "-c",
        "from qtoolkit.cli import main; main()",
        "serve",
        str(folder),
        "--port",
        "0",
        "--json",
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["kernels"] == dict(Counter(runs.name for runs in runtime.load(folder).kernels.values()))
        place = f"{ready['url']}/models/{ready['model']}/infer"
        expected = offline(folder, pixels(50)).argmax(dim=1).tolist()
        bodies = [request(pixels(1, i)) for i in range(50)]
        # A connection for every thread: httpcore's pool may close a surplus idle one that a waiting thread was given
        # (https://github.com/encode/httpcore/issues/1110).
        limits = httpx.Limits(max_keepalive_connections=32)
        with httpx.Client(timeout=60, limits=limits) as http, ThreadPoolExecutor(32) as pool:
            replies = list(pool.map(lambda i: http.post(place, json=bodies[i % 50]), range(1000)))
        assert {reply.status_code for reply in replies} == {200}
        assert [reply.json()["outputs"][1]["data"][0] for reply in replies] == [expected[i % 50] for i in range(1000)]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
