"""OHIF in headless Chromium, driven by what a person sees, for the browser tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHROMIUM = Path("/usr/bin/chromium")
#: Software rendering, and none of Chromium's own calls to the internet.
FLAGS = (
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECONDS = 1000
_LOADED = "() => window.cornerstone?.cache.getVolumes()[0]?.loadStatus?.loaded"
_SEGMENTED = "() => !!window.services?.segmentationService.getSegmentation('1')"
#: Shows a voxel in the axial view; gives where it is on the page.
_SHOW = """ijk => {
  const view = services.cornerstoneViewportService.getCornerstoneViewport('mpr-axial');
  const point = cornerstone.cache.getVolumes()[0].imageData.indexToWorld(ijk);
  const { viewPlaneNormal: n, focalPoint, position } = view.getCamera();
  const away = n.reduce((sum, c, axis) => sum + c * (point[axis] - focalPoint[axis]), 0);
  const moved = from => from.map((v, axis) => v + n[axis] * away);
  view.setCamera({ focalPoint: moved(focalPoint), position: moved(position) });
  view.render();
  const [x, y] = view.worldToCanvas(point);
  const place = view.element.getBoundingClientRect();
  return [place.x + x, place.y + y];
}"""
_LABELMAP = """() => {
  const volume = services.segmentationService.getLabelmapVolume('1');
  return [volume.dimensions, btoa(Array.from(volume.voxelManager.getCompleteScalarDataArray(),
    value => String.fromCharCode(value)).join(''))];
}"""
_CHOSEN = """label => Array.from(document.querySelectorAll('tr.clickable-row')).some(
  row => row.innerText.trim() === label && row.style.backgroundColor.startsWith('dark'))"""
_POINTS = "cornerstoneTools.annotation.state.getAnnotationManager().getNumberOfAllAnnotations()"
_NAMES = """() => Object.values(services.segmentationService.getSegmentation('1').segments)
  .map(segment => [segment.segmentIndex, segment.label])"""


class Viewer:
    """The MONAI Label mode of OHIF on one page.

    Args:
        page: A page of a browser.
        url: The server's.
        shots: Where screenshots go.
    """

    def __init__(self, page: Any, url: str, shots: Path) -> None:
        self.page, self.url, self.shots = page, url, shots
        self.errors: list[str] = []
        self.requests: list[Any] = []
        page.set_default_timeout(120 * SECONDS)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request))  # noqa: PLW0108 - takes no built-in

    def shot(self, name: str) -> None:
        """Keep a screenshot."""
        self.page.screenshot(path=self.shots / f"{name}.png")

    def study_list(self) -> None:
        """Open the study list."""
        self.page.goto(f"{self.url}/ohif/")

    def open_from_list(self, patient: str) -> None:
        """Click a patient in the study list, and the mode."""
        self.page.get_by_text(patient, exact=True).first.click()
        self.page.get_by_role("button", name="MONAI Label").click()
        self.opened()

    def opened(self) -> None:
        """Wait until a study is shown."""
        self.page.locator("#monailabelServerURL").wait_for()
        self.page.wait_for_function(_LOADED)
        hint = self.page.get_by_role("button", name="Confirm and Hide")
        if hint.count():
            hint.click()

    def connect(self) -> None:
        """Press the round arrow."""
        self.page.locator(".settingsTable button").click()
        self.page.wait_for_function(_SEGMENTED)

    def tab(self, title: str, model: str | None = None) -> Any:
        """Open a tab of the panel, and choose a model there, which forgets its points; gives the tab."""
        tab = self.page.locator(".tab", has=self.page.locator("label.tab-label", has_text=title))
        if not tab.locator("input.tab-switch").is_checked():
            tab.locator("label.tab-label").click()
        if model is not None:
            tab.locator("select").first.select_option(model)
        return tab

    def point(self, label: str, *voxels: tuple[int, int, int]) -> None:
        """Choose a label in the tab of points, and click on voxels for it."""
        row = self.page.locator("tr.clickable-row", has=self.page.get_by_text(label, exact=True))
        self.tab("Point Prompts").locator(row).click()
        self.page.wait_for_function(_CHOSEN, arg=label)
        for voxel in voxels:
            before = self.page.evaluate(_POINTS)
            self.page.mouse.click(*self.show(voxel))
            self.clicked(before + 1)

    def clicked(self, count: int) -> None:
        """Wait until the viewer has taken so many clicks: it waits for the second of a double click."""
        self.page.wait_for_function(f"count => {_POINTS} >= count", arg=count)

    def next(self) -> None:
        """Press the bar's Next sample, and wait for the case."""
        with self.page.expect_navigation():
            self.press("Next sample")
        self.opened()

    def next_of_panel(self) -> None:
        """Press the panel's own Next Sample, with the strategy "first", and wait for the case."""
        tab = self.tab("Active Learning")
        tab.locator("select").select_option("first")
        tab.get_by_role("button", name="Next Sample").click()
        self.page.once("dialog", lambda dialog: dialog.accept())
        with self.page.expect_navigation():
            self.page.locator(".nextSampleForm button", has_text="OK").first.click()
        self.opened()

    def set_option(self, section: str, name: str, key: str, value: str) -> None:
        """Set an option in the panel's dialog of them."""
        self.page.get_by_text("Options / Configurations").click()
        self.page.locator("select[name=selectSection]").select_option(section)
        self.page.locator("select[name=selectName]").select_option(name)
        self.page.locator(f"#{section}{name}{key}").fill(value)
        self.page.get_by_role("button", name="Confirm", exact=True).click()

    def show(self, voxel: tuple[int, int, int]) -> tuple[float, float]:
        """Show a voxel's slice in the axial view; gives where the voxel is on the page."""
        x, y = self.page.evaluate(_SHOW, [int(v) for v in voxel])
        return x, y

    def run(self, title: str) -> tuple[Any, np.ndarray]:
        """Run a tab's model; gives the response, and the label map as it is drawn then."""
        tab = self.tab(title)
        before = self._changes()
        with self.page.expect_response(lambda reply: "/infer/" in reply.url) as waited:
            tab.get_by_role("button", name="Run", exact=True).click()
        reply = waited.value
        if reply.status == 200:
            self.page.wait_for_function("before => window.samloopChanges > before", arg=before)
        return reply, self.labelmap()

    def labelmap(self) -> np.ndarray:
        """(I, J, K) uint8: the panel's label map, in the viewer's own numbers."""
        import base64

        shape, text = self.page.evaluate(_LABELMAP)
        return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape, order="F")

    def names(self) -> dict[str, int]:
        """The viewer's numbers by name."""
        return {name: index for index, name in self.page.evaluate(_NAMES)}

    def bar(self) -> Any:
        """The bar that accepts."""
        return self.page.locator("#samloop-accept")

    def press(self, button: str) -> None:
        """Press a button of the bar."""
        self.bar().get_by_role("button", name=button, exact=True).click()

    def said(self, text: str) -> str:
        """Wait until the bar says something; gives all of it."""
        status = self.bar().get_by_role("status").filter(has_text=text)
        status.wait_for()
        return str(status.inner_text())

    def _changes(self) -> int:
        """How often the label map was drawn anew so far."""
        return int(
            self.page.evaluate(
                """() => {
                  if (window.samloopChanges === undefined) {
                    window.samloopChanges = 0;
                    const event = cornerstoneTools.Enums.Events.SEGMENTATION_DATA_MODIFIED;
                    cornerstone.eventTarget.addEventListener(event, () => { window.samloopChanges++; });
                  }
                  return window.samloopChanges;
                }"""
            )
        )


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium without a window; skips by name where it or what drives it is not there."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if not CHROMIUM.exists():
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        try:
            yield started
        finally:
            started.close()
