"""`relook serve --collect`: what is written, once and whole; the queue's order; what is refused. Real HTTP requests."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pyarrow
import pyarrow.parquet
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from support.canned_engine import CELLS, CannedEngine
from support.running_server import data_url, serving
from support.scripted_model import picture
from typer.testing import CliRunner

import relook
from relook.cli import app as cli
from relook.errors import UserError
from relook.io import locked_file
from relook.perceive.local import LocalEngine
from relook.serve.app import create_app
from relook.serve.collect import Collection
from relook.serve.page import FOLDER
from relook.serve.settings import ServeSettings

PNG = data_url(picture(size=(160, 120)))
LINE = {"image": PNG, "question": "What is it?", "answer": "a card", "bboxs": [[20, 31, 60, 58]]}


def client_of(path, queue=None, engine=None, **settings) -> TestClient:
    collection = Collection(path, queue)
    client = TestClient(create_app(engine or CannedEngine(), ServeSettings.model_validate(settings), collection))
    client.collection = collection
    return client


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def when(true) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def asked_all(client) -> dict:
    """The state of the queue once the model is through."""
    when(lambda: not client.get("/v1/collect").json()["queue"]["asking"])
    return client.get("/v1/collect").json()["queue"]


@pytest.fixture
def questions(tmp_path):
    """Five questions about two images, one of them turned by its EXIF tag, in a folder of their own."""
    folder = tmp_path / "in"
    folder.mkdir()
    picture(0).save(folder / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(1, (200, 80)).save(folder / "b.jpg", exif=turned)
    rows = [("a.png", "one"), ("b.jpg", "two"), ("gone.png", "three"), ("a.png", "four"), ("b.jpg", "five")]
    text = "".join(json.dumps({"image": image, "question": text}) + "\n" for image, text in rows)
    (folder / "questions.jsonl").write_text(text)
    return folder / "questions.jsonl"


SURE = {"one": 0.9, "two": 0.2, "four": 0.5, "five": 0.7}


def test_a_line_is_appended_once_and_a_second_answer_corrects_it(tmp_path):
    client, own = client_of(tmp_path / "own.jsonl"), tmp_path / "own.jsonl"
    assert client.get("/v1/models").json()["data"][0]["relook"]["collects"] is True
    assert client.post("/v1/collect", json=LINE).json() == {"line": 1, "saved": "new"}
    assert client.post("/v1/collect", json=LINE).json() == {"line": 1, "saved": "same"}
    other = LINE | {"question": "Which color?", "answer": " red ", "bboxs": []}
    assert client.post("/v1/collect", json=other).json() == {"line": 2, "saved": "new"}
    assert client.post("/v1/collect", json=LINE | {"answer": "a page"}).json() == {"line": 1, "saved": "corrected"}
    first, second = lines(own)
    assert first == LINE | {"image": first["image"], "answer": "a page"}
    assert second == {"image": first["image"], "question": "Which color?", "answer": "red", "bboxs": []}
    (image,) = (tmp_path / "own_images").iterdir()
    assert first["image"] == f"own_images/{image.name}"
    assert image.read_bytes() == base64.b64decode(PNG.partition(",")[2])
    assert client.get("/v1/collect").json() == {"file": "own.jsonl", "lines": 2, "queue": None}


def test_build_takes_the_file_and_crops_what_was_marked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    client_of(tmp_path / "own.jsonl").post("/v1/collect", json=LINE)
    done = CliRunner().invoke(cli, ["data", "build", "own.jsonl", "items.jsonl"])
    assert done.exit_code == 0, done.output
    (item,) = lines(tmp_path / "items.jsonl")
    assert item["messages"][-1]["content"] == "a card" and item["bboxs"] == LINE["bboxs"]
    with Image.open(tmp_path / item["images"][0]) as image:  # 8 cells of 20 x 15 pixels
        assert image.size == (160, 120) and item["images"][1] == f"{item['images'][0]}_20,30,60,60"
    assert CliRunner().invoke(cli, ["data", "check", "items.jsonl"]).exit_code == 0


def test_many_at_once_are_each_written_once(tmp_path):
    client = client_of(tmp_path / "own.jsonl")
    bodies = [LINE | {"question": f"{n % 12}?"} for n in range(48)]
    with ThreadPoolExecutor(8) as threads:
        said = list(threads.map(lambda body: client.post("/v1/collect", json=body).json()["saved"], bodies))
    assert sorted(said) == ["new"] * 12 + ["same"] * 36
    assert sorted(line["question"] for line in lines(tmp_path / "own.jsonl")) == sorted(f"{n}?" for n in range(12))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bboxs": [[20, 30, 161, 60]]}, "not inside the image of 160 x 120 pixels"),
        ({"bboxs": [[60, 30, 20, 60]]}, "not inside the image"),
        ({"bboxs": [[20, 30, 60]]}, "bboxs[0]"),
        ({"bboxs": [[0.1, 0.1, 0.2, 0.2]]}, "bboxs[0][0]"),
        ({"answer": "  "}, "'answer' is ''"),
        ({"question": ""}, "'question' is ''"),
        ({"answer": "see <image>"}, "<image> in a text would stand for an image"),
        ({"answer": "half \ud83d"}, "is half a character"),
        ({"answer": "a" * 20_000}, "20,000 characters"),
        ({"image": None}, "expected a data URL, or the number"),
        ({"number": 1}, "expected a data URL, or the number"),
        ({"image": None, "number": 1}, "question 1 is not in the queue, which has 0"),
        ({"image": "http://127.0.0.1/a.png"}, "expected a data URL"),
        ({"image": "/etc/passwd"}, "expected a data URL"),
        ({"image": "data:image/png;base64,AAAA"}, "image 1"),
        ({"path": "../x"}, "path"),
    ],
)
def test_what_is_refused_writes_nothing(tmp_path, change, sentence):
    client = client_of(tmp_path / "own.jsonl")
    body = json.dumps(LINE | change)
    response = client.post("/v1/collect", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and sentence in response.json()["error"]["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"] and lines(tmp_path / "own.jsonl") == []


def test_every_route_needs_the_key_and_none_is_there_without_a_collection(tmp_path, questions):
    key = "sesame-sesame-sesame"
    client = client_of(tmp_path / "own.jsonl", questions, security={"keys": [key]})
    calls = [
        ("GET", "/v1/collect"),
        ("GET", "/v1/collect/next"),
        ("GET", "/v1/collect/images/1"),
        ("POST", "/v1/collect"),
    ]
    for method, path in calls:
        body = LINE if method == "POST" else None
        assert client.request(method, path, json=body).status_code == 401
        assert client.request(method, path, json=body, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    plain = TestClient(create_app(CannedEngine()))
    assert {plain.request(method, path, json=LINE).status_code for method, path in calls} == {404}
    assert "collects" not in plain.get("/v1/models").json()["data"][0]["relook"]
    assert not [path for path in plain.get("/openapi.json").json()["paths"] if "collect" in path]


# -- the file


@pytest.mark.parametrize(
    "text",
    [
        '[{"image": "a.png", "question": "q", "answer": "a"}]',
        '[\n{"image": "a.png", "question": "q", "answer": "a"}\n]',
        "image,question,answer\na.png,q,a\n",
        '{"messages": [], "images": []}\n',
        '{"image": "a.png", "question": "q"}\nbroken\n{"image": "a.png", "question": "r"}\n',
        "broken",
    ],
)
def test_a_file_that_is_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="not a file of questions"):
        Collection(path)
    assert path.read_text() == text


def test_a_line_cut_by_the_end_of_its_writer_is_cut_off(tmp_path):
    path, whole = tmp_path / "own.jsonl", '{"image": "a.png", "question": "é", "answer": "b", "bboxs": []}'
    path.write_text(f'{whole}\n{{"image": "a.png", "que', encoding="utf-8")
    line = {"image": "a.png", "question": "r", "answer": "c", "bboxs": []}
    assert Collection(path).save(line) == (2, "new")
    assert lines(path) == [json.loads(whole), line] and path.read_text(encoding="utf-8").startswith(f"{whole}\n")
    path.write_text('{"image": "a.png", "que')  # the very first
    assert Collection(path).save(line) == (1, "new") and lines(path) == [line]
    path.write_text(whole, encoding="utf-8")  # whole, but for its end
    assert Collection(path).save(line) == (2, "new")
    assert lines(path) == [json.loads(whole), line]


def test_what_somebody_else_edits_meanwhile_stays(tmp_path):
    client, own = client_of(tmp_path / "own.jsonl"), tmp_path / "own.jsonl"
    client.post("/v1/collect", json=LINE)
    other = {"image": "x.png", "question": "by editor", "answer": "a"}
    own.write_text(own.read_text() + json.dumps(other) + "\n")
    assert client.post("/v1/collect", json=LINE | {"answer": "b"}).json() == {"line": 1, "saved": "corrected"}
    assert [line["answer"] for line in lines(own)] == ["b", "a"]
    assert client.post("/v1/collect", json=LINE | {"question": "r"}).json() == {"line": 3, "saved": "new"}
    own.write_text(own.read_text().replace('"answer": "a"', '"answer": "c"'))  # as long as it was
    assert client.post("/v1/collect", json=LINE | {"answer": "d"}).json() == {"line": 1, "saved": "corrected"}
    assert [line["answer"] for line in lines(own)][:2] == ["d", "c"]


def test_a_full_disk_is_said_and_leaves_whole_lines(tmp_path, monkeypatch):
    client, own = client_of(tmp_path / "own.jsonl"), tmp_path / "own.jsonl"
    client.post("/v1/collect", json=LINE)
    before, fsync = own.read_bytes(), os.fsync

    def full(number):
        if os.fstat(number).st_ino == own.stat().st_ino:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    response = client.post("/v1/collect", json=LINE | {"question": "r" * 400})
    assert response.status_code == 500 and "No space left on device); make room" in response.json()["error"]["message"]
    assert own.read_bytes() == before
    monkeypatch.undo()
    assert client.post("/v1/collect", json=LINE | {"question": "r" * 400}).json() == {"line": 2, "saved": "new"}


def test_a_killed_server_has_written_and_two_cannot_write(tmp_path):
    own = tmp_path / "own.jsonl"
    command = [sys.executable, "-m", "relook", "serve", "cards-tiny", "--port", "0", "--collect", str(own)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            url = next(found[0] for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            assert httpx2.post(f"{url}/v1/collect", json=LINE).json() == {"line": 1, "saved": "new"}
            again = CliRunner().invoke(cli, ["serve", "cards-tiny", "--port", "0", "--collect", str(own)])
            assert again.exit_code == 2 and "own.jsonl: another run is writing here" in again.stderr
            assert len(again.stderr.strip().splitlines()) == 1
        finally:
            process.send_signal(signal.SIGKILL)
    with locked_file(own):
        client = client_of(own)
        assert client.post("/v1/collect", json=LINE).json() == {"line": 1, "saved": "same"}
    assert len(lines(own)) == 1


def test_wrong_options_are_one_line(tmp_path, questions):
    for arguments, sentence in (
        (["--queue", questions], "give that, too"),
        (["--collect", questions, "--queue", questions], "is the queue; give another place"),
        (["--collect", tmp_path / "in"], "not a file"),
        (["--collect", tmp_path / "own.jsonl", "--queue", tmp_path / "gone.jsonl"], "gone.jsonl: no such file"),
    ):
        done = CliRunner().invoke(cli, ["serve", "cards-tiny", "--port", "0", *map(str, arguments)])
        assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1
        assert sentence in done.stderr.lower(), done.stderr


# -- the queue


def test_the_least_sure_come_first_and_are_answered_once(tmp_path, questions):
    engine = CannedEngine(SURE, silent=["five"], busy=2)
    client = client_of(tmp_path / "own.jsonl", questions, engine)
    queue = asked_all(client)
    problem = queue.pop("problem")
    assert queue == {"total": 5, "asked": 4, "left": 0, "asking": False, "saved": 0, "failed": 1}
    assert problem.startswith("question 3: ") and "gone.png: no such file" in problem
    sizes = {"one": (130, 90), "two": (80, 200), "four": (130, 90), "five": (80, 200)}  # upright
    assert engine.asked == [(name, size, True) for name, size in sizes.items()]
    order = []
    while (entry := client.get("/v1/collect/next").json())["number"]:
        order.append(entry["question"])
        assert entry["sure"] == pytest.approx(0.0 if entry["question"] == "five" else SURE[entry["question"]])
        body = {"number": entry["number"], "question": entry["question"], "answer": "x", "bboxs": [[1, 2, 70, 80]]}
        assert client.post("/v1/collect", json=body).json()["saved"] == "new"
        assert client.post("/v1/collect", json=body).json()["saved"] == "same"
    assert order == ["five", "two", "four", "one"]  # a silent one first
    saved = lines(tmp_path / "own.jsonl")
    assert saved[0] == {"image": "in/b.jpg", "question": "five", "answer": "x", "bboxs": [[1, 2, 70, 80]]}
    assert [line["image"] for line in saved] == ["in/b.jpg", "in/b.jpg", "in/a.png", "in/a.png"]
    assert asked_all(client)["saved"] == 4
    again = CannedEngine(SURE)
    assert asked_all(client_of(tmp_path / "own.jsonl", questions, again))["saved"] == 4
    assert again.asked == []
    done = CliRunner().invoke(cli, ["data", "build", str(tmp_path / "own.jsonl"), str(tmp_path / "items.jsonl")])
    assert done.exit_code == 0 and "4 items" in done.stdout, done.output


def test_before_the_model_has_answered_the_first_comes_and_the_count_is_honest(tmp_path, questions):
    engine = CannedEngine(SURE)
    engine.gate.clear()
    client = client_of(tmp_path / "own.jsonl", questions, engine)
    when(lambda: engine.asked)
    queue = client.get("/v1/collect").json()["queue"]
    assert (queue["asked"], queue["left"], queue["asking"]) == (0, 5, True)
    entry = client.get("/v1/collect/next").json()
    assert (entry["number"], entry["question"], entry["reply"], entry["sure"]) == (1, "one", None, None)
    assert client.get("/v1/collect/next", params={"skip": [1, 2]}).json()["number"] == 3
    engine.gate.set()
    asked_all(client)
    skipped = client.get("/v1/collect/next", params={"skip": [2, 4]}).json()
    assert skipped["question"] == "five"
    assert client.get("/v1/collect/next", params={"skip": [1, 2, 4, 5]}).json() == {"number": None}


def test_an_engine_that_closes_leaves_the_rest_unasked_and_says_so(tmp_path, questions):
    engine = CannedEngine(SURE)
    engine.gate.clear()
    client = client_of(tmp_path / "own.jsonl", questions, engine)
    when(lambda: engine.asked)
    engine.close()
    engine.gate.set()
    queue = asked_all(client)
    assert (queue["asked"], queue["left"], queue["asking"]) == (1, 4, False)


def test_without_probabilities_the_order_is_that_of_the_file(tmp_path, questions):
    client = client_of(tmp_path / "own.jsonl", questions, CannedEngine(silent=["four"]))
    asked_all(client)
    found = [client.get("/v1/collect/next", params={"skip": skip}).json() for skip in ([], [4], [4, 1])]
    assert [each["question"] for each in found] == ["four", "one", "two"] and found[1]["sure"] is None


def test_the_reply_is_what_the_model_said_with_its_crop(tmp_path, questions):
    client = client_of(tmp_path / "own.jsonl", questions, CannedEngine(SURE))
    asked_all(client)
    entry = client.get("/v1/collect/next").json()
    assert entry["name"] == "b.jpg" and entry["answers"] == entry["bboxs"] == []
    (choice,), (look,) = entry["reply"]["choices"], entry["reply"]["relook"]["looks"]
    assert choice["message"]["content"] == "TWO" and look["cells"] == list(CELLS)
    crop = Image.open(io.BytesIO(base64.b64decode(look["crop"].partition(",")[2])))
    whole = Image.open(io.BytesIO(client.get("/v1/collect/images/2").content))
    x1, y1, x2, y2 = look["box"]
    assert crop.size == (x2 - x1, y2 - y1) and whole.size == (200, 80)  # as stored; browsers turn it


def test_images_that_browsers_do_not_show_come_as_png(tmp_path):
    picture().save(tmp_path / "a.tiff")
    picture().save(tmp_path / "b.png", "BMP")
    picture().save(tmp_path / "c.jpg")
    rows = [{"image": name, "question": "q"} for name in ("a.tiff", "b.png", "c.jpg", "d.png")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    client = client_of(tmp_path / "own.jsonl", tmp_path / "q.jsonl")
    for number, kind in ((1, "PNG"), (2, "PNG"), (3, "JPEG")):
        response = client.get(f"/v1/collect/images/{number}")
        with Image.open(io.BytesIO(response.content)) as image:
            assert image.format == kind and response.headers["content-type"] == f"image/{kind.lower()}"
            assert image.size == (130, 90)
    assert client.get("/v1/collect/images/4").status_code == 400
    assert client.get("/v1/collect/images/5").status_code == 400


def test_answers_boxes_and_fields_of_the_queue_are_kept(tmp_path):
    picture().save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "q", "answer": ["10.00", "10"], "bboxs": [[1, 2, 30, 40]], "field": "total"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    client = client_of(tmp_path / "own.jsonl", tmp_path / "q.jsonl")
    entry = client.get("/v1/collect/next").json()
    assert (entry["answers"], entry["bboxs"]) == (["10.00", "10"], [[1, 2, 30, 40]])
    said = {"number": 1, "question": "q", "bboxs": entry["bboxs"]}
    client.post("/v1/collect", json=said | {"answer": "10"})
    assert lines(tmp_path / "own.jsonl") == [row | {"answer": ["10", "10.00"]}]
    client.post("/v1/collect", json=said | {"answer": "12"})
    assert lines(tmp_path / "own.jsonl") == [row | {"answer": "12"}]
    client.post("/v1/collect", json=said | {"answer": "x", "question": "another"})
    assert lines(tmp_path / "own.jsonl")[1] == {
        "image": "a.png",
        "question": "another",
        "answer": "x",
        "bboxs": row["bboxs"],
    }


@pytest.mark.parametrize("form", ["csv", "items", "parquet"])
def test_the_queue_may_be_of_other_forms(tmp_path, form):
    folder = tmp_path / "in"
    folder.mkdir()
    picture().save(folder / "a.png")
    path, expected = folder / "q.csv", os.path.join("in", "a.png")
    path.write_text("image,question,answer,x1,y1,x2,y2\na.png,Who?,ACME,10,20,40,50\n")
    if form == "items":
        path = folder / "items.json"
        assert CliRunner().invoke(cli, ["data", "build", str(folder / "q.csv"), str(path)]).exit_code == 0
    if form == "parquet":  # with the image in it, which is then written beside the file
        path = folder / "q.parquet"
        image = {"bytes": (folder / "a.png").read_bytes(), "path": None}
        row = {"image": image, "question": "Who?", "answer": "ACME", "bboxs": [[10, 20, 40, 50]]}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    client = client_of(tmp_path / "own.jsonl", path)
    entry = client.get("/v1/collect/next").json()
    assert (entry["question"], entry["answers"], entry["bboxs"]) == ("Who?", ["ACME"], [[10, 20, 40, 50]])
    client.post("/v1/collect", json={"number": 1, "question": "Who?", "answer": "ACME", "bboxs": entry["bboxs"]})
    (line,) = lines(tmp_path / "own.jsonl")
    if form == "parquet":
        expected = f"own_images/{next((tmp_path / 'own_images').iterdir()).name}"
        assert (tmp_path / expected).read_bytes() == (folder / "a.png").read_bytes()
    assert line == {"image": expected, "question": "Who?", "answer": "ACME", "bboxs": [[10, 20, 40, 50]]}


def test_what_the_queue_has_besides_is_named_and_left_out(tmp_path):
    picture().save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "q \ud83d"}, {"image": "a.png", "question": "q"}]
    rows += [{"image": "a.png_0,0,9,9", "question": "q"}]  # no line about a part of an image could be built
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    client = client_of(tmp_path / "own.jsonl", tmp_path / "q.jsonl")
    assert asked_all(client)["total"] == 1 and client.get("/v1/collect/next").json()["question"] == "q"
    first, part = client.collection.left_out
    assert "q.jsonl:1" in first and part.endswith(
        "q.jsonl:3: a.png_0,0,9,9 is a part of an image; give the whole image"
    )


def test_boxes_of_the_queue_that_are_not_in_pixels_are_refused(tmp_path):
    picture().save(tmp_path / "a.png")
    boxes = [[0.1, 0.2, 0.5, 0.75], [0.25, 0.5, 0.6, 0.9], [0.3, 0.3, 0.4, 0.8]]
    rows = [{"image": "a.png", "question": f"{n}?", "answer": "a", "bboxs": [box]} for n, box in enumerate(boxes)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="0-1"):
        Collection(tmp_path / "own.jsonl", tmp_path / "q.jsonl")


def test_how_sure_a_real_model_is_comes_of_the_probabilities_that_the_api_gives(tmp_path):
    question = "Which code does the blue box show?"
    (tmp_path / "card.webp").write_bytes((FOLDER / "examples/card-1.webp").read_bytes())
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "card.webp", "question": question}) + "\n")
    engine = LocalEngine(relook.load("cards-tiny"))
    with serving(engine) as served, Image.open(tmp_path / "card.webp") as image:
        answer = served.ask((image.convert("RGB"), question), logprobs=True)
    client = client_of(tmp_path / "own.jsonl", tmp_path / "q.jsonl", engine)
    asked_all(client)
    entry = client.get("/v1/collect/next").json()
    engine.close()
    logprobs = [token.logprob for token in answer.choices[0].logprobs.content]
    product = 1.0
    for each in logprobs:
        product *= 2.718281828459045**each
    assert entry["sure"] == pytest.approx(product, rel=1e-4)
    assert entry["reply"]["choices"][0]["message"]["content"] == answer.choices[0].message.content == "164"
