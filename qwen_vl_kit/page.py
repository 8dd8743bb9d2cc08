"""A page in the browser: an image is pasted, its LaTeX is written token by token, and the formula is drawn beside it.

    python -m qwen_vl_kit page outputs
    python -m qwen_vl_kit page outputs --host 0.0.0.0 --password SECRET

It wraps no step. Gradio brings the queue, which tells everybody how many are before them, and KaTeX with its fonts,
which draws formulas as papers do; MathML is at the mercy of the fonts of the browser's machine. The page itself,
`templates/page.*`, is ours, as Gradio's own writes uploads to the disk. Here an image arrives in the request, stays in
memory, and is gone when it has been read. One model, one lock, one image at a time: whoever's turn it is sees tokens as
fast as the model writes them.
"""

import argparse
import base64
import io
import ipaddress
import math
import secrets
import socket
import sys
import threading
from collections.abc import Iterator

from qwen_vl_kit.arguments import Parser, add_model
from qwen_vl_kit.sentences import first_line

LARGEST = 20_000_000  # bytes of an image file
WAITING = 100  # images in the queue at most: they are in memory
EXAMPLES = 6  # held-out images to click on
# A token is marked if the model gave it less: 26 of the demo's 32 wrong readings have such a token, 14 of 68 right.
DOUBT = 0.7
# Nothing is asked of any other place, and nothing in a reading runs, whatever it is.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self' data:; connect-src 'self'; "
POLICY += "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}
# All that the page asks for. Gradio answers far more, uploads to the disk and requests to other servers among it.
JOIN, NEWS, ASSETS = "/queue/gradio_api/queue/join", "/queue/gradio_api/queue/data", "/queue/assets/"
OURS = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}


def parse(arguments, prog):
    parser = Parser(prog, "Opens a page that reads images of formulas.", usage="%(prog)s MODEL [--OPTION VALUE ...]")
    add_model(parser, batches=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    parser.add_argument("--port", type=port, default=7860, help="port to listen at, 0 for any (default: %(default)s)")
    parser.add_argument("--password", help="what the page asks for, with any user name; needed with --host")
    wanted = parser.parse_args(arguments)
    if not wanted.password and not is_loopback(wanted.host):
        parser.error(f"--host {wanted.host} lets others in: add --password")
    return wanted


def port(text):
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a number from 0 to 65535, not {text!r}")
    return int(text)


def is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(arguments, prog):
    wanted = parse(arguments, prog)
    from qwen_vl_kit import environment

    environment.prepare()  # from here on, Ctrl-C ends it at once, as there is nothing to save
    try:
        import gradio  # noqa: F401
    except ImportError:
        sys.exit('The page needs Gradio: pip install ".[page]"')
    listening = listen(wanted.host, wanted.port)  # before the model is loaded, which takes longer
    from qwen_vl_kit import reader

    reads = reader.load(wanted)
    serving = serve(make_app(reads, wanted.password, is_loopback(wanted.host)), listening)
    print(f"The page is at {address(listening)} (Ctrl-C ends it).", flush=True)
    serving.join()


def listen(host, port):
    """A socket that listens there; ends the program with a sentence if it can't."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:  # in use, not ours to use, no such host
        why = first_line(error.strerror or error).partition(" (")[0]
        sys.exit(f"The page can't listen at {host}, port {port}: {why}. Choose another --port or --host.")


def address(listening):
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app, listening):
    """Serves `app` in a thread of its own, which it returns."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    return thread


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def opened(content):
    """The image in the bytes of a file, as the rows of training are opened. Raises Unusable, with the reason."""
    from qwen_vl_kit.pictures import Unusable, open_image, why

    if len(content) > LARGEST:
        raise Unusable(f"over {LARGEST / 1e6:.0f} MB")
    if content.startswith(b"%PDF-"):
        raise Unusable("a PDF file; paste a picture of one formula in it")
    try:
        picture = open_image(content)
    except (Unusable, MemoryError):
        raise
    except Exception as error:  # on a broken file Pillow's decoders raise anything
        raise why(error, content) from error
    if picture.getcolors(1):
        raise Unusable("image of one color: there is nothing to read")
    return picture


def shown(picture):
    """An image as a data URI, no larger than the page needs: what the model is given, also where it is a TIFF file."""
    picture = picture.copy()
    picture.thumbnail((1200, 800))
    png = io.BytesIO()
    picture.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def news(reads, content):
    """Reads the image in the bytes of a file. Yields what the page is told of it, one dict after another:

    {"picture"} as a data URI, then {"text", "probability"} of each token, then {"cut", "certainty"}, the geometric mean
    of those; or {"error"}, a sentence.
    """
    from qwen_vl_kit.memory import is_shortage
    from qwen_vl_kit.pictures import Unusable

    try:
        picture = opened(content)
        yield {"picture": shown(picture)}
        logs, piece = [], None
        for piece in reads.stream(picture):
            logs.append(math.log(max(piece.probability, 1e-30)))
            yield {"text": piece.text, "probability": piece.probability}
        yield {"cut": not (piece and piece.ends), "certainty": math.exp(sum(logs) / max(len(logs), 1))}
    except Unusable as reason:
        yield {"error": f"This can't be read: {reason}."}
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or is_shortage(error)):
            raise
        yield {"error": "This can't be read: there is not enough memory for it. Try a smaller image."}


# ---------------------------------------------------------------------------------------------------------------------
# Serving
# ---------------------------------------------------------------------------------------------------------------------


def make_app(reads, password=None, only_here=True):
    """The page as a FastAPI application, for this `Reader`, or whatever streams as it does."""
    import gradio
    from fastapi import FastAPI
    from fastapi.responses import FileResponse, Response
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    reading = threading.Lock()  # the queue lets the next one in while who has left is still being shown out

    def read(image: str) -> Iterator[dict]:
        with reading:
            yield from news(reads, base64.b64decode(image))

    with gradio.Blocks(analytics_enabled=False) as queue:
        gradio.api(read, concurrency_limit=1)
    queue.queue(max_size=WAITING, status_update_rate=1)  # s; else who waits hears only of those who are done
    app = FastAPI(openapi_url=None)
    examples = held_out(reads.source.run)
    texts = page(reads, len(examples))

    @app.get("/{name}")
    def text(name: str):
        return Response(texts[f"/{name}"], media_type=OURS[f"/{name}"])

    @app.get("/")
    def start():
        return text("")

    @app.get("/held_out/{number}")
    def example(number: int):
        return FileResponse(examples[number]) if number < len(examples) else Response(status_code=404)

    gradio.mount_gradio_app(app, queue, "/queue", run_history=False, ssr_mode=False, show_error=False)
    app.add_middleware(Gate, password=password)
    if only_here:  # else any website could have its own name lead here, and read what is shown
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])
    return app


def held_out(run):
    """The files of the first held-out images of a run, if there are any."""
    files = [file for file in (run / "held_out").glob("*.png") if file.stem.isdecimal()] if run else []
    return sorted(files, key=lambda file: int(file.stem))[:EXAMPLES]


def page(reads, examples):
    """{path: its text} of the page, its style and its program."""
    from importlib.resources import files

    import gradio
    from jinja2 import Environment

    # Gradio 6.31 serves KaTeX for its own page: under names, and in a class, that change with every version.
    assets = files(gradio) / "templates" / "frontend" / "assets"
    katex = {file.suffix: ASSETS + file.name for file in assets.glob("katex-*") if file.suffix in (".js", ".css")}
    if len(katex) < 2:
        sys.exit(f'Gradio {gradio.__version__} has no KaTeX where 6.31 has it: pip install ".[page]"')
    scope = f"gradio-container-{gradio.__version__.replace('.', '-')}"
    filled = {"model": reads.source.name, "katex": katex, "scope": scope, "examples": examples}
    filled |= {"largest": LARGEST, "doubt": DOUBT, "join": JOIN, "news": NEWS}
    templates = {path: files(__package__) / "templates" / (path[1:] or "page.html.j2") for path in OURS}
    texts = {path: template.read_text(encoding="utf-8") for path, template in templates.items()}
    return texts | {"/": Environment(autoescape=True).from_string(texts["/"]).render(filled)}


class Gate:
    """Lets in what the page asks for, no larger than an image, from who knows the password; all else is refused."""

    def __init__(self, app, password):
        self.app, self.password = app, password

    async def __call__(self, scope, receive, send):
        from starlette.datastructures import MutableHeaders
        from starlette.requests import Request

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":

            async def send_with_headers(message):
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message).update(HEADERS)
                await send(message)

            answer = self.refusal(Request(scope)) or self.app
            await answer(scope, receive, send_with_headers)

    def refusal(self, request):
        """What is answered to a request that is not let in, or None."""
        from fastapi.responses import PlainTextResponse

        if self.password and not self.knows_password(request):
            ask = {"WWW-Authenticate": 'Basic realm="password, with any user name", charset="UTF-8"'}
            return PlainTextResponse("The password is needed, with any user name.", 401, ask)
        path, method = request.url.path, request.method
        if method == "POST" and path == JOIN:
            # Base64 makes four bytes of three; the rest is room for what is around it.
            length = request.headers.get("content-length", "")
            if not length.isdecimal() or int(length) > LARGEST * 4 / 3 + 1000:
                return PlainTextResponse(f"over {LARGEST / 1e6:.0f} MB", 413)
        elif method != "GET" or not (path in OURS or path == NEWS or path.startswith(("/held_out/", ASSETS))):
            return PlainTextResponse("There is no such page.", 404)
        return None

    def knows_password(self, request):
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        try:
            password = base64.b64decode(given).partition(b":")[2]
        except ValueError:
            return False
        return kind.lower() == "basic" and secrets.compare_digest(password, self.password.encode())
