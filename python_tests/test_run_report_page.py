"""The page of the report of runs in a browser: wide and narrow, hostile names, search and sort."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from motet import cli

from .browser import Browser, browsers
from .run_report_helpers import HOSTILE, made_cohort, made_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The addresses of a report of a network and a baseline, and of one of classes."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [made_run(made_cohort(), model, folder / model) for model in ("healnet", "cox")]
    classes = [made_run(made_cohort(classes=True), "logistic", folder / "<b>logistic")]
    addresses = {}
    for name, shown in (("survival", runs), ("classes", classes)):
        out = folder / f"{name}.html"
        paths = [str(run.path) for run in shown]
        assert cli.main(["report", *paths, "--out", str(out), "--draws", "100"]) == 0
        addresses[name] = out.as_uri()
    return addresses


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browsers(tmp_path_factory.mktemp("browser")) as opened:
        yield opened()


def visible(browser: Browser, column: int = 0) -> list[str]:
    """Return the texts of a column of the rows that the table of patients shows."""
    return browser.run(
        "return [...document.querySelectorAll('#table tbody tr')].filter(row => row.offsetHeight)"
        f".map(row => row.cells[{column}].textContent)"
    )


def search(browser: Browser, text: str) -> str:
    """Type into the search field; return the text beside it."""
    return browser.run(
        f"const field = document.querySelector('[name=search]'); field.value = {text!r};"
        "field.dispatchEvent(new Event('input', {bubbles: true}));"
        "return document.querySelector('#shown').value"
    )


@pytest.mark.parametrize("name", ["survival", "classes"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_overflows_and_every_picture_is_there(
    browser: Browser, pages: dict[str, str], name: str, width: int
) -> None:
    browser.resize(width, 900)
    scheme = "dark" if width == 390 else "light"
    browser.set_media(prefers_color_scheme=scheme)
    browser.requests()
    browser.open(pages[name])
    browser.run("document.querySelector('#table td button')?.click()")
    assert browser.run("return document.documentElement.scrollWidth") == width
    beyond = browser.run(
        "return [...document.querySelectorAll('body *')].filter(element => {"
        "if (element.closest('.scroll') && !element.matches('.scroll')) return false;"
        "const box = element.getBoundingClientRect();"
        f"return box.width && (box.right > {width} + 0.5 || box.left < -0.5)"
        "}).map(element => element.outerHTML.slice(0, 200))"
    )
    assert beyond == []
    cut = browser.run(
        "return [...document.querySelectorAll('svg text, figure > *')].filter(element => {"
        "const box = element.getBoundingClientRect();"
        "const outer = element.closest('svg, figure').getBoundingClientRect();"
        "return box.right > outer.right + 1 || box.left < outer.left - 1"
        "}).map(element => element.outerHTML.slice(0, 200))"
    )
    assert cut == []
    sizes = browser.run(
        "return [...document.querySelectorAll('.plot')].map(plot => plot.getBBox())"
        ".map(box => Math.min(box.width, box.height))"
    )
    # Survival: 2 of both runs, then training, and groups, Brier and 3 calibrations of each.
    assert len(sizes) == (2 + 1 + 2 * 5 if name == "survival" else 1 + 3)
    assert min(sizes) > 50
    shade = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (shade == "rgb(19, 21, 25)") is (scheme == "dark")
    assert browser.errors() == []
    assert {address.split(":")[0] for address in browser.requests()} <= {"file", "about"}


def test_patients_are_searched_sorted_and_chosen(browser: Browser, pages: dict[str, str]) -> None:
    browser.resize(1440, 900)
    browser.open(pages["survival"])
    names = visible(browser)
    total = len(names)
    some = next(name for name in names if name.startswith("p-"))
    assert search(browser, some.upper()) == f"1 of {total} patients"
    assert visible(browser) == [some]
    high = visible(browser, 2).count("high")
    assert search(browser, "") == f"{total} of {total} patients"
    click = "document.querySelectorAll('#table th button')[{}].click()"
    browser.run(click.format(2))
    groups = visible(browser, 2)
    assert groups == sorted(groups, key=["low", "middle", "high"].index)
    assert high <= groups.count("high") < total
    browser.run(click.format(3) + ";" + click.format(3))
    risks = [float(risk) for risk in visible(browser, 3)]
    assert risks == sorted(risks, reverse=True)
    assert browser.run("return document.querySelectorAll('[aria-sort]').length") == 1
    search(browser, some)
    browser.run("document.querySelector('#table tbody tr:not([hidden]) button').click()")
    assert browser.run("return document.querySelector('#patient h3').textContent") == some
    lines = browser.run("return document.querySelectorAll('#patient path.patient').length")
    assert lines == 2  # the curve, and its mark in the legend
    # The curve is that of this patient, although the rows were sorted.
    place = names.index(some)
    first, drawn = browser.run(
        f"return [JSON.parse(document.querySelector('#curves').textContent).curves[{place}].at(-1),"
        "document.querySelector('#patient path.patient').getAttribute('d')]"
    )
    assert float(drawn.split(" ")[-1]) == pytest.approx(226 - 200 * first / 1000, abs=0.06)
    assert browser.errors() == []


@pytest.mark.parametrize("name", ["survival", "classes"])
def test_hostile_names_are_text(browser: Browser, pages: dict[str, str], name: str) -> None:
    browser.open(pages[name])
    assert {*HOSTILE[:4]} & {*visible(browser)}
    assert browser.run("return window.hit") is None
    assert browser.run("return document.images.length") == 0
    attributes = browser.run(
        "return [...new Set([...document.querySelectorAll('*')].flatMap("
        "element => element.getAttributeNames()))]"
    )
    assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert browser.run("return [...document.links].every(link => link.hash.length > 1)")
    assert browser.errors() == []


def test_the_printed_page_has_every_patient(browser: Browser, pages: dict[str, str]) -> None:
    browser.open(pages["survival"])
    browser.devtools("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        cut = browser.run(
            "const box = document.querySelector('.tall');"
            "return [box.scrollHeight - box.clientHeight,"
            "getComputedStyle(document.querySelector('#controls')).display]"
        )
        assert cut == [0, "none"]
    finally:
        browser.devtools("Emulation.setEmulatedMedia", {"media": ""})


def test_the_report_is_one_file(pages: dict[str, str]) -> None:
    for address in pages.values():
        folder = Path(address.removeprefix("file://")).parent
        assert {path.suffix for path in folder.iterdir() if path.is_file()} <= {".html"}
