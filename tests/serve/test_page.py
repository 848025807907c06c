"""The page at `/`, in a real browser."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from braidsdk.testing import FakeBraid

RULES = "You answer questions from the documents."
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

NAMED = """
const texts = node => [...node.childNodes].filter(each => each.nodeType === 3).map(each => each.data).join("").trim();
return [...document.querySelectorAll("button, input, select, textarea")].find(each => each.checkVisibility() &&
  (each.ariaLabel ?? texts(each.labels?.[0] ?? each)) === arguments[0]);
"""
"""What is most likely the control of that name: to ask the browser for each one's takes long."""


class Page:
    """The page in a browser, as a person sees it."""

    def __init__(self, driver: Any, url: str, until: Callable[..., None]) -> None:
        self.driver, self.url, self.until = driver, url, until

    def open(self) -> None:
        self.driver.get(f"{self.url}/")
        self.until(lambda: self.text("#model") != "…" or self.shown("#key"))
        self.until(lambda: self.shown("#key") or self.all("#rows tr") or self.shown("#none"))

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def named(self, name: str) -> Any:
        """The control that a screen reader calls so."""
        found = self.driver.execute_script(NAMED, name)
        assert found, f"{name!r} is not shown"
        assert found.accessible_name == name
        return found

    def text(self, selector: str) -> str:
        return str(self.driver.execute_script("return document.querySelector(arguments[0])?.textContent", selector))

    def shown(self, selector: str) -> bool:
        return bool(self.one(selector).is_displayed())

    def names(self, where: str = "#rows") -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(each => each.textContent)"
        return list(self.driver.execute_script(script, f"{where} bdi"))

    def write(self, name: str, text: str) -> None:
        field = self.named(name)
        field.clear()
        field.send_keys(text)

    def press(self, *keys: str) -> None:
        """Keys, for what has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def tab_to(self, name: str) -> None:
        """Reach a control with the tab key alone."""
        seen = []
        for _ in range(60):
            self.press("\ue004")
            seen.append(self.driver.switch_to.active_element.accessible_name)
            if seen[-1] == name:
                return
        raise AssertionError(f"{name!r} is not among {seen}")

    def ask(self, question: str) -> None:
        """Ask, and wait for the answer's summary."""
        before = len(self.all("#log .times"))
        self.write("Question", f"{question}\n")
        self.until(lambda: len(self.all("#log .times")) == before + 1)

    def problems(self) -> list[str]:
        """What the browser's console complains about."""
        return [each["message"] for each in self.driver.get_log("browser")]

    def asked_hosts(self) -> set[str]:
        """All schemes and hosts that requests went to."""
        events = [json.loads(each["message"])["message"] for each in self.driver.get_log("performance")]
        urls = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
        return {match[0] for url in urls if (match := re.match(r"\w+:(//[^/]+)?", url))}


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra `dev`")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for each in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000"):
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


@pytest.fixture
def browse(driver: Any, until: Callable[..., None], serve: object) -> Iterator[Callable[[Any], Page]]:
    """Open a server's page. At the end the console must be empty, but for statuses that the API answered with. It asks
    for `serve`, whose servers then run until the page is left."""
    opened: list[Page] = []

    def start(served: Any) -> Page:
        page = Page(driver, served.url, until)
        page.problems()
        page.asked_hosts()
        page.open()
        opened.append(page)
        return page

    yield start
    for page in opened:
        assert page.asked_hosts() <= {page.url, "data:"}
        assert [each for each in page.problems() if "the server responded with a status of 4" not in each] == []
        driver.get("about:blank")


@pytest.fixture
def page(browse: Callable[..., Page], served: Any) -> Page:
    """The page of a server with a system prompt and two documents."""
    return browse(served)


def test_a_text_is_registered_picked_and_asked_about(page: Page, served: Any) -> None:
    assert page.names() == ["rules", "aistonia", "belmora"]
    page.write("Text", "The capital of Thessily is Troick.")
    page.write("Name", "thessily")
    page.write("Anchor", "rules")
    page.named("Register").click()
    page.until(lambda: page.names() == ["rules", "aistonia", "belmora", "thessily"])
    assert served.braid.chunks.get("thessily").text == "The capital of Thessily is Troick."
    for name in ("rules", "thessily", "aistonia"):
        page.named(f"Pick {name}").click()
    page.until(lambda: "are cached" in page.text("#cached"))
    places = [each.text for each in page.all("#picked .muted")]
    assert [place.split(",")[0] for place in places] == ["in memory", "in memory", "nowhere"]
    assert re.fullmatch(r"in memory, \d+ kB", places[0])
    page.named("Show which documents the answer came from").click()
    page.ask("What is it?")
    assert (
        page.text("#log .answer")
        == "What is it? | The capital of Thessily is Troick. | The capital of Aistonia is Flubarg."
    )
    bar = page.one("#log .bar").accessible_name
    found = {kind: int(tokens) for kind, tokens in re.findall(r"(\w+) (\d+) \(", bar)}
    assert list(found) == ["exact", "composed", "repaired", "computed"]
    assert int(re.findall(r"Of (\d+) prompt tokens", bar)[0]) == sum(found.values())
    assert found["exact"] >= len(RULES)
    assert found["computed"] > len("The capital of Aistonia is Flubarg.")
    assert {each.text for each in page.all("#log .sources bdi")} == {"thessily", "aistonia"}
    page.until(lambda: "nowhere" not in page.text("#picked"))
    page.ask("And now?")
    assert "And now?" in page.all("#log .answer")[1].text
    cached = page.one("#plot-cached svg").accessible_name
    assert re.match(r"Cached share of the prompt, the last 2: \d+ %, \d+ %", cached)
    assert len(page.all("#plot-first rect")) == 2


def test_a_conversation_goes_on_and_begins_anew(page: Page) -> None:
    page.ask("One?")
    page.ask("Two?")
    first, second = (int(re.findall(r"Of (\d+) prompt", each.accessible_name)[0]) for each in page.all("#log .bar"))
    assert second > first, "the past is part of the prompt"
    page.named("New conversation").click()
    assert page.all("#log article") == []
    page.ask("One?")
    assert int(re.findall(r"Of (\d+) prompt", page.one("#log .bar").accessible_name)[0]) == first


def test_an_answer_is_streamed_and_can_be_stopped(
    serve: Callable[..., Any], browse: Callable[..., Page], until: Callable[..., None]
) -> None:
    served = serve(FakeBraid(lambda *_: " ".join(map(str, range(20_000)))), default_tokens=90_000)
    page = browse(served)
    page.write("Question", "Count on.\n")
    until(lambda: "7 8 9" in page.text("#log .answer"))
    assert "9999" not in page.text("#log .answer"), "it was shown before it was complete"
    page.named("Stop").click()
    until(lambda: page.text("#log .state").startswith("Stopped."))
    until(lambda: not served.braid.stats().running)
    assert "9999" not in page.text("#log .answer")
    assert not page.shown("#stop")
    assert not page.shown("#error")
    assert "braid_generation_tokens_total 0.0" in served.http.get("/metrics").text
    assert page.driver.switch_to.active_element.accessible_name == "Question"


ATTACKS = (
    "<img src=x onerror=alert(1)>",
    "</td><script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "javascript:alert(1)",
)


def test_a_registered_text_never_runs(page: Page, served: Any) -> None:
    for place, attack in enumerate(ATTACKS):
        served.braid.register(f"{place} {attack}", name=attack, metadata={attack: [attack]})
    page.open()
    assert page.names()[3:] == list(ATTACKS)
    before = page.driver.execute_script("return document.querySelectorAll('img, script, svg').length")
    page.named("Show which documents the answer came from").click()
    for place, attack in enumerate(ATTACKS):
        page.named(f"Details {attack}").click()
        page.until(lambda: len(page.all("#rows pre")) == 2 * (place + 1))  # noqa: B023 - it is called at once
        text, metadata = page.all("#rows pre")[-2:]
        assert text.text == f"{place} {attack}"
        assert json.loads(metadata.text) == {attack: [attack]}
        page.named(f"Pick {attack}").click()
    page.until(lambda: "are cached" in page.text("#cached"))
    page.ask(f"What of {ATTACKS[0]}?")
    assert all(attack in page.text("#log .answer") for attack in ATTACKS)
    assert {each.text for each in page.all("#log .sources bdi")} == set(ATTACKS)
    page.named(f"Delete {ATTACKS[0]}").click()
    assert page.one("#confirm bdi").text == ATTACKS[0]
    page.named("Keep it").click()
    page.write("Name pattern", "[")
    page.named("Filter").click()
    assert page.driver.execute_script("return document.querySelectorAll('img, script, svg').length") == before


def test_markup_can_not_be_made_of_a_text_even_by_mistake(page: Page) -> None:
    for script in ("document.body.innerHTML = '<b>x</b>'", "document.body.insertAdjacentHTML('beforeend', '<b>x</b>')"):
        failed = page.driver.execute_script(f"try {{ {script} }} catch (error) {{ return error.name }}")
        assert failed == "TypeError"
    assert len(page.problems()) == 2, "the browser says that it refused"


def test_the_page_asks_for_a_key_and_keeps_it_in_the_tab(
    serve: Callable[..., Any], browse: Callable[..., Page], until: Callable[..., None]
) -> None:
    served = serve(keys={"key-1": "default"})
    served.braid.register("A text.", name="a text")
    page = browse(served)
    stored = "return Object.entries(sessionStorage).concat(Object.entries(localStorage)).flat().concat(document.cookie)"
    assert page.shown("#key")
    assert not page.shown("main")
    assert page.driver.switch_to.active_element.accessible_name == "API key"
    assert "401 invalid_api_key" in page.text("#error")
    assert "got none" in page.text("#error")
    page.press("key-2\n")
    until(lambda: "this one is not known" in page.text("#error"))
    assert page.driver.execute_script(stored) == [""]
    page.write("API key", "key-1\n")
    until(lambda: page.names() == ["a text"])
    assert not page.shown("#error")
    page.ask("What?")
    assert page.text("#log .answer") == "What? | "
    page.open()
    assert page.names() == ["a text"], "it need not be given again"
    page.named("Forget the API key").click()
    until(lambda: page.shown("#key"))
    assert page.driver.execute_script(stored) == [""]
    assert not page.shown("main")
    assert page.names() == []


def test_the_keyboard_is_enough(page: Page, until: Callable[..., None]) -> None:
    page.tab_to("Skip to the question")
    page.tab_to("Pick rules")
    page.press(" ")
    page.tab_to("Pick belmora")
    page.press(" ")
    page.tab_to("Text")
    page.press("The capital of Thessily is Troick.")
    page.tab_to("Name")
    page.press("thessily\n")
    until(lambda: "thessily" in page.names())
    page.driver.execute_script("document.getElementById('chunks').focus()")
    page.tab_to("Pick thessily")
    page.press(" ")
    until(lambda: page.names("#picked") == ["rules", "belmora", "thessily"])
    page.tab_to("Up thessily")
    outline = page.driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is seen"
    page.press("\n")
    until(lambda: page.names("#picked") == ["rules", "thessily", "belmora"])
    assert page.driver.switch_to.active_element.accessible_name == "Up thessily", "the focus stays"
    assert page.text("#status") == "thessily is 2 of 3"
    page.tab_to("Question")
    page.press("Which?\n")
    until(lambda: page.all("#log .times"))
    want = "Which? | The capital of Thessily is Troick. | The capital of Belmora is Plonk."
    assert page.text("#log .answer") == want


def test_chunks_are_filtered_paged_pinned_and_deleted(page: Page, served: Any, until: Callable[..., None]) -> None:
    served.braid.register_many([f"Text {n}." for n in range(45)], names=[f"t{n:02}" for n in range(45)], progress=False)
    page.write("Name pattern", "t*\n")
    until(lambda: page.names()[:1] == ["t00"])
    seen = page.names()
    for first in ("t20", "t40"):
        page.named("Next page").click()
        until(lambda: page.names()[:1] == [first])  # noqa: B023 - it is called at once
        seen += page.names()
    assert seen == [f"t{n:02}" for n in range(45)]
    assert not page.named("Next page").is_enabled()
    page.named("Previous page").click()
    until(lambda: page.names()[:1] == ["t20"])
    page.named("Delete t22").click()
    page.press("\ue00c")
    pin = page.named("Pin t21")
    for wanted in (True, False, True):
        pin.click()
        until(lambda: pin.get_attribute("aria-pressed") == str(wanted).lower())  # noqa: B023 - it is called at once
        assert served.braid.chunks.get("t21").pinned == wanted
    assert served.braid.chunks.get("t22"), "escape keeps it"
    page.named("Pick t22").click()
    page.named("Delete t22").click()
    page.named("Delete").click()
    until(lambda: "t22" not in page.names())
    assert served.braid.chunks.count(name="t22") == 0
    assert page.names("#picked") == []


def test_errors_of_the_api_are_shown_as_they_come(page: Page, until: Callable[..., None]) -> None:
    page.write("Text", "Another text.")
    page.write("Name", "rules")
    page.named("Register").click()
    until(lambda: page.shown("#error"))
    assert page.text("#error span").startswith("409 name_taken: ")
    assert page.named("Text").get_property("value") == "Another text.", "what was typed stays"
    page.named("Dismiss").click()
    assert not page.shown("#error")
    page.write("Mode", "best")
    page.write("Question", "What?\n")
    until(lambda: page.shown("#error") and page.text("#log .state") == "It failed.")
    assert "best" in page.text("#error span")
    assert page.named("Question").get_property("value") == "What?"


USAGE = {"prompt_tokens": 1000, "braid": {"exact": 500, "composed": 400, "repaired": 0, "computed": 100}}


def test_a_full_prefill_is_estimated_from_the_highest_rate_of_passes_like_it(page: Page) -> None:
    script = "return summaryOf(arguments[0], {timings: arguments[1], braid: {mode: 'exact'}})[2].textContent"
    for tokens, ms, shown in (
        (0, 0.0, None),
        (400, 0.0, None),
        (10, 50.0, None),  # of so few tokens, each takes long
        (400, 200.0, "about 500 ms, at 2,000 tokens per second as when 400 were computed."),
        (600, 600.0, "about 500 ms, at 2,000 tokens per second as when 400 were computed."),
        (10, 1.0, "about 500 ms, at 2,000 tokens per second as when 400 were computed."),
        (800, 200.0, "about 250 ms, at 4,000 tokens per second as when 800 were computed."),
    ):
        timings = {"prompt_n": tokens, "prompt_ms": ms, "first_token_ms": 12.0}
        text = page.driver.execute_script(script, USAGE, timings)
        estimate = f" Estimate: a full prefill of these 1,000 tokens would take {shown}" if shown else ""
        assert text == f"exact. First token after 12 ms.{estimate}"


def test_metrics_are_read_only_while_the_page_is_seen(page: Page, until: Callable[..., None]) -> None:
    until(lambda: "KV memory in use: " in page.text("#plot-memory") and "%" in page.text("#plot-memory"))
    script = """
        Object.defineProperty(document, "visibilityState", {value: arguments[0], configurable: true});
        await poll();
        return PLOTS.memory.values.length;
    """
    assert page.driver.execute_script(f"return (async (...arguments) => {{{script}}})(arguments[0])", "hidden") == 1
    assert page.driver.execute_script(f"return (async (...arguments) => {{{script}}})(arguments[0])", "visible") == 2


CONTRAST = """
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, at) => sum + v * [.2126, .7152, .0722][at], 0);
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
const behind = node => { for (; node; node = node.parentElement) {
  const found = numbers(getComputedStyle(node).backgroundColor);
  if (found[3] !== 0) return found; } };
const ratio = (one, other) => { const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
  return (high + .05) / (low + .05); };
const poor = [];
for (const node of document.querySelectorAll("body *")) {
  if (!node.checkVisibility() || node.disabled) continue;
  const own = [...node.childNodes].some(each => each.nodeType === 3 && each.data.trim());
  const text = numbers(getComputedStyle(node).color), hint = numbers(getComputedStyle(node, "::placeholder").color);
  const weak = (own || node.value) && ratio(text, behind(node)) < 4.5;
  const weakHint = node.placeholder && ratio(hint, behind(node)) < 4.5;
  const weakBar = node.matches(".bar span") && ratio(behind(node), behind(node.parentElement)) < 3;
  if (weak || weakHint || weakBar) poor.push(node.outerHTML);
}
return poor;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(scheme: str, page: Page, until: Callable[..., None]) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.named("Pick aistonia").click()
    page.ask("What?")
    page.write("Name", "rules")
    page.write("Text", "Another text.")
    page.named("Register").click()
    until(lambda: page.shown("#error"))
    assert page.driver.execute_script(CONTRAST) == []
    controls = [each for each in page.all("button, input, select, textarea, svg") if each.is_displayed()]
    assert [each.get_attribute("outerHTML") for each in controls if not each.accessible_name] == []


def test_the_page_fits_a_phone(page: Page) -> None:
    page.driver.set_window_size(500, 900)  # Chromium's least; narrower ones are emulated
    metrics = {"width": 340, "height": 700, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.named("Pick aistonia").click()
        page.ask("What?")
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 340
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.set_window_size(1200, 1000)
