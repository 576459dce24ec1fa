"""The page as a visitor meets it: a real browser, driven by W3C WebDriver, in front of the real application."""

import asyncio
import base64
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn

from diffusion_core import bundle, manifest
from services import web
from services.config import Target
from services.service import Service
from tests.services.conftest import settings, write_text_bundle

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1000,700"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
)
ROUTE = "/v1/images/generations"
TAB, ENTER = "\ue004", "\ue007"  # as WebDriver names these keys
SHOWN = "[...document.images].map(image => [image.naturalWidth, image.src, image.closest('li').innerText])"

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium or no chromedriver (Debian: chromium and chromium-driver)"
)


class Browser:
    """A WebDriver session with a new profile; what the driver refuses raises AssertionError in its words."""

    def __init__(self, driver: str, profile: Path):
        wanted = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self.url = f"{driver}/session"
        self.url += f"/{self.post('', capabilities={'alwaysMatch': wanted})['sessionId']}"

    def open(self, address: str) -> None:
        self.log()
        self.post("/url", url=address)

    def post(self, path: str, **body: object) -> Any:
        return self._send(urllib.request.Request(self.url + path, json.dumps(body).encode()))

    def get(self, path: str) -> Any:
        return self._send(urllib.request.Request(self.url + path))

    def find(self, selector: str) -> str:
        """The path of the first element under a CSS selector."""
        (name,) = self.post("/element", using="css selector", value=selector).values()
        return f"/element/{name}"

    def text(self, selector: str) -> str:
        """What is to be seen of an element's text."""
        return str(self.get(f"{self.find(selector)}/text"))

    def click(self, selector: str) -> None:
        self.post(f"{self.find(selector)}/click")

    def press(self, *keys: str) -> None:
        """Type into whatever has the focus."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": strokes}])

    def js(self, expression: str) -> Any:
        return self.post("/execute/sync", script=f"return {expression}", args=[])

    def wait(self, expression: str) -> Any:
        """The value of an expression once it is true, within 20 s."""
        last = time.monotonic() + 20
        while not (value := self.js(expression)):
            assert time.monotonic() < last, f"never true: {expression}\n{self.js('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def log(self) -> list[str]:
        """What the console got since the last call."""
        return [entry["message"] for entry in self.post("/se/log", type="browser")]

    def _send(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None


@contextmanager
def driving(home: Path) -> Iterator[str]:
    """The address of a running driver; when it ends, no browser of it is left."""
    environment = os.environ | {"HOME": str(home)}
    command = [str(DRIVER), "--port=0"]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        port = next(found[1] for line in process.stdout if (found := re.search(r"successfully on port (\d+)", line)))
        yield f"http://127.0.0.1:{port}"
    finally:
        living = [process, *process.children(recursive=True)]
        for one in living:
            with suppress(psutil.NoSuchProcess):  # ended with the one before it
                one.terminate()
        for one in psutil.wait_procs(living, timeout=5)[1]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.communicate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    profile = tmp_path_factory.mktemp("profile")
    with driving(profile) as driver:
        yield Browser(driver, profile)


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """The address of the application while it is up."""
    server = uvicorn.Server(uvicorn.Config(web.create(service), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as door:
        thread = threading.Thread(target=server.run, args=([door],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{door.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def put(service: Service, folder: Path) -> None:
    asyncio.run(service.load(Target(model=f"folder://{folder}")))
    assert service.refusal is None


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    service = Service(settings(folder))
    put(service, folder)
    with serving(service) as address:
        yield address


def ask(url: str, asked: object) -> Any:
    request = urllib.request.Request(url, json.dumps(asked).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


def png(source: str) -> bytes:
    head, _, data = source.partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(data)


def drawn(answer: Any) -> list[bytes]:
    return [base64.b64decode(picture["b64_json"]) for picture in answer["data"]]


def test_by_keyboard_alone_a_visitor_gets_the_pictures_of_the_api(browser: Browser, address: str) -> None:
    browser.open(address)
    browser.wait("!document.querySelector('fieldset').disabled")
    browser.press(TAB, "7", TAB, "3", TAB, "4", "2", ENTER)
    browser.wait("document.images.length === 3 && [...document.images].every(image => image.complete)")
    shown = browser.js(SHOWN)
    assert [width for width, _, _ in shown] == [32, 32, 32]
    assert [png(source) for _, source, _ in shown] == drawn(ask(address + ROUTE, {"label": 7, "n": 3, "seed": 42}))
    assert [note for _, _, note in shown] == ["seed 42", "seed 43", "seed 44"]
    assert "3 of class 7" in browser.text("[role=status]")
    assert browser.text("[role=alert]") == ""
    assert browser.log() == []
    loaded = browser.js("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [url for url in loaded if not url.startswith((address, "data:"))] == []


def test_the_command_shown_draws_the_same_pictures_again(browser: Browser, address: str) -> None:
    browser.open(address)
    browser.wait("!document.querySelector('fieldset').disabled")
    browser.click("[name=steps] option[value='4']")
    browser.click("form button")
    browser.wait("document.images.length === 5")
    curl, _, url, _, header, _, body = shlex.split(browser.text("code"))
    assert (curl, url, header) == ("curl", address + ROUTE, "content-type: application/json")
    assert json.loads(body)["steps"] == 4
    assert drawn(ask(url, json.loads(body))) == [png(source) for _, source, _ in browser.js(SHOWN)]
    browser.click("#copy")
    assert browser.js("getSelection().toString()") == browser.text("code")
    assert browser.text("[role=status]") == "Copied."


def test_everything_a_visitor_can_use_has_a_name(browser: Browser, address: str) -> None:
    """As the browser tells it to a screen reader."""
    browser.open(address)
    browser.wait("!document.querySelector('fieldset').disabled")
    controls = browser.post("/elements", using="css selector", value="form :is(input, select, button)")
    names = [browser.get(f"/element/{name}/computedlabel") for control in controls for name in control.values()]
    assert names == ["Class", "Pictures", "Seed", "Steps", "Guidance", "Draw"]


def test_a_model_that_reads_is_given_a_prompt(browser: Browser, tmp_path: Path) -> None:
    """And asks for no class where there is none."""
    folder = write_text_bundle(tmp_path / "free", ())
    service = Service(settings(folder))
    put(service, folder)
    with serving(service) as address:
        browser.open(address)
        browser.wait("!document.querySelector('fieldset').disabled")
        browser.press(TAB, *'it\'s "猫" <b>', TAB, "2", ENTER)
        browser.wait("document.images.length === 2")
        shown = [png(source) for _, source, _ in browser.js(SHOWN)]
        assert browser.text("[role=status]").startswith('2 of it\'s "猫" <b> in ')
        *_, body = shlex.split(browser.text("code"))
        asked = json.loads(body)
        assert asked["prompt"] == 'it\'s "猫" <b>' and "label" not in asked
        assert drawn(ask(address + ROUTE, asked)) == shown
        assert browser.js("[...document.forms[0].elements].filter(one => one.offsetParent).map(one => one.name)") == [
            *("", "prompt", "n", "seed", "steps", "guidance", ""),
        ]


def test_a_refusal_is_shown_in_the_servers_words(browser: Browser, folder: Path, tmp_path: Path) -> None:
    """The page was opened before a model came into service that was not made for four steps."""
    made = bundle.load(folder)
    bundle.save(replace(made, sampling=replace(made.sampling, allowed_steps=(1, 2))), tmp_path / "digits")
    manifest.seal(tmp_path / "digits", "bundle", {"kind": "test"})
    service = Service(settings(folder))
    put(service, folder)
    with serving(service) as address:
        browser.open(address)
        browser.wait("!document.querySelector('fieldset').disabled")
        browser.click("[name=steps] option[value='4']")
        put(service, tmp_path / "digits")
        browser.click("form button")
        browser.wait("document.querySelector('[role=alert]').textContent")
        assert browser.text("[role=alert]") == ask(address + ROUTE, {"label": 0, "steps": 4})["error"]["message"]
        assert "[1, 2]" in browser.text("[role=alert]")
        assert browser.text("[role=status]") == ""
        (said,) = browser.log()
        assert "400" in said


def test_the_page_waits_for_a_model_and_says_when_the_server_is_gone(browser: Browser, folder: Path) -> None:
    service = Service(settings(folder))
    with serving(service) as address:
        browser.open(address)
        browser.wait("document.querySelector('[role=alert]').textContent")
        assert browser.text("[role=alert]") == "no model has been loaded yet"
        assert browser.js("document.querySelector('form button').matches(':disabled')")
        put(service, folder)
        browser.wait("!document.querySelector('fieldset').disabled")
        assert browser.text("[role=alert]") == ""
    browser.click("form button")
    browser.wait("document.querySelector('[role=alert]').textContent")
    assert browser.text("[role=alert]") == "The server does not answer."
