"""The page of the report in a browser: offline, on wide and narrow windows, with hostile names."""

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from motet.io import write_report

from .browser import Browser, browsers
from .report_helpers import MadeSlides, made_slide

pytestmark = pytest.mark.slow

HOSTILE = [
    "<script>window.hit = 1</script>.svs",
    '"><img src=x onerror="window.hit = 1">.svs',
    "' onmouseover='window.hit = 1' x='.svs",
    "</script><script>window.hit = 1</script>.svs",
    "</style></title><svg onload=window.hit=1>.svs",
    "&lt;b&gt;&amp;.svs",
    "javascript:window.hit=1",
    "--><!-- ${window.hit=1} {{7*7}}.svs",
    "محمد \u202egnp.svs \u2066x\u2069",
    "x" * 255,
    "\udcff\udcfe bytes that are no UTF-8.svs",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report of 32 slides, some failed, some empty, some with hostile names."""
    folder = tmp_path_factory.mktemp("cohort")
    store = MadeSlides(folder, 20, encoders=["a"])
    store.run = {"encoders": {"a": {"id": "A"}}, "tiling": {"mpp": 0.5, "tile_px": 224}}
    for n, key in enumerate(store):
        name = HOSTILE[n] if n < len(HOSTILE) else f"slide-{n}.svs"
        counts = {"grid": 70, "tissue": 35 + n, "patches": 35 + n, "edge": 0, "blur": 0,
                  "pen": int(n == 12), "corrupt": 0}  # fmt: skip
        store.others[key] = made_slide(
            key, encoders=["a"], name=name, counts=counts, mpp=0.25 if n % 2 else 0.5,
            reader=name if n < len(HOSTILE) else "cucim",
        )  # fmt: skip
    nothing = {"grid": 70, "tissue": 0, "patches": 0}
    store.others["slide-00019"] = made_slide(
        "slide-00019", encoders=["a"], status="empty", counts=nothing
    )
    store.failed = {
        f"bad-{n}": {"path": f"/data/{name}", "name": name, "reason": name, "message": name}
        for n, name in enumerate(HOSTILE)
    }
    store.failed["plain"] = {"name": "plain.svs", "reason": "damaged", "message": "needle in it"}
    store.not_taken = {f"/data/{name}": name for name in HOSTILE}
    return write_report(folder, store=store).as_uri()


@pytest.fixture(scope="module")
def open_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browsers(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def browser(open_browser: Any) -> Browser:
    return open_browser()


def visible(browser: Browser) -> list[str]:
    """Return the names of the slides that the page shows, in their order."""
    return browser.run(
        "return [...document.querySelectorAll('.slide')].filter(card => card.offsetHeight)"
        ".map(card => card.querySelector('h3').textContent)"
    )


def choose(browser: Browser, field: str, value: str) -> str:
    """Set a field as a user does; return the text beside the fields."""
    return browser.run(
        f"const field = document.querySelector('[name={field}]'); field.value = {value!r};"
        "field.dispatchEvent(new Event('input', {bubbles: true}));"
        "return document.querySelector('#shown').value"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1440, 900)])
def test_nothing_overflows_and_every_picture_is_there(
    browser: Browser, page: str, width: int, height: int, scheme: str
) -> None:
    browser.resize(width, height)
    browser.set_media(prefers_color_scheme=scheme)
    browser.requests()
    browser.open(page)
    lazy, broken = browser.run(
        "const pictures = [...document.images];"
        "const lazy = pictures.filter(picture => picture.loading === 'lazy').length;"
        "for (const picture of pictures) picture.loading = 'eager';"
        "return Promise.allSettled(pictures.map(picture => picture.decode())).then(() =>"
        "[lazy, pictures.filter(picture => !picture.naturalWidth).map(picture => picture.src)])"
    )
    assert (lazy, broken) == (20, [])
    beyond = browser.run(
        "return [...document.querySelectorAll('body *')].filter(element => {"
        "const box = element.getBoundingClientRect();"
        f"return box.width && (box.right > {width} + 0.5 || box.left < -0.5)"
        "}).map(element => element.outerHTML.slice(0, 200))"
    )
    assert beyond == []
    cut = browser.run(
        "return [...document.querySelectorAll('.slide *, svg text, td, p')].filter(element => {"
        "const box = element.getBoundingClientRect();"
        "const outer = element.closest('.slide, svg, table, header')?.getBoundingClientRect();"
        "return outer && (box.right > outer.right + 1 || box.left < outer.left - 1)"
        "}).map(element => element.outerHTML.slice(0, 200))"
    )
    assert cut == []
    assert browser.run("return document.documentElement.scrollWidth") == width
    shade = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (shade == "rgb(19, 21, 25)") is (scheme == "dark")
    assert browser.errors() == []
    requests = browser.requests()
    assert len(requests) > 20
    assert {address.split(":")[0] for address in requests} <= {"file", "about"}


def test_slides_are_searched_filtered_and_sorted(browser: Browser, page: str) -> None:
    browser.resize(1440, 900)
    browser.open(page)
    names = visible(browser)
    assert len(names) == 32
    assert names[:12] == [*names[:11], "plain.svs"]  # failed slides first, then the empty one
    assert names[12] == "slide-00019.svs"
    assert choose(browser, "search", "Needle  IN") == "1 of 32 slides"
    assert visible(browser) == ["plain.svs"]
    assert choose(browser, "search", "") == "32 of 32 slides"
    assert choose(browser, "state", "empty") == "1 of 32 slides"
    choose(browser, "state", "ok")
    assert choose(browser, "reader", "cucim") == "8 of 32 slides"
    choose(browser, "sort", "most")
    assert visible(browser) == [f"slide-{n}.svs" for n in range(18, 10, -1)]
    choose(browser, "sort", "finest")
    assert visible(browser)[:4] == [f"slide-{n}.svs" for n in (11, 13, 15, 17)]
    assert choose(browser, "flag", "pen") == "1 of 32 slides"
    assert visible(browser) == ["slide-12.svs"]
    address = browser.run("return location.href")
    assert address.endswith("#state=ok&flag=pen&reader=cucim&sort=finest")
    browser.open(address)  # the choices are in the address
    assert visible(browser) == ["slide-12.svs"]
    browser.run("document.querySelector('[type=reset]').click()")
    assert browser.run(
        "return new Promise(done => setTimeout(() => done(location.hash), 50))"
    ) == ""  # fmt: skip
    assert visible(browser) == names
    choose(browser, "sort", "name")
    by_number = [name for name in visible(browser) if name[:6] == "slide-"]
    assert by_number == [*(f"slide-{n}.svs" for n in range(11, 19)), "slide-00019.svs"]
    choose(browser, "state", "empty")
    browser.run("document.querySelector('[href=\"#not-taken\"]').click()")
    assert browser.run("return location.hash") == "#not-taken"
    assert len(visible(browser)) == 1  # the choice stays
    browser.open(page + "#state=nonsense&sort=nonsense&search=%3Cscript%3E")
    assert len(visible(browser)) == 4
    assert browser.errors() == []


def test_hostile_names_are_text(browser: Browser, page: str) -> None:
    browser.open(page)
    names = browser.run("return [...document.querySelectorAll('h3')].map(h => h.textContent)")
    for name in HOSTILE[:8]:
        assert names.count(name) == 2
    assert browser.run("return document.scripts.length") == 1
    assert browser.run("return window.hit") is None
    attributes = browser.run(
        "return [...new Set([...document.querySelectorAll('*')].flatMap("
        "element => element.getAttributeNames()))]"
    )
    assert not [name for name in attributes if name.startswith("on") or name == "style"]
    links = browser.run("return [...document.links].map(link => link.protocol)")
    assert {*links} == {"file:"}
    # The security policy would stop a script that came in all the same.
    browser.run(
        "document.body.append(document.createRange().createContextualFragment("
        "'<script>window.hit = 2</script><img src=x onerror=\"window.hit = 3\">'))"
    )
    assert browser.run(
        "return new Promise(done => setTimeout(() => done(window.hit ?? 'none'), 200))"
    ) == "none"  # fmt: skip
    assert any("Content Security Policy" in error for error in browser.errors())


def test_the_page_can_be_read_without_scripts(open_browser: Any, page: str) -> None:
    browser = open_browser(script=False)
    browser.resize(390, 844)
    browser.open(page)
    controls = browser.run("return getComputedStyle(document.querySelector('#controls')).display")
    assert controls == "none"
    assert len(visible(browser)) == 32


def test_the_printed_page_has_every_picture(browser: Browser, page: str) -> None:
    browser.open(page)
    printed = browser.devtools("Page.printToPDF", {"printBackground": True})["data"]
    browser.devtools("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert browser.run(
            "return getComputedStyle(document.querySelector('#controls')).display"
        ) == "none"  # fmt: skip
        assert len(visible(browser)) == 32
    finally:
        browser.devtools("Emulation.setEmulatedMedia", {"media": ""})
    # One object per distinct picture: all made slides look alike, but for the flags.
    assert base64.b64decode(printed).count(b"/Subtype /Image") >= 2
