"""The report: what is in it, that nothing in it can break out, and that it works in a browser."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.report import main
from ssl_vit.core.reading import read_metrics
from ssl_vit.models.attention_maps import attention_maps
from ssl_vit.runs.record import read_run
from ssl_vit.runs.trained import open_trained
from ssl_vit.visualize import report
from ssl_vit.visualize.inputs import open_shown_images
from ssl_vit.visualize.panel import choose_layers, panel_data
from ssl_vit.visualize.patches import patch_similarity
from ssl_vit.visualize.report import MOST_BYTES, json_for_script, write_report
from ssl_vit.visualize.verdict import assess

BROWSER = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)


@pytest.fixture(scope="module")
def page(mae_run: Path, dino_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert write_report([mae_run, dino_run], out, num_images=2, asked=True) == []
    return out


def embedded(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def test_it_holds_curves_images_scores_and_settings_of_both_runs(page: Path) -> None:
    text, data = page.read_text(), embedded(page)
    assert page.stat().st_size < MOST_BYTES
    assert [run["name"] for run in data["runs"]] == ["mae", "dino"]
    assert [[frame["step"] for frame in frames] for frames in data["frames"]] == [[0, 2, 4, 6]] * 2
    curves = [curve["name"] for curve in data["curves"]]
    assert curves[0] == "loss"
    assert {"lr", "rankme", "images_per_second", "data_wait"} <= set(curves)
    assert "memory_mib" in curves or "Memory" in text  # it may not change in so few steps
    assert [step for step, _ in data["runs"][0]["points"]["loss"]] == [1, 2, 3, 4, 5, 6]
    assert data["runs"][0]["clock"][-1][1] > 0
    assert "Settings that differ" in text
    assert "objective.mask_ratio" in text
    assert text.count("trained") >= 6
    assert "base_lr: 0.032" in text


def test_it_names_nothing_that_would_be_fetched(page: Path) -> None:
    text = re.sub(r'"data:[^"]*"', "", page.read_text())
    assert not re.findall(r"""(?:src|href)=["']?(?!#|data:)[^"'\s>{$]""", text)
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert "@import" not in text


def test_text_of_others_is_escaped(mae_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(mae_run, run, ignore=shutil.ignore_patterns("checkpoints"))
    config = run / "config.yaml"
    config.write_text(config.read_text() + "\nnote: </script><script>alert(2)</script><!--\n")
    out = tmp_path / "report.html"
    assert write_report([run], out) == [f"no panel: {run}: has no complete checkpoint yet"]
    text = out.read_text()
    assert "<img src=x" not in text
    assert "<script>alert" not in text
    assert "&lt;/script&gt;&lt;script&gt;alert(2)" in text
    assert embedded(out)["runs"][0]["name"] == run.name
    assert json_for_script({"a": "</script><!--&\u2028"}) == '{"a":"\\u003c/script\\u003e\\u003c!--\\u0026\\u2028"}'
    assert json.loads(json_for_script({"a": "</script>"})) == {"a": "</script>"}


def test_the_panel_holds_the_attention_and_the_similarity_of_the_model(mae_run: Path) -> None:
    trained = open_trained(mae_run)
    shown = open_shown_images(trained, [], number=2, seed=0, asked=True)
    data = panel_data(trained, shown)
    assert (data["grid"], data["layers"], data["heads"], data["has_cls"]) == ([4, 4], [0, 1], 2, True)

    def unpack(text: str, *shape: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).reshape(shape).float() / 255

    for place in range(2):
        maps = unpack(data["images"][place]["attention"], 2, 2, 17, 16)
        for layer, patch in ((0, None), (1, 5)):
            direct = attention_maps(trained.encoder, shown.images, layer=layer, patch=patch)[place].flatten(1)
            found = maps[layer, :, 0 if patch is None else patch + 1]
            torch.testing.assert_close(found, direct / direct.max(), rtol=0, atol=0.003)
        similarity = unpack(data["images"][place]["similarity"], 16, 16)
        with torch.inference_mode():
            tokens = trained.encoder(shown.images).patches
        direct = patch_similarity(tokens, 3)[place].clamp_min(0)
        torch.testing.assert_close(similarity[3], direct, rtol=0, atol=0.003)
        assert {"masked", "tokens", "filled"} <= set(data["images"][place])
    assert data["steps"]["num_kept"] == 4


@pytest.mark.parametrize(("most", "number"), [(2.5, 2), (0.5, 0)])
def test_figures_that_do_not_fit_are_named(
    mae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: float, number: int
) -> None:
    largest = max(path.stat().st_size for path in (mae_run / "pictures").glob("step-*.webp"))
    monkeypatch.setattr(report, "_FIGURES_BYTES", int(most * largest))
    said = f"{number} of its 4 figures over time are shown, the others do not fit"
    out = tmp_path / "report.html"
    assert write_report([mae_run], out, num_images=0) == [f"mae: {said}"]
    assert f"{said}." in out.read_text()
    assert len(embedded(out)["frames"][0]) == number
    assert ("makes of a few images at its end" in out.read_text()) is (number == 0)


def test_fewer_images_than_none_are_refused(mae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(mae_run), "--panel_images", "-1", "--out", str(tmp_path / "report.html")]) == 2
    assert "error: --panel_images -1: give a number of images; 0 leaves" in capsys.readouterr().err


def test_what_does_not_fit_into_the_panel_is_left_out_evenly() -> None:
    assert choose_layers(12, 3, 10, 1000) == (list(range(12)), True)
    assert choose_layers(12, 3, 10, 120) == ([2, 5, 8, 11], True)
    assert choose_layers(12, 3, 10, 30) == ([11], True)
    layers, single = choose_layers(12, 3, 10, 20)
    assert (layers, single) == ([5, 11], False)
    assert choose_layers(12, 3, 10, 10) == ([11], False)
    assert choose_layers(12, 3, 10, 5) == ([], False)


def test_the_panel_keeps_to_its_size(mae_run: Path) -> None:
    trained = open_trained(mae_run)
    shown = open_shown_images(trained, [], number=2, seed=0, asked=True)
    whole = panel_data(trained, shown)
    assert whole["layers"] == [0, 1]
    found = []
    for most in range(len(json.dumps(whole)), 0, -500):
        try:
            data = panel_data(trained, shown, most_bytes=most)
        except ValueError as error:
            assert str(error).endswith("MB are left for it in the page")  # noqa: PT017
            break
        assert len(json.dumps(data)) <= most
        found.append((len(data["layers"]), data["heads"]))
    # First a block goes, then heads are averaged, then there is no attention, then nothing fits.
    assert found[0][0] in (1, 2)
    assert found[-1] == (0, 0)
    assert (1, 0) in found or (2, 0) in found


def test_panels_that_do_not_fit_are_left_out_and_the_page_says_so(
    mae_run: Path, dino_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.html"
    write_report([mae_run, dino_run], out, num_images=0)
    size = out.stat().st_size
    monkeypatch.setattr(report, "MOST_BYTES", size + report._FRAME_BYTES + 1000)
    notes = write_report([mae_run, dino_run], out, asked=True)
    assert [note.split(": ")[1] for note in notes] == [str(mae_run), str(dino_run)]
    assert out.stat().st_size < report.MOST_BYTES
    assert embedded(out)["panels"] == [None, None]
    text = out.read_text()
    assert text.count("MB are left for it in the page") == 2
    assert "Nothing to look inside of mae" in text
    assert 'id="panel-run"' not in text
    # With room for fewer figures than were asked for, there are fewer.
    monkeypatch.setattr(report, "MOST_BYTES", size + report._FRAME_BYTES + 40_000)
    assert write_report([mae_run, dino_run], out, asked=True) == []
    assert out.stat().st_size < report.MOST_BYTES
    numbers = [len(panel["images"]) for panel in embedded(out)["panels"]]
    assert 0 < numbers[0] < 3
    assert numbers[1] > 0


def test_a_run_that_has_hardly_begun_is_reported(mae_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "new"
    run.mkdir()
    shutil.copy(mae_run / "config.yaml", run)
    out = tmp_path / "out" / "report.html"
    notes = write_report([run], out)
    assert len(notes) == 1
    assert "too early to say" in out.read_text()
    assert "Nothing to look inside of new" in out.read_text()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "grad_norm": null}\n{"step": 2, "lo')
    assert read_metrics(run / "metrics.jsonl") == [{"step": 1, "loss": 2.0, "grad_norm": None}]
    assert read_run(run).curves() == {"loss": [(1, 2.0)]}
    write_report([run], out)
    lines = [
        {"step": step, "loss": 3.0 - step, "teacher_temp": 0.04 + 1e-8 * step, "data_wait": 0.125} for step in (1, 2)
    ]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    write_report([run], out)
    assert [curve["name"] for curve in embedded(out)["curves"]] == ["loss"]
    assert "The same all along: Teacher temperature 0.04; Waiting for data 12.5 %." in out.read_text()


def test_the_script_names_its_file_and_refuses_what_is_no_run(
    mae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(mae_run), "--out", str(tmp_path / "r.html"), "--panel_images", "0"]) == 0
    told = capsys.readouterr().out
    assert str(tmp_path / "r.html") in told
    verdict = assess(read_run(mae_run))
    assert f"{mae_run.name}: {verdict.word}. {verdict.reasons[0]}" in told
    assert 'id="panel"' not in (tmp_path / "r.html").read_text()
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.fixture
def browser_page(page: Path) -> Iterator[tuple[Any, list[str]]]:
    """The report in a browser, and what went wrong or was fetched there."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        opened, wrong = browser.new_page(viewport={"width": 1000, "height": 900}), []
        opened.on("console", lambda message: wrong.append(message.text))
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on(
            "request",
            lambda request: None if request.url.startswith(("data:", "file:")) else wrong.append(request.url),
        )
        opened.goto(page.as_uri())
        yield opened, wrong
        browser.close()


def test_it_works_in_a_browser(browser_page: tuple[Any, list[str]]) -> None:
    page, wrong = browser_page
    assert page.locator(".chart svg").count() == len(page.evaluate(
        "JSON.parse(document.getElementById('data').textContent).curves"))  # fmt: skip

    # A curve is read by pointing at it, and by keys; the axis can be changed.
    chart = page.locator('.chart[data-curve="loss"]')
    chart.locator("svg").hover()
    assert "step" in chart.locator("output").inner_text()
    page.get_by_role("radio", name="images", exact=True).check()
    chart.locator("svg").focus()
    page.keyboard.press("Home")
    assert chart.locator("output").inner_text().startswith("images 8 ·")

    # The slider goes through the figures.
    film = page.locator(".film").first
    last = film.locator("img").get_attribute("src")
    slider = film.locator("input")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert film.locator("output").inner_text() == "4"
    assert film.locator("img").get_attribute("src") != last
    assert film.locator("img").get_attribute("alt") == "What mae makes of a few images at step 4"
    assert film.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 300

    # A patch is chosen by pointing at it, and by keys.
    source, told = page.locator("#panel-source"), page.locator("#panel-told")
    source.scroll_into_view_if_needed()
    box = source.bounding_box()
    source.hover(position={"x": box["width"] * 0.1, "y": box["height"] * 0.3})
    assert told.inner_text().startswith("The patch in row 2, column 1 looks most at")
    before = page.evaluate("document.getElementById('panel-target').toDataURL()")
    source.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert told.inner_text().startswith("The patch in row 3, column 2 looks")
    assert page.evaluate("document.getElementById('panel-target').toDataURL()") != before
    page.locator("#panel-map").select_option("similarity")
    assert "is most like the one in" in told.inner_text()

    # MAE, step by step.
    for name in ("Mask", "Encode", "Decode"):
        page.get_by_role("button", name="Next").click()
        assert page.locator("#mae-text").inner_text().startswith(name)
    assert page.get_by_role("button", name="Next").is_disabled()
    assert wrong == []


def test_the_run_to_look_inside_is_chosen(browser_page: tuple[Any, list[str]]) -> None:
    page, wrong = browser_page
    told, target = page.locator("#panel-told"), "document.getElementById('panel-target').toDataURL()"
    chosen = page.locator("#panel-run")
    assert chosen.locator("option").all_inner_texts() == ["mae", "dino"]
    assert page.locator("#mae").is_visible()
    page.locator("#panel-head").select_option(index=2)
    before, size = page.evaluate(target), page.locator("#panel-image option").count()
    chosen.focus()
    page.keyboard.press("ArrowDown")
    assert chosen.input_value() == "1"
    assert page.locator("#mae").is_hidden()
    page.wait_for_function(f"{target} !== {json.dumps(before)}")
    assert page.locator("#panel-image option").count() == size
    assert page.locator("#panel-head").input_value() == "1"
    assert told.inner_text().endswith(", head 2).")
    page.locator("#panel-map").select_option("cls")
    assert told.inner_text().startswith("The class token looks most at")
    chosen.select_option("0")
    assert page.locator("#mae").is_visible()
    assert page.locator("#panel-map").input_value() == "cls"
    assert wrong == []


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out(browser_page: tuple[Any, list[str]], width: int) -> None:
    page, wrong = browser_page
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert wrong == []


def test_every_control_has_a_name(browser_page: tuple[Any, list[str]]) -> None:
    page, _ = browser_page
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, select, input, canvas[tabindex], svg[tabindex], img")].filter(item =>
          !(item.getAttribute("aria-label") || item.closest("label") || item.textContent.trim() || item.alt))
          .map(item => item.outerHTML.slice(0, 100))"""
    )
    assert nameless == []
