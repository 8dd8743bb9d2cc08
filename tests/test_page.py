"""The page as people use it, in a real browser, without a network; what it lets in, and what it does when many come."""

import base64
import io
import json
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection

import httpx
import pytest
from conftest import ROOT
from PIL import Image
from test_report import HARM, browser, needs_browser

from qwen_vl_kit import page


def png(shade=0, size=(60, 30), **how):
    content = io.BytesIO()
    image = Image.new("RGB", size, (shade,) * 3)
    image.putpixel((size[0] - 1, size[1] - 1), (255 - shade,) * 3)  # an image of one color has nothing to read
    image.save(content, how.pop("format", "PNG"), **how)
    return content.getvalue()


class Fake:
    """Reads an image as its shade, at a speed of its own, and knows who was there."""

    instruction, limit = "Write it.", 12

    def __init__(self, folder, pause=0.0):
        for number in range(8):
            (folder / "held_out").mkdir(exist_ok=True)
            (folder / "held_out" / f"{number}.png").write_bytes(png(100 + number))
        self.source = Namespace(name="fake/model", run=folder)
        self.pause, self.error = pause, None
        self.begun, self.ended, self.at_once, self.most = [], [], 0, 0

    def stream(self, picture, stopped=lambda: False):
        from qwen_vl_kit.reader import Piece

        shade = picture.getpixel((0, 0))[0]
        self.begun.append(shade)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            for text in [*f"x _ {{ {shade} }}".split(" "), None][: self.limit] if self.limit < 99 else ["x"] * 999:
                time.sleep(self.pause)
                if self.error:
                    raise self.error
                yield Piece(f"{text} " if text else "", 0.4 if text == str(shade) else 1.0, not text)
        finally:
            self.at_once -= 1
            self.ended.append(shade)


@contextmanager
def served(reads, **how):
    """Serves the page in this process, and gives its address."""
    listening = page.listen("127.0.0.1", 0)
    page.serve(page.make_app(reads, **how), listening)
    yield page.address(listening)


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        nowhere = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", nowhere])
        yield chromium
        chromium.close()


@contextmanager
def visit(chromium, address, width=1400, scheme="light", errors=(), **how):
    """The page in a browser in which all requests to other places fail, and count, as does all that it complains of."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **how)
    context.set_default_timeout(20_000)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    said, ours = [], (address + "/", "data:", f"blob:{address}/")
    context.on("request", lambda request: said.append(request.url[:80]) if not request.url.startswith(ours) else None)
    context.on("console", lambda message: said.append(message.text))
    context.on("weberror", lambda error: said.append(str(error.error)))
    visitor = context.new_page()
    visitor.goto(address)
    visitor.locator("#file:enabled").wait_for(state="attached")  # its program has started
    yield visitor
    assert [line for line in said if not any(error in line for error in errors)] == []
    context.close()


def choose(visitor, content, name="formula.png"):
    visitor.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})


def latex(visitor):
    visitor.locator("#certainty:not(:empty)").wait_for()
    return visitor.input_value("#latex").strip()


def until(visitor, true, seconds=15):
    begun = time.monotonic()
    while not true():
        assert time.monotonic() < begun + seconds
        visitor.wait_for_timeout(20)


# ---------------------------------------------------------------------------------------------------------------------
# Without a browser
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets others in: add --password"),
        (["--host", "example.org", "--password="], "--host example.org lets others in: add --password"),
        (["--port", "65536"], "a number from 0 to 65535, not '65536'"),
    ],
)
def test_refused(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        page.parse(["outputs", *arguments], "page")
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_loopback():
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1"):
        assert page.parse(["outputs", "--host", host], "page").password is None


def test_a_port_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as ended:
        page.listen("127.0.0.1", taken.getsockname()[1])
    assert re.fullmatch(r"The page can't listen at .*: Address already in use\. Choose .*", ended.value.code)


def test_without_gradio():
    code = "import sys; sys.modules['gradio'] = None; from qwen_vl_kit.page import main; main(['demo/model'], 'page')"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1, 'The page needs Gradio: pip install ".[page]"\n')


def bomb():
    """A PNG file of a few bytes that says it is 30,000 pixels wide and high."""
    whole = bytearray(png())
    whole[16:24] = struct.pack(">II", 30_000, 30_000)
    from zlib import crc32

    whole[29:33] = struct.pack(">I", crc32(whole[12:29]))
    return bytes(whole)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"GIF, or so it says", "not an image"),
        (png(size=(300, 300))[:80], "cut off after 80 bytes"),
        (b"%PDF-1.7", "a PDF file"),
        (png(size=(900, 4)), "over 200 times as long as wide"),
        (bomb(), "too many pixels"),
        (bytes(page.LARGEST + 1), "over 20 MB"),
    ],
)
def test_what_cant_be_read(content, reason, tmp_path):
    reads = Fake(tmp_path)
    (told,) = page.news(reads, content)
    assert re.fullmatch(rf"This can't be read: .*{reason}.*\.", told["error"]) and not reads.begun


def test_opened_as_rows_are(tmp_path):
    content = io.BytesIO()
    image = Image.new("LA", (20, 10), (0, 0))  # black, and transparent: white paper
    image.putpixel((9, 5), (0, 255))
    image.save(content, "TIFF")
    (first, *_), reads = page.news(reads := Fake(tmp_path), content.getvalue()), reads
    assert first["picture"].startswith("data:image/png;base64,") and reads.begun == [255]


def test_memory_that_runs_out_is_a_sentence(tmp_path):
    reads = Fake(tmp_path)
    reads.error = RuntimeError("CUDA out of memory.")
    assert "not enough memory" in [*page.news(reads, png())][-1]["error"]
    reads.error = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError, match="ours"):
        [*page.news(reads, png())]


def test_what_is_let_in(tmp_path):
    with served(Fake(tmp_path)) as address, httpx.Client(base_url=address) as client:
        # Gradio would take files, and fetch from other servers; it would also answer with its own page.
        for path in ("/queue/", "/queue/config", "/queue/gradio_api/file=/etc/passwd", "/held_out/6", "/docs"):
            assert client.get(path).status_code == 404, path
        assert client.get("/held_out/..%2f..%2fmetrics.json").status_code in (404, 422)
        upload = client.post("/queue/gradio_api/upload", files={"files": b"123"})
        assert upload.status_code == 404
        connection = HTTPConnection(address.removeprefix("http://"))
        connection.putrequest("POST", page.JOIN)
        connection.putheader("content-length", 30 * 10**6)
        connection.endheaders()
        assert connection.getresponse().status == 413  # before it has been sent
        parts = client.post(page.JOIN, content=iter([b"{}"]))  # as long as one likes
        assert parts.status_code == 413
        # A name of another website that leads to this machine.
        assert client.get("/", headers={"host": "example.org"}).status_code == 400
        assert client.get("/held_out/0").content == png(100)
        policy = client.get("/").headers["content-security-policy"]
        assert "default-src 'none'" in policy and "http" not in policy and "unsafe" not in policy


def test_the_password(tmp_path):
    with served(Fake(tmp_path), password="gehéim", only_here=False) as address:
        for auth in (None, ("", "wrong"), ("gehéim", "")):
            answer = httpx.get(address, auth=auth)
            assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic")
        assert httpx.get(address, headers={"authorization": "Basic %"}).status_code == 401
        assert httpx.get(address + page.NEWS).status_code == 401
        basic = {"authorization": "Basic Omdlaw==", "host": "example.org"}
        assert httpx.get(address, headers=basic).status_code == 401
        right = httpx.get(address, auth=httpx.BasicAuth("anybody", "gehéim".encode()), headers={"host": "example.org"})
        assert right.status_code == 200


# ---------------------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (400, "dark")])
def test_in_a_browser(width, scheme, chromium, tmp_path):
    reads = Fake(tmp_path, pause=0.1)
    with served(reads) as address, visit(chromium, address, width, scheme) as visitor:
        assert visitor.locator("#copy").is_disabled()
        visitor.locator(".example").nth(5).click()
        assert latex(visitor) == "x _ { 105 }" and visitor.locator(".example").count() == 6
        # Pasted, as from a screenshot.
        visitor.evaluate("""async address => navigator.clipboard.write([new ClipboardItem(
            {"image/png": await (await fetch(address)).blob()})])""", f"{address}/held_out/1")  # fmt: skip
        visitor.locator("#latex").focus()
        visitor.keyboard.press("Control+V")
        until(visitor, lambda: len(reads.begun) == 2)
        # It comes token by token, and is drawn while it does.
        visitor.locator("#stop").wait_for()
        assert len({visitor.input_value("#latex") for _ in range(60) if not visitor.wait_for_timeout(10)}) > 2
        assert latex(visitor) == "x _ { 101 }"
        assert visitor.locator("#marks mark").all_inner_texts() == ["101"]
        certainty = visitor.inner_text("#certainty")
        mean = math.floor(100 * 0.4 ** (1 / 6))
        assert certainty == (
            f"The model was {mean}% sure of each token on average, least of 101 (40%). Marked: less than 70% sure."
        )
        assert visitor.locator("#image").evaluate("image => image.naturalWidth") == 60
        # KaTeX's own style is there: the copy for screen readers is out of sight, and letters are KaTeX's.
        assert visitor.locator(".katex-mathml").evaluate("math => getComputedStyle(math).position") == "absolute"
        assert visitor.evaluate("document.fonts.check('20px KaTeX_Math') && document.fonts.status") == "loaded"
        # The formula follows the text, and what is marked stays so.
        for end, text in (("Control+Home", "y + "), ("Control+End", "+ z")):
            visitor.locator("#latex").press(end)
            visitor.keyboard.type(text)
        drawn = visitor.locator("#formula .katex-html")
        until(visitor, lambda: "z" in drawn.inner_text())
        assert visitor.locator("#marks mark").all_inner_texts() == ["101"]
        visitor.locator("#latex").fill("x _ { 121 }")
        assert visitor.locator("#marks mark").count() == 0
        visitor.locator("#latex").fill(r"\frac { 1 }")
        visitor.locator("#undrawn:visible").wait_for()
        assert visitor.locator("#formula.old .katex").count() == 1
        # Copied, in three forms, also where browsers have no clipboard for a page.
        visitor.locator("#latex").fill("$$ a+b $$")
        visitor.locator("#formula:not(.old)").wait_for()
        assert "$" not in visitor.locator("#formula .katex-html").inner_text()
        for form, copied in (("bare", "a+b"), ("$ $", "$a+b$"), (r"\[ \]", r"\[a+b\]")):
            visitor.get_by_text(form, exact=True).click()
            visitor.locator("#copy").click()
            visitor.get_by_text("Copied").wait_for()
            assert visitor.evaluate("navigator.clipboard.readText()") == copied
        visitor.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject() }")
        visitor.get_by_text("bare", exact=True).click()
        visitor.locator("#copy").click()
        until(visitor, lambda: visitor.evaluate("navigator.clipboard.readText()") == "a+b")
        # A broken file is a sentence, and the next one is read.
        choose(visitor, png(size=(300, 300))[:80])
        visitor.locator("#said.bad").wait_for()
        assert re.match("This can't be read: image cut off after 80 bytes", visitor.inner_text("#said"))
        assert visitor.input_value("#latex") == "" and visitor.locator("#image").is_hidden()
        # Dropped; of a kind that browsers don't show.
        visitor.evaluate("""tiff => { const data = new DataTransfer();
            data.items.add(new File([Uint8Array.from(tiff)], "SCAN.TIF"));
            document.getElementById("drop").dispatchEvent(
                new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})) }""",
            list(png(7, format="TIFF")))  # fmt: skip
        assert latex(visitor) == "x _ { 7 }" and visitor.inner_text("#said") == ""
        assert visitor.locator("#image").is_visible()
        assert visitor.evaluate("document.documentElement.scrollWidth") <= width
        visitor.screenshot(path=tmp_path / f"page-{width}.png", full_page=True)
    assert reads.begun == reads.ended == [105, 101, 7]


@needs_browser
def test_readings_that_mean_harm(chromium, tmp_path):
    with served(Fake(tmp_path)) as address, visit(chromium, address, 400) as visitor:
        elements = visitor.locator("body *:not(#formula *, #marks *)").count()
        for text in HARM:
            visitor.locator("#latex").fill(text)
            visitor.wait_for_timeout(200)  # it is drawn after 150 ms
            assert visitor.evaluate("window.harmed") is None
            assert visitor.locator("body *:not(#formula *, #marks *)").count() == elements
            assert visitor.locator("body :is(script, iframe, a, h1 + h1, .pick), img[src=x], [onload]").count() == 0
            assert visitor.evaluate("document.documentElement.scrollWidth") <= 400


@needs_browser
def test_cut_off_and_failed(chromium, tmp_path, capfd):
    reads = Fake(tmp_path)
    reads.limit = 3
    with served(reads) as address, visit(chromium, address) as visitor:
        choose(visitor, png(3))
        assert latex(visitor) == "x _ {" and visitor.inner_text("#said") == "It was cut off at the length limit."
        visitor.locator("#undrawn:visible").wait_for()
        reads.error = ValueError("a mistake of ours")
        choose(visitor, png(4))
        visitor.get_by_text("That failed; the server's terminal says why.").wait_for()
        assert "a mistake of ours" in capfd.readouterr().err
        reads.error, reads.limit = None, 12
        choose(visitor, png(5))
        assert latex(visitor) == "x _ { 5 }"
        visitor.evaluate(f"window.blob = new Blob([new Uint8Array({page.LARGEST + 1})])")
        visitor.evaluate("""{ const data = new DataTransfer(); data.items.add(new File([blob], "large.png"));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, cancelable: true})) }""")
        assert visitor.inner_text("#said") == "This can't be read: over 20 MB." and reads.begun == [3, 4, 5]


def ask(address, shade):
    """Asks as the page's program does; returns the text that is read."""
    session = f"session-{shade}"
    data = [base64.b64encode(png(shade)).decode()]
    body = {"data": data, "fn_index": 0, "session_hash": session, "simple_format": True}
    assert httpx.post(address + page.JOIN, json=body).status_code == 200
    news = httpx.get(address + page.NEWS, params={"session_hash": session}, timeout=60).text
    told = [json.loads(line.removeprefix("data: ")) for line in news.splitlines() if line]
    parts = [one["output"]["data"][0] for one in told if one["msg"] == "process_generating"]
    return "".join(part.get("text", "") for part in parts).strip()


@needs_browser
def test_twenty_at_once(chromium, tmp_path):
    """Each gets what is theirs, those in the browser and those of another program."""
    reads = Fake(tmp_path, pause=0.01)
    with served(reads) as address, visit(chromium, address) as one, visit(chromium, address) as other:
        with ThreadPoolExecutor(18) as crowd:
            texts = [crowd.submit(ask, address, shade) for shade in range(18)]
            choose(one, png(18))
            choose(other, png(19))
        texts = [text.result() for text in texts] + [latex(one), latex(other)]
    assert texts == [f"x _ {{ {shade} }}" for shade in range(20)]
    assert sorted(reads.begun) == sorted(reads.ended) == [*range(20)] and reads.most == 1


@needs_browser
def test_who_leaves_frees_their_place(chromium, tmp_path):
    reads = Fake(tmp_path, pause=0.05)
    reads.limit = 999  # it writes for a minute
    with served(reads) as address, visit(chromium, address) as stays:
        with visit(chromium, address) as reading:
            choose(reading, png(1))
            until(reading, lambda: reads.begun == [1])
            with visit(chromium, address) as waiting:
                choose(waiting, png(2))
                waiting.get_by_text("You are next.").wait_for()
                choose(stays, png(3))
                stays.get_by_text("Waiting: 1 before you.").wait_for()
            stays.get_by_text("You are next.").wait_for()
            assert reads.begun == [1] and reads.ended == []
        until(stays, lambda: reads.begun == [1, 3] and reads.ended == [1])
        until(stays, lambda: stays.input_value("#latex").startswith("x x"))
        stays.locator("#stop").click()
        until(stays, lambda: reads.ended == [1, 3])
        assert stays.inner_text("#said") == "Stopped." and stays.input_value("#latex").startswith("x x")
        assert reads.most == 1 and reads.at_once == 0


@needs_browser
def test_a_full_queue_is_a_sentence(chromium, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "WAITING", 1)
    reads = Fake(tmp_path, pause=0.2)
    with served(reads) as address, ThreadPoolExecutor(2) as crowd, visit(chromium, address, errors=["503"]) as late:
        texts = [crowd.submit(ask, address, 1)]
        until(late, lambda: reads.begun == [1])
        texts.append(crowd.submit(ask, address, 2))
        late.wait_for_timeout(300)
        choose(late, png(3))
        late.get_by_text("Too many images are waiting. Try again in a while.").wait_for()
        assert [text.result() for text in texts] == ["x _ { 1 }", "x _ { 2 }"] and reads.begun == [1, 2]


@needs_browser
def test_with_a_password(chromium, tmp_path):
    account = {"username": "anybody", "password": "secret"}
    with (
        served(Fake(tmp_path), password="secret", only_here=False) as address,
        visit(chromium, address, http_credentials=account, errors=["401"]) as visitor,
    ):
        choose(visitor, png(9))
        assert latex(visitor) == "x _ { 9 }"


# ---------------------------------------------------------------------------------------------------------------------
# With a model
# ---------------------------------------------------------------------------------------------------------------------


def picture_of(row):
    from datasets import load_dataset

    content = io.BytesIO()
    load_dataset(str(ROOT / "demo/data"), split="train")[row]["image"].save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def reads():
    from qwen_vl_kit import reader

    how = {"model": str(ROOT / "demo/model"), "instruction": None, "max_new_tokens": 40}
    return reader.load(Namespace(**how, batch_size=None, load_in_4bit=None))


def test_reads_as_the_reader_does(reads):
    content = picture_of(0)
    (told,) = reads.read([page.opened(content)])
    picture, *pieces, end = page.news(reads, content)
    assert "".join(piece["text"] for piece in pieces) == told.text and told.text
    assert math.log(end["certainty"]) == pytest.approx(told.certainty, abs=1e-3)
    assert end["cut"] == told.cut
    # Who leaves after the first token: the model writes no further.
    threads = threading.active_count()
    left = page.news(reads, content)
    assert [*next(left), *next(left)] == ["picture", "text", "probability"] and threading.active_count() == threads + 1
    left.close()
    assert threading.active_count() == threads


@needs_browser
def test_the_command(reads, chromium, tmp_path):
    """Started, used without a network, left with nothing on the disk, and ended by Ctrl-C."""
    command = [sys.executable, "-m", "qwen_vl_kit", "page", ROOT / "demo/model", "--port=0", "--max-new-tokens=40"]
    there = {"TMPDIR": str(tmp_path), "GRADIO_TEMP_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | there, **pipes) as server:
        try:
            said = server.stdout.readline()
            address = re.fullmatch(r"The page is at (http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)\.\n", said).group(1)
            before = {file.name for file in tmp_path.rglob("*")}
            content = picture_of(1)
            with visit(chromium, address) as visitor:
                choose(visitor, content)
                (told,) = reads.read([page.opened(content)])
                assert latex(visitor) == told.text.strip() and told.text
                assert visitor.locator(".example").count() == 0
                choose(visitor, b"nothing")
                visitor.locator("#said.bad").wait_for()
            assert {file.name for file in tmp_path.rglob("*")} == before
        finally:
            server.send_signal(signal.SIGINT)
        rest, errors = server.communicate(timeout=20)
    assert server.returncode == -signal.SIGINT and rest == ""
    assert "Traceback" not in errors and len(errors.splitlines()) <= 2, errors
