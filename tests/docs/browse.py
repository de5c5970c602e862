"""Opens every page of the built site in a browser, wide and narrow: `make docs-browse`.

It fails on an error in the console, a request that leaves the site, a broken link, anchor or image,
sideways scrolling, and a word that the search does not find.
"""

import argparse
import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Request, sync_playwright

WIDTHS = {"wide": 1280, "phone": 390}
HEIGHT = 900
SEARCHES = {
    "thaw": "how-to/freeze-and-thaw.html",
    "clip_by_global_norm": "how-to/inside-or-around.html",
    "selects no leaf": "reference/errors.html",
    "pattern 'backbon' selects no leaf": "reference/errors.html",
}
"""What a reader searches for, and a page that has to be among the results."""

# Debian's chromium, as root in a container, and without calls to its maker.
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and tells nothing of it."""

    def do_GET(self) -> None:
        # A browser asks for an icon by itself, once, at a time of its own. No page links to one.
        if self.path == "/favicon.ico":
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name of the base)
        pass


class Watch:
    """What goes wrong on a page while it loads."""

    def __init__(self, page: Page, site: str):
        self._site, self.faults = site, list[str]()
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.faults.append(f"script error: {error}"))
        page.on("request", self._on_request)
        page.on("requestfailed", lambda request: self.faults.append(f"not loaded: {request.url}"))

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"console {message.type}: {message.text}")

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((self._site, "data:")):
            self.faults.append(f"asks another site: {request.url}")


def faults_of_page(page: Page, watch: Watch, url: str) -> list[str]:
    """Opens a page and lists what is wrong with how it loads and how it looks."""
    watch.faults.clear()
    page.goto(url, wait_until="load")
    faults = list(watch.faults)
    across = page.evaluate(
        """() => {
            const width = document.documentElement.clientWidth;
            if (document.documentElement.scrollWidth <= width) return [];
            const wide = [...document.querySelectorAll('main *, article *')]
                .filter(x => x.getBoundingClientRect().right > width + 1);
            return [wide.length ? wide.at(-1).outerHTML.slice(0, 120) : document.body.tagName];
        }"""
    )
    faults += [f"scrolls sideways: {element}" for element in across]
    broken = page.evaluate(
        "() => [...document.images].filter(x => !x.naturalWidth).map(x => x.currentSrc || x.src)"
    )
    return [*faults, *(f"image is missing: {source}" for source in broken)]


def link_faults(
    root: Path, site: str, anchors: dict[str, set[str]], links: dict[str, list[str]]
) -> Iterator[str]:
    """Yields the links that lead nowhere in the site, each with the page that has it."""
    for name, hrefs in links.items():
        for href in hrefs:
            if not href.startswith(site):
                continue
            parts = urlsplit(href)
            target = unquote(parts.path).lstrip("/") or "index.html"
            if not (root / target).is_file():
                yield f"{name}: broken link: {href}"
            elif parts.fragment and unquote(parts.fragment) not in anchors.get(target, ()):
                yield f"{name}: no such anchor: {href}"


def search_faults(page: Page, watch: Watch, site: str) -> Iterator[str]:
    """Yields what a reader who searches for some words does not find."""
    for words, expected in SEARCHES.items():
        watch.faults.clear()
        page.goto(f"{site}/index.html")
        page.fill("input[name=q]", words)
        page.press("input[name=q]", "Enter")
        page.wait_for_function(
            "() => /finished|did not match/"
            ".test(document.querySelector('#search-results').innerText)"
        )
        # The texts of the results come later. The next search would break them off.
        page.wait_for_load_state("networkidle")
        links = "() => [...document.querySelectorAll('#search-results li a')].map(x => x.href)"
        found = page.evaluate(links)
        if not any(expected in href for href in found):
            yield f"search for {words!r} does not find {expected}, but {found[:5]}"
        yield from (f"search for {words!r}: {fault}" for fault in watch.faults)


def pages_of(root: Path) -> list[str]:
    """The pages of a built site."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.html"))


def shoot(context: BrowserContext, site: str, names: list[str], folder: Path) -> None:
    """Stores a screenshot of some pages in each width and theme."""
    folder.mkdir(parents=True, exist_ok=True)
    for theme in ("light", "dark"):
        page = context.new_page()
        page.emulate_media(color_scheme=theme)
        for name in names:
            for label, width in WIDTHS.items():
                page.set_viewport_size({"width": width, "height": HEIGHT})
                page.goto(f"{site}/{name}", wait_until="load")
                stem = name.removesuffix(".html").replace("/", "_")
                page.screenshot(path=folder / f"{stem}-{label}-{theme}.png")
        page.close()


def browse(root: Path, site: str, context: BrowserContext) -> int:
    """Goes through the whole site, prints what is wrong, and returns how much that is."""
    page = context.new_page()
    watch, count, names = Watch(page, site), 0, pages_of(root)
    anchors: dict[str, set[str]] = {}
    links: dict[str, list[str]] = {}
    for label, width in WIDTHS.items():
        page.set_viewport_size({"width": width, "height": HEIGHT})
        for name in names:
            for fault in faults_of_page(page, watch, f"{site}/{name}"):
                count += 1
                print(f"{name} ({label}): {fault}", flush=True)
            if name not in anchors:
                ids = "() => [...document.querySelectorAll('[id]')].map(x => x.id)"
                anchors[name] = set(page.evaluate(ids))
                hrefs = "() => [...document.querySelectorAll('a[href]')].map(x => x.href)"
                links[name] = page.evaluate(hrefs)
    for fault in link_faults(root, site, anchors, links):
        count += 1
        print(fault, flush=True)
    for fault in search_faults(page, watch, site):
        count += 1
        print(fault, flush=True)
    widths = " and ".join(map(str, WIDTHS.values()))
    print(f"{len(names)} pages at {widths} pixels, {len(SEARCHES)} searches: {count} faults")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="the folder of the built site")
    parser.add_argument("--shots", type=Path, help="a folder for screenshots of --pages")
    parser.add_argument("--pages", nargs="*", default=["index.html"], help="what to take them of")
    given = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        print("chromium is not installed here: the site was not opened in a browser")
        return
    handler = functools.partial(Quiet, directory=str(given.site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        site = f"http://127.0.0.1:{server.server_port}"
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
            context = browser.new_context()
            if given.shots:
                shoot(context, site, given.pages, given.shots)
                count = 0
            else:
                count = browse(given.site, site, context)
            browser.close()
        server.shutdown()
    sys.exit(bool(count))


if __name__ == "__main__":
    main()
