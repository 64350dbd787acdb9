"""The page "How a ViT sees": its data are what the package computes today, and it works in a browser."""

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ssl_vit.models.patches import sincos_positions
from tests.conftest import ROOT

ASSETS = ROOT / "docs" / "assets" / "how_a_vit_sees"
PAGE = ROOT / "docs" / "how_a_vit_sees.md"
BROWSER = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
SCHEMES = {"light": "", "dark": "", "slate": ' data-md-color-scheme="slate"'}


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_how_a_vit_sees", ASSETS / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # the folder is published
        patch.setattr(sys, "dont_write_bytecode", True)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    text = (ASSETS / "data.js").read_text()
    return json.loads(text.removeprefix("window.howAViTSees = ").removesuffix(";\n"))


def test_error_lines_are_those_of_today(make: ModuleType, data: dict[str, Any]) -> None:
    assert make.error_lines() == data["errors"]


def test_what_needs_no_trained_model_is_computed_alike_today(make: ModuleType, data: dict[str, Any]) -> None:
    assert make.signed(make.rotary()) == data["positions"]["rotary"]["offsets"]
    assert make.tokens_of_registers() == data["registers"]
    first = data["memory"][0]
    for name in ("fused", "plain"):  # other versions of torch may keep other tensors
        assert make.saved_memory(first["side"], fused=name == "fused") == pytest.approx(first[name], rel=0.1)


def test_the_page_quotes_its_data(make: ModuleType, data: dict[str, Any]) -> None:
    text = PAGE.read_text()
    assert make.fill(text, make.facts(data)) == text
    assert len(re.findall("data-hv=", text)) > 30
    assert 'data-hv="errors.memory"></' not in text


def test_all_of_the_page_is_small() -> None:
    files = [PAGE, *(ASSETS / name for name in ("data.js", "lesson.js", "style.css", "scene.png"))]
    assert sum(file.stat().st_size for file in files) < 1_500_000


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=SCHEMES)
def opened(request: pytest.FixtureRequest, driver: Any, tmp_path: Path) -> Iterator[tuple[Any, list[str]]]:
    """The page in a browser, and what went wrong or was fetched there."""
    markdown = pytest.importorskip("markdown")
    body = markdown.markdown(PAGE.read_text(), extensions=["attr_list", "fenced_code", "md_in_html", "tables"])
    (tmp_path / "assets").symlink_to(ASSETS.parent)
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    (tmp_path / "page.html").write_text(f"{head}<title>Page</title><body{SCHEMES[request.param]}>{body}</body></html>")
    scheme = "dark" if request.param == "dark" else "light"
    context = driver.new_context(viewport={"width": 1000, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(120_000)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request", lambda request: None if request.url.startswith(("data:", "file:")) else wrong.append(request.url)
    )
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector("#hv-patchify[data-ready]")
    yield page, wrong
    context.close()


def picture(page: Any, name: str) -> str:
    return page.evaluate(f"document.getElementById('hv-{name}').toDataURL()")


@pytest.mark.parametrize("opened", ["light"], indirect=True)
def test_the_page_computes_what_the_package_computes(make: ModuleType, opened: tuple[Any, list[str]]) -> None:
    page, wrong = opened
    sizes = [(length, step) for length in (64, 100, 224, 375, 500, 518) for step in (7, 14, 16, 33, 64)] + [(8, 16)]
    said = page.evaluate("sizes => sizes.map(([length, step]) => howAViTSees.refusal(length, step))", sizes)
    assert said == [make.divisible_line(length, length, step) for length, step in sizes]
    table = torch.tensor(page.evaluate("howAViTSees.sincos(64, 5)"))
    torch.testing.assert_close(table, sincos_positions(64, (5, 5), 0))
    assert wrong == []


@pytest.mark.parametrize("opened", ["light"], indirect=True)
def test_every_part_works_by_keyboard(opened: tuple[Any, list[str]]) -> None:
    page, wrong = opened
    page.locator("#hv-side").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#hv-refusal").inner_text().startswith("image_size=(225, 225): the height 225 is no multiple")
    page.get_by_role("button", name="518 / 14").press("Enter")
    assert page.locator("#hv-fact-tokens").inner_text() == "1,369 patches + 1 class token"
    assert page.locator("#hv-refusal").inner_text() == ""

    before, told = picture(page, "positions"), page.locator("#hv-positions-told")
    page.locator("#hv-positions").focus()
    page.keyboard.press("Home")
    assert told.inner_text().startswith("Row 5, column 1: most like row ")
    assert picture(page, "positions") != before
    shown = []
    for kind in page.locator("#hv-table option").evaluate_all("options => options.map(option => option.value)"):
        page.locator("#hv-table").select_option(kind)
        assert page.locator("[data-hv-table]:visible").count() == 1
        shown.append(picture(page, "positions"))
    assert len(set(shown)) == len(shown) == 5

    shuffled = page.locator("#hv-shuffled")
    before = shuffled.screenshot()
    page.locator("#hv-shuffle").press("Enter")
    assert page.locator("#hv-shuffle").get_attribute("aria-pressed") == "true"
    assert shuffled.screenshot() != before

    told = page.locator("#hv-told")
    page.locator("#hv-source").focus()
    before = picture(page, "mean"), picture(page, "similar")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert told.inner_text().startswith("The patch in row 4, column 5 looks most at row ")
    assert picture(page, "mean") != before[0]
    assert picture(page, "similar") != before[1]
    page.keyboard.press("Tab")  # nothing traps the focus
    assert page.evaluate("document.activeElement.id") != "hv-source"
    before = picture(page, "mean")
    page.locator("#hv-block").focus()
    page.keyboard.press("ArrowLeft")
    assert picture(page, "mean") != before
    page.locator("#hv-look-cls").check()
    assert told.inner_text().startswith("The class token looks most at")
    before = picture(page, "registers")
    page.locator("#hv-counted").press("Space")
    assert picture(page, "registers") != before
    for name in ("picture", "model"):
        before = picture(page, "similar")
        page.locator(f"#hv-{name}").focus()
        page.keyboard.press("ArrowDown")
        page.wait_for_function(f"document.getElementById('hv-similar').toDataURL() !== {json.dumps(before)}")
    assert page.locator("#hv-heads canvas").count() == 6
    assert wrong == []


@pytest.mark.parametrize("opened", ["light"], indirect=True)
def test_a_patch_is_shown_while_pointed_at_and_kept_when_clicked(opened: tuple[Any, list[str]]) -> None:
    page, wrong = opened
    source, told = page.locator("#hv-source"), page.locator("#hv-told")
    source.scroll_into_view_if_needed()
    kept, box = told.inner_text(), source.bounding_box()
    source.hover(position={"x": box["width"] * 0.1, "y": box["height"] * 0.3})
    assert told.inner_text().startswith("The patch in row 4, column 2 looks")
    page.mouse.move(box["x"] - 10, box["y"] - 10)
    assert told.inner_text() == kept
    source.click(position={"x": box["width"] * 0.1, "y": box["height"] * 0.3})
    page.mouse.move(box["x"] - 10, box["y"] - 10)
    assert told.inner_text().startswith("The patch in row 4, column 2 looks")
    assert wrong == []


CONTRAST = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => numbers(colour).slice(0, 3).map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
  const ground = (item) => {
    for (; item; item = item.parentElement) {
      const colour = getComputedStyle(item).backgroundColor, parts = numbers(colour);
      if (parts.length < 4 || parts[3] > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll(".hv-box *, .hv-error")]
    .filter((item) => [...item.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()))
    .filter((item) => item.checkVisibility() && item.tagName !== "OPTION")
    .map((item) => {
      const [a, b] = [light(getComputedStyle(item).color), light(ground(item))].sort((x, y) => y - x);
      return [item.outerHTML.slice(0, 80), (a + 0.05) / (b + 0.05)];
    });
}"""


def test_it_fits_a_phone_and_can_be_read_in_light_and_dark(opened: tuple[Any, list[str]]) -> None:
    page, wrong = opened
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 30
    assert not [(item, ratio) for item, ratio in contrasts if ratio < 4.5]
    for width in (360, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        sticking = page.evaluate(
            """width => [...document.querySelectorAll(".hv-box, .hv-box *, .hv-error, .hv-table")]
              .filter(item => item.getBoundingClientRect().right > width + 0.5)
              .map(item => item.outerHTML.slice(0, 80))""",
            width,
        )
        assert sticking == []
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, select, input, canvas[tabindex], canvas[role], img")].filter(item =>
          !(item.getAttribute("aria-label") || item.closest("label") || item.labels?.length || item.textContent.trim()
            || item.alt)).map(item => item.outerHTML.slice(0, 100))"""
    )
    assert nameless == []
    assert wrong == []
