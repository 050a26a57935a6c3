"""The built site works without a network: `make site` builds it and runs these tests."""

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
PAGES = sorted(SITE.rglob("*.html")) if SITE.exists() else []
PAGES = [page for page in PAGES if "_static" not in page.parts]
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}
REMOTE = re.compile(r"(?:https?:)?//", re.IGNORECASE)
HOSTS = re.compile(r"unpkg\.com|jsdelivr|cdnjs|cloudflare|googleapis|gstatic|mathjax\.org|binder", re.IGNORECASE)

pytestmark = pytest.mark.site
if not (SITE / "index.html").exists() and os.environ.get("GRADLAB_SITE") != "required":
    pytestmark = [pytest.mark.site, pytest.mark.skip(reason="no site in _build/html: run make site")]


class Page(HTMLParser):
    """What a page loads, where it links, what can be linked to, and its inline scripts and styles."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.links, self.names, self.inline, self.images, self._open = (
            [],
            [],
            set(),
            [],
            [],
            False,
        )
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.names |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        self.loads += [attrs[LOADS[tag]]] if attrs.get(LOADS.get(tag)) else []
        self.loads += [attrs["href"]] if tag == "link" and attrs.get("rel") != "canonical" else []
        self.links += [attrs["href"]] if tag == "a" and attrs.get("href") else []
        self.images += [attrs] if tag == "img" else []
        self.inline += [attrs["style"]] if attrs.get("style") else []
        self._open = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._open = False

    def handle_data(self, data):
        self.inline += [data] if self._open else []


@pytest.fixture(scope="module")
def site() -> dict[Path, Page]:
    assert (SITE / "index.html").exists(), "no site in _build/html: run make site"
    return {path: Page(path) for path in PAGES}


def test_every_page_of_the_table_of_contents_is_there():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    for name in [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]:
        assert (SITE / f"{name}.html").exists(), name


def test_the_first_page_leads_to_the_book():
    assert "url=book/intro.html" in (SITE / "index.html").read_text()


def test_nothing_is_loaded_from_elsewhere(site):
    for path, page in site.items():
        remote = [url for url in page.loads if REMOTE.match(url)]
        assert not remote, (path.name, remote)
        for text in page.inline:
            assert not HOSTS.search(text), (path.name, text[:200])
            assert not re.search(r"(?:import|url)\W*(?:https?:)?//", text), (path.name, text[:200])


def test_style_sheets_load_nothing_from_elsewhere():
    for path in SITE.rglob("*.css"):
        text = path.read_text(encoding="utf-8", errors="ignore")
        assert not re.search(r"@import[^;]*(?:https?:)?//", text), path
        assert not re.search(r"url\(\s*[\"']?(?:https?:)?//", text), path


def test_everything_that_is_loaded_exists(site):
    for path, page in site.items():
        for url in page.loads:
            if not url.startswith("data:"):
                assert (path.parent / unquote(urlsplit(url).path)).resolve().exists(), (path.name, url)


def test_internal_links_and_anchors_resolve(site):
    for path, page in site.items():
        for url in page.links:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc or url == "#":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), (path.name, url)
            if parts.fragment and target in site:
                assert unquote(parts.fragment) in site[target].names, (path.name, url)


def test_formulas_are_rendered_by_a_local_script(site):
    for path, page in site.items():
        scripts = [url for url in page.loads if "mathjax" in url.lower()]
        text = path.read_text(encoding="utf-8")
        assert scripts or 'class="math' not in text, path.name
        assert all((path.parent / urlsplit(url).path).resolve().stat().st_size > 1_000_000 for url in scripts)


def test_every_image_is_described(site):
    for path, page in site.items():
        for image in page.images:
            assert len(image.get("alt") or "") > 10 or "logo" in image.get("class", ""), (path.name, image)


def test_no_script_stands_twice(site):
    for path in site:
        scripts = re.findall(r"<script>(.+?)</script>", path.read_text(encoding="utf-8"), re.DOTALL)
        assert len(scripts) == len(set(scripts)), path.name


def test_there_is_one_search_field(site):
    for path in site:
        fields = path.read_text(encoding="utf-8").count('type="search"')
        assert fields <= 1 + (path.name == "search.html"), (path.name, fields)


def test_nothing_of_this_machine_is_told():
    for path in PAGES:
        assert str(ROOT) not in path.read_text(encoding="utf-8"), path.name


def test_every_chapter_has_the_number_of_its_file():
    chapters = [page for page in PAGES if re.match(r"\d\d_", page.name)]
    assert chapters
    for page in chapters:
        number = re.search(r"<title>(\d+)\. ", page.read_text(encoding="utf-8"))
        assert number and int(number[1]) == int(page.name[:2]), page.name
