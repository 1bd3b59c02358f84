"""The pages in a real browser."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser
from made_run import CLASSES, NASTY, Drawn, made_run

from segkit.commands.report import main as report
from segkit.core import config
from segkit.inference.label_errors import LabelScore, label_quality
from segkit.inference.outputs import SAFE
from segkit.report.contradictions import ContradictedImages
from segkit.report.data_page import data_page
from segkit.report.survey import Part, find_problems


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    reasons = f"model.weights: https://example.org/{'a' * 90} is not at hand; " * 3
    made_run(folder / "one", note=f"Planned. {reasons}")
    made_run(folder / f"two {NASTY.replace('/', '')}", folds=1, optim__lr="0.5")
    report([str(folder)])
    source, cfg = Drawn(20), config.Config(note=NASTY)
    parts = [Part("train", source)]
    shown = contradicted(source).section({"train": source}, SAFE, NASTY)
    page = data_page(cfg, parts, find_problems(cfg, parts), title=NASTY, contradicted=shown)
    (folder / "explore.html").write_text(page, encoding="utf-8")
    return {
        "run": folder / "one" / "report.html",
        "index": folder / "index.html",
        "explore": folder / "explore.html",
    }


def contradicted(source: Drawn) -> ContradictedImages:
    """The images of the lowest scores, by a model that is 80 % sure of its guess."""
    images = ContradictedImages(3)
    for i, name in enumerate(source.names):
        mask, guess = source.mask(i), source.guess(i)
        score, regions = label_quality(0.05 + 0.75 * (mask == guess), guess, mask)
        images.add(LabelScore("train", i, name, score, tuple(regions)), guess)
    return images


NAMES = ("run", "index", "explore")


@pytest.mark.parametrize("name", NAMES)
def test_no_requests_and_no_errors(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    browser.run("scrollTo(0, document.body.scrollHeight)")
    requests = [url for url in browser.requests if not url.startswith("data:")]
    assert requests == [pages[name].resolve().as_uri()]
    assert browser.trouble == []
    broken = "[...document.images].filter((image) => image.complete && !image.naturalWidth).length"
    assert browser.run(broken) == 0


@pytest.mark.parametrize("name", NAMES)
def test_text_of_the_data_is_escaped(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    assert browser.run("document.querySelectorAll('[onerror], img[src=x]').length") == 0
    assert NASTY in browser.run("document.body.textContent")


def test_policy_forbids_other_scripts(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    ran = """(() => {
      const script = document.createElement("script");
      script.textContent = "window.ran = true";
      document.body.append(script);
      const image = document.createElement("img");
      image.src = "https://example.org/a.png";
      document.body.append(image);
      return window.ran === true;
    })()"""
    assert browser.run(ran) is False
    assert any("Content Security Policy" in text for text in browser.trouble)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_the_window(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.open(pages[name], width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1280, 400])
def test_no_table_and_no_link_is_cut_off(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.open(pages[name], width=width)
    cut = browser.run(
        """[...document.querySelectorAll("nav, .scroll, .stack td, svg text")].filter((item) =>
             item.closest("svg") ? item.getBoundingClientRect().right > innerWidth
                                 : item.scrollWidth > item.clientWidth + 1)
           .map((item) => item.outerHTML.slice(0, 90))"""
    )
    assert cut == []


def test_long_notes_are_folded(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"], width=400)
    height = "document.querySelector('header details').getBoundingClientRect().height"
    before = browser.run(height)
    assert before < 200
    browser.run("document.querySelector('header details').open = true")
    assert browser.run(height) > before + 50
    assert browser.run("document.documentElement.scrollWidth") <= 400


def test_swatches_are_outlined_in_dark(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"], dark=True)
    color, shadow, ground = browser.run(
        """(() => {
          const swatch = document.querySelector(".classes .swatch");
          const { backgroundColor, boxShadow } = getComputedStyle(swatch);
          const ground = getComputedStyle(swatch.closest("th")).backgroundColor;
          return [backgroundColor, boxShadow, ground].map(
            (text) => text.match(/\\d+/g).slice(0, 3).map(Number));
        })()"""
    )
    assert color == [0, 0, 0]  # the background class
    assert max(ground) < 40
    assert min(shadow) > 100


def test_axes_have_titles(browser: Browser, pages: dict[str, Path]) -> None:
    for name, titles in (
        ("run", {"loss", "IoU", "learning rate", "images per second", "step"}),
        ("index", {"loss", "mean IoU", "step"}),
        ("explore", {"percent", "level"}),
    ):
        browser.open(pages[name])
        text = browser.run("[...document.querySelectorAll('svg text')].map((t) => t.textContent)")
        assert titles <= {*text}


def test_a_menu_shows_the_curves_of_a_class(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    names = "[...document.querySelector('.chart select').options].map((option) => option.value)"
    assert browser.run(names) == ["mean of the classes", *CLASSES]
    choose(browser, ".chart select", "bag")
    log = (pages["run"].parent / "log.jsonl").read_text().splitlines()
    evaluations = [e for e in map(json.loads, log) if e["event"] == "evaluate"]
    last = [next(e for e in reversed(evaluations) if e["fold"] == fold) for fold in (0, 1)]
    chart = "[...document.querySelectorAll('.chart')][1]"
    shown = browser.run(f"[...{chart}.querySelectorAll('.readout b')].map((b) => +b.textContent)")
    assert shown == [pytest.approx(e["iou"][CLASSES.index("bag")], abs=1e-4) for e in last]
    assert browser.run(f"{chart}.querySelectorAll('svg').length") == 1


def viewed(browser: Browser) -> tuple[float, float, float]:
    """Return scale and offsets of the picture in the viewer."""
    return tuple(
        browser.run(
            """(() => {
              const m = new DOMMatrix(getComputedStyle(
                document.querySelector(".viewer .ground").firstElementChild).transform);
              return [m.a, m.e, m.f];
            })()"""
        )
    )


@pytest.mark.parametrize("width", [400, 1280])
def test_pictures_zoom_and_move_in_full_size(
    browser: Browser, pages: dict[str, Path], width: int
) -> None:
    browser.open(pages["run"], width=width)
    browser.run("document.querySelector('.card .open').focus()")
    browser.press("Enter")
    box = browser.run("document.querySelector('.viewer .stage').getBoundingClientRect().toJSON()")
    assert box["width"] == pytest.approx(width, abs=1) or box["height"] > 800
    assert 0 <= box["left"] < box["right"] <= width
    assert viewed(browser) == (1, 0, 0)
    middle = (box["left"] + box["width"] / 2, box["top"] + box["height"] / 2)
    browser.send(
        "Input.dispatchMouseEvent", type="mouseWheel", x=middle[0] + 50, y=middle[1], deltaX=0,
        deltaY=-400,
    )  # fmt: skip
    scale, x, y = viewed(browser)
    assert scale == pytest.approx(np.e, rel=1e-3)
    assert x == pytest.approx(50 - 50 * np.e, abs=1)  # the point below the pointer stays
    browser.drag(middle, (middle[0] + 30, middle[1] + 20))
    assert viewed(browser) == pytest.approx((scale, x + 30, y + 20), abs=1)
    browser.run("document.querySelector('.viewer [aria-label=\"Zoom in\"]').click()")
    assert viewed(browser)[0] == pytest.approx(1.5 * scale)
    choose(browser, ".viewer select", "errors")
    opacity = "getComputedStyle(document.querySelector('.viewer .{}')).opacity"
    assert float(browser.run(opacity.format("errors"))) > 0
    assert float(browser.run(opacity.format("truth"))) == 0
    browser.run("document.querySelector('.viewer [aria-label=Close]').click()")
    count = "document.querySelectorAll('.viewer').length"
    assert browser.run(f"new Promise((done) => setTimeout(() => done({count}), 100))") == 0


def test_contradicted_images_are_the_lowest_scores(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["explore"])
    shown = browser.run("[...document.querySelectorAll('.sheet b')].map((b) => +b.textContent)")
    assert len(shown) == 3
    assert shown == sorted(shown)
    names = browser.run("[...document.querySelectorAll('.sheet img')].map((image) => image.alt)")
    assert {name.split(", ")[0] for name in names} == {"017.jpg", "018.jpg", "019.jpg"}


def test_pictures_of_the_data_open_in_full_size(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["explore"])
    browser.run("document.querySelector('.tiles img').focus()")
    browser.press("Enter")
    name = browser.run("document.querySelector('.tiles img').alt")
    assert browser.run("document.querySelector('.viewer').ariaLabel") == name
    assert browser.run("document.querySelector('.viewer img').getBoundingClientRect().width") > 700


def test_curves_have_the_points_of_the_log(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    curves = browser.run(
        """Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) => [
             chart.querySelector("figcaption").textContent,
             [...chart.querySelectorAll("path[data-points]")].map(
               (path) => path.getAttribute("d").match(/[ML]/g).length)]))"""
    )
    assert curves == {
        "Loss": [40, 40],
        "Validation IoU": [2, 2],
        "Learning rate": [40, 40],
        "Images per second": [40, 40],
    }


def test_confusions_are_shares_of_the_true_class(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    rows = browser.run(
        """[...document.querySelectorAll(".matrix tbody tr")].map(
             (row) => [...row.cells].slice(1).map((cell) => Number(cell.textContent)))"""
    )
    folds = [json.loads(path.read_text()) for path in pages["run"].parent.rglob("evaluation.json")]
    matrix = np.sum([fold["matrix"] for fold in folds], 0)
    percent = 100 * matrix / matrix.sum(1, keepdims=True)
    np.testing.assert_allclose(rows, np.where(percent < 0.5, 0, percent), atol=0.501)
    wrong = browser.run("document.querySelectorAll('.matrix .wrong').length")
    assert wrong == len(CLASSES) * (len(CLASSES) - 1)


READOUT = "document.querySelectorAll('.chart')[2].querySelector('.readout').textContent"


def test_pointer_and_keys_read_a_chart(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    box = browser.run(
        """(() => {
          const svg = document.querySelectorAll(".chart svg")[2];
          svg.scrollIntoView({ behavior: "instant", block: "center" });
          const { left, top, width, height } = svg.getBoundingClientRect();
          return { left, top, width, height };
        })()"""
    )
    assert browser.run(READOUT) == "fold 0 0.004fold 1 0.004"  # the last ones
    x, y = box["left"] + 46, box["top"] + box["height"] / 2
    browser.drag((x, y), (x, y))
    assert browser.run(READOUT).startswith("step 1fold 0 1.0e-4")
    browser.run("document.querySelectorAll('.chart svg')[2].focus()")
    browser.press("ArrowRight")
    assert browser.run(READOUT).startswith("step 2fold 0 2.0e-4")
    browser.press("End")
    assert browser.run(READOUT).startswith("step 40fold 0 0.004")


STAGE = "[...document.querySelectorAll('.card .stage')][0]"


def test_slider_compares_truth_and_prediction(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    box = browser.run(
        f"""(() => {{
          {STAGE}.scrollIntoView({{ behavior: "instant", block: "center" }});
          const {{ left, top, width, height }} = {STAGE}.getBoundingClientRect();
          return {{ left, top, width, height }};
        }})()"""
    )

    def clip(layer: str) -> str:
        return browser.run(f"getComputedStyle({STAGE}.querySelector('.{layer}')).clipPath")

    y = box["top"] + box["height"] / 2
    start = box["left"] + box["width"] / 2
    browser.drag((start, y), (box["left"] + 2, y))
    at = float(browser.run(f"{STAGE}.querySelector('input').value"))
    assert at < 5
    assert f"{at:g}%" in clip("predicted")
    browser.run(f"{STAGE}.querySelector('input').focus()")
    browser.press("ArrowRight")
    moved = float(browser.run(f"{STAGE}.querySelector('input').value"))
    assert moved == at + 1
    assert f"{moved:g}%" in clip("predicted")


def choose(browser: Browser, selector: str, value: str) -> None:
    browser.run(
        f"""(() => {{
          const control = document.querySelector({json.dumps(selector)});
          control.value = {json.dumps(value)};
          control.dispatchEvent(new Event("change"));
        }})()"""
    )


def shown(browser: Browser) -> list[float]:
    """Return the scores of the pictures shown, in their order."""
    return browser.run("[...document.querySelectorAll('.card .score')].map((b) => +b.textContent)")


def test_pictures_sort_and_filter(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    assert len(shown(browser)) == 8
    browser.run("document.getElementById('more').click()")
    scores = shown(browser)
    assert len(scores) == 16
    assert scores == sorted(scores)
    choose(browser, "#order", "best")
    assert shown(browser) == sorted(scores, reverse=True)
    choose(browser, "#order", "worst")
    choose(browser, "#of-class", "2")
    of_class = browser.run(
        """[...document.querySelectorAll(".card")].map((card) => +[...card.querySelectorAll("li")]
             .find((chip) => chip.textContent.startsWith("bag ")).querySelector("b").textContent)"""
    )
    assert 0 < len(of_class) < 16
    assert of_class == sorted(of_class)
    assert f"{len(of_class)} of 16" in browser.run("document.getElementById('count').textContent")


def test_every_view_shows_its_layers(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    layers = ("truth", "predicted", "errors")
    for view, visible in {
        "photograph": (), "truth": ("truth",), "predicted": ("predicted",), "errors": ("errors",),
        "compare": ("truth", "predicted"),
    }.items():  # fmt: skip
        browser.run(f"document.querySelector('[name=view][value={view}]').click()")
        for layer in layers:
            opacity = browser.run(f"getComputedStyle({STAGE}.querySelector('.{layer}')).opacity")
            assert (float(opacity) > 0) == (layer in visible), (view, layer)
    browser.run("document.querySelector('[name=view][value=all]').click()")
    panels = "document.querySelector('.card .panels').children"
    sizes = browser.run(f"[...{panels}].map((panel) => panel.getBoundingClientRect().width > 0)")
    assert sizes == [False, True, True, True, True]


def test_tables_sort(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    column = """[...document.querySelectorAll(".classes tbody tr")].map(
      (row) => Number(row.cells[2].dataset.value))"""
    unsorted = browser.run(column)
    browser.run("document.querySelectorAll('.classes thead button')[1].focus()")
    browser.press("Enter")
    assert browser.run(column) == sorted(unsorted, reverse=True)
    browser.press(" ")
    assert browser.run(column) == sorted(unsorted)
    assert browser.run("document.querySelector('.classes [aria-sort]').cellIndex") == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_keyboard_reaches_every_control(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.open(pages[name])
    wanted = browser.run(
        """(() => {
          window.reached = new Set();
          document.addEventListener("focusin", (event) => window.reached.add(event.target));
          const all =
            "a[href], button, [role=button], select, summary, input, svg[tabindex], .scroll";
          window.controls = [...document.querySelectorAll(all)].filter(
            (item) => item.checkVisibility() && (item.type !== "radio" || item.checked));
          return window.controls.length;
        })()"""
    )
    for _ in range(wanted + 5):
        browser.press("Tab")
    missed = "window.controls.filter((c) => !window.reached.has(c)).map((c) => c.outerHTML)"
    assert browser.run(missed) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_control_and_picture_has_a_name(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.open(pages[name])
    browser.send("Accessibility.enable")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    browser.send("Accessibility.disable")
    roles = {"button", "link", "slider", "combobox", "radio", "image", "radiogroup"}
    nameless = [
        node["role"]["value"]
        for node in nodes
        if not node["ignored"]
        and node["role"]["value"] in roles
        and not node.get("name", {}).get("value", "").strip()
    ]
    assert nameless == []


CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const pixel = (colors) => {  // colors over each other, the lowest first
    canvas.clearRect(0, 0, 1, 1);
    for (const color of colors) {
      canvas.fillStyle = color;
      canvas.fillRect(0, 0, 1, 1);
    }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (color) => {
    const [r, g, b] = color.map((v) => v / 255).map(
      (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  document.querySelectorAll("details").forEach((item) => (item.open = true));
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    if (element.closest("script, style, option, .unseen")) continue;
    const behind = [];
    for (let node = element; node; node = node.parentElement) {
      behind.unshift(getComputedStyle(node).backgroundColor);
    }
    const style = getComputedStyle(element);
    const text = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(pixel(behind)), light(pixel([...behind, text]))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const large = parseFloat(style.fontSize) >= 24;
    seen += 1;
    if (ratio < (large ? 3 : 4.5)) poor.push(
      [walker.currentNode.textContent.trim().slice(0, 30), ratio.toFixed(2)]);
  }
  return { seen, poor };
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_contrast_of_text(browser: Browser, pages: dict[str, Path], name: str, dark: bool) -> None:
    browser.open(pages[name], dark=dark)
    contrast = browser.run(CONTRAST)
    assert contrast["seen"] > 30
    assert contrast["poor"] == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast_of_curves(browser: Browser, pages: dict[str, Path], dark: bool) -> None:
    browser.open(pages["run"], dark=dark)
    ratios = browser.run(
        """(() => {
          const canvas = document.createElement("canvas").getContext("2d");
          const light = (name) => {
            canvas.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name);
            canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255).map(
              (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ground = light("--panel");
          return Array.from({ length: 8 }, (_, i) => light(`--s${i}`)).map(
            (v) => (Math.max(v, ground) + 0.05) / (Math.min(v, ground) + 0.05));
        })()"""
    )
    assert min(ratios) >= 3


def test_index_links_to_runs_and_marks_different_settings(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["index"])
    addresses = browser.run("[...document.querySelectorAll('tbody a')].map((link) => link.href)")
    assert len(addresses) == 2
    rows = browser.run(
        """[...document.querySelectorAll("td.differs")].map(
             (cell) => cell.parentElement.cells[0].textContent)"""
    )
    assert rows == ["optim.lr"]
    assert len(CLASSES) == browser.run(
        "document.querySelectorAll('section:last-of-type tbody tr').length"
    )
