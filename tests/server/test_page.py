"""The live page in a headless browser, or in Node.js with as much of a document as the page uses.

Each scene is a page and the answers its polls get, in order.
"""

import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

import pytest

from longspan.attention.schedules import SCHEDULES
from tests.server.sample_state import ADDED, ENDED_ID, HOSTILE_ID, SHARDS, State, empty, lively

BROWSER, NODE = shutil.which("chromium"), shutil.which("node")
DOCUMENT = Path(__file__).with_name("page_document.js")
PAGE = files("longspan.server") / "page" / "index.html"
pytestmark = pytest.mark.skipif(not (BROWSER or NODE), reason="needs `chromium` or `node` on the PATH")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs a browser: no `chromium` on the PATH")

VOID = {"meta", "link", "br", "img", "input"}
# Notes how far content sticks out of a page of 400 pixels (the browser's own windows are wider), and points at the
# second step; polls go on after that.
POINT = """<script>setTimeout(() => {
  const main = document.querySelector("main");
  main.style.width = "400px";
  document.body.dataset.overflow = main.scrollWidth - main.clientWidth;
  const step = document.querySelector("#steps > :nth-child(2)");
  step.scrollIntoView({ block: "center" });
  const { x, bottom } = step.getBoundingClientRect();
  const at = { clientX: x + 2, clientY: bottom - 5 };
  step.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, ...at }));
}, 500)</script>"""
HIDE = "<script>Object.defineProperty(document, 'hidden', { value: true })</script>"


class Element:
    """One element of a dumped page."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes, self.text = tag, attributes, ""
        self.inside: list[Element] = []

    def find(self, tag: str = "", kind: str = "") -> list["Element"]:
        """Everything inside with this tag and this class."""
        own = [e for e in self.inside if tag in ("", e.tag) and kind in ("", *e.attributes.get("class", "").split())]
        return own + [found for e in self.inside for found in e.find(tag, kind)]

    def __getitem__(self, identity: str) -> "Element":
        return next(e for e in self.find() if e.attributes.get("id") == identity)


class Dom(HTMLParser):
    """Builds the tree of elements; `text` of an element has all the text inside it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open = [Element("", {})]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag == self.open[-1].tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def crowded() -> State:
    state = lively()
    return {**state, "requests": state["requests"][:2], "requests_total": 8}


def restarting() -> State:
    """The oldest request has left, and the ranks are away."""
    return {**lively(), "ready": False, "requests": lively()["requests"][1:], "requests_total": 7}


def quiet_cache() -> State:
    """Four shards of which hardly anything is used."""
    state = lively()
    shards = [{**shard, "pages": 400_000} for shard in state["shards"]]
    return {**state, "shards": shards}


def wide() -> State:
    """64 shards, and a request on all of them."""
    runs = [[shard, 3] for shard in range(64)]
    request = {**lively()["requests"][0], "pages_by_shard": [3] * 64, "runs": runs}
    shards = [{"shard": n, "pcp": n // 8, "pages": 100, "used": 3} for n in range(64)]
    return {**lively(), "shards": shards, "cached_pages_by_shard": [0] * 64, "requests": [request], "requests_total": 1}


SCENES: dict[str, list[State | None]] = {  # what the polls are answered; None is an error; the last one repeats
    "lively": [lively()],
    "crowded": [crowded()],
    "idle": [None, empty()],
    "busy": [{**empty(), "requests_total": 6}],  # within a long step, before the core has told anything
    "restarting": [lively(), restarting()],
    "lost": [lively(), None],
    "locked": [lively()],
    "refused": [lively()],
    "unseen": [lively()],
    "quiet": [quiet_cache()],
    "wide": [wide()],
}
LOCKED = ("locked", "refused")  # scenes that need a key
ENTER = "<script>sessionStorage.setItem('key', 'wrong')</script>"
SCRIPTS = {"lively": POINT, "unseen": HIDE, "refused": ENTER}  # what a scene's page has beside its own script


class Server(ThreadingHTTPServer):
    """Serves every scene under its name, and notes what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        _, scene, path = self.path.split("/", 2)
        before = self.server.asked.count(self.path)
        self.server.asked.append(self.path)
        if path == "internal/state":
            states = SCENES[scene]
            state = states[min(before, len(states) - 1)]
            if scene in LOCKED:
                self.reply(401, "application/json", "{}")
                return
            self.reply(500 if state is None else 200, "application/json", json.dumps(state or {"detail": "no engine"}))
        else:
            page = PAGE.read_text().replace("</body>", SCRIPTS.get(scene, "") + "</body>")
            self.reply(200, "text/html; charset=utf-8", page)

    def reply(self, status: int, kind: str, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def visit(address: str) -> Element:
    return browse(address) if BROWSER else run_in_node(address.rstrip("/").rpartition("/")[2])


def run_in_node(scene: str) -> Element:
    key = "wrong" if scene == "refused" else None
    given = {"page": PAGE.read_text(), "states": SCENES[scene], "locked": scene in LOCKED, "key": key}
    done = subprocess.run(
        [str(NODE), str(DOCUMENT)], input=json.dumps(given), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return Dom(done.stdout).open[0]


def browse(address: str) -> Element:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
        command = [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", *quiet,
            f"--user-data-dir={profile}", "--window-size=400,900", "--virtual-time-budget=3000", "--dump-dom", address,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return Dom(done.stdout).open[0]


@pytest.fixture(scope="module")
def scenes(server: Server) -> dict[str, Element]:
    """The page of every scene as it is after three seconds of its own time."""
    with ThreadPoolExecutor(3) as pool:
        pages = pool.map(visit, [f"http://127.0.0.1:{server.server_port}/{scene}/" for scene in SCENES])
        return dict(zip(SCENES, pages, strict=True))


def rows(page: Element) -> list[Element]:
    return page["requests"].find("tr")


def row_of(page: Element, request_id: str) -> Element:
    return next(row for row in rows(page) if request_id in row.text)


def test_the_header_tells_the_layout_in_words(scenes):
    text = scenes["lively"]["layout"].text
    assert "4 ranks" in text
    assert "2 ranks split each prompt (PCP)" in text and "2 ranks split each context (DCP)" in text


def test_a_ready_server_says_so_and_shows_no_banner(scenes):
    assert scenes["lively"]["pill"].text == "ready"
    assert scenes["lively"]["banner"].text == ""


def test_the_big_figures_come_from_the_newest_second_and_the_requests(scenes):
    figures = [tile.find("b")[0].text for tile in scenes["lively"]["figures"].find(kind="figure")]
    assert figures == ["58.6", "559", "840 ms", "41 ms", "6", "2", "56 %"]


def test_latencies_have_their_95th_percentile_beside_the_median(scenes):
    units = [tile.find("span")[0].text for tile in scenes["lively"]["figures"].find(kind="figure")]
    assert units[2:4] == ["median of 2 min, p95 2.10 s", "median of 2 min, p95 120 ms"]


def test_bars_are_zoomed_in_where_little_is_used(scenes):
    assert scenes["lively"]["zoom"].text == ""
    page = scenes["quiet"]
    assert page["zoom"].text == "zoomed in: bars are 0.35 % of a shard"
    piece = page["shards"].find(kind="bar")[1].inside[0]
    assert 10 < float(re.search(r"width: ([\d.]+)%", piece.attributes["style"])[1]) < 90


def test_64_shards_have_small_bars_and_a_strip_of_bounded_height(scenes):
    page = scenes["wide"]
    assert page["shards"].attributes["class"] == "many"
    assert len(page["shards"].find(kind="bar")) == 64
    assert int(rows(page)[0].find(kind="span")[0].attributes["height"]) <= 48


def test_every_shard_has_a_bar_with_its_figures(scenes):
    bars = scenes["lively"]["shards"].find(kind="bar")
    assert len(bars) == SHARDS
    assert bars[1].attributes["aria-label"] == "shard 1: 875 of 1,500 pages used, 90 kept in the prefix cache"


def test_a_bar_has_a_piece_for_each_request_with_pages_there_and_one_for_the_prefix_cache(scenes):
    bar = scenes["lively"]["shards"].find(kind="bar")[1]
    tips = [piece.attributes["data-tip"].split("\n")[0] for piece in bar.inside]
    assert tips[:4] == ["cmpl-7d21f0a9c3", "cmpl-2c88e1b7f4", "cmpl-9b3e55d210", "chatcmpl-short"]
    assert len(tips) == 5 and tips[4].startswith("Prefix cache: 90 pages")


def test_requests_beyond_the_table_are_one_piece_and_are_counted(scenes):
    page = scenes["crowded"]
    assert page["count"].text == "the first 2 of 8"
    assert "Requests not in the table" in page["shards"].find(kind="other")[0].attributes["data-tip"]


def test_every_request_has_a_row_and_those_that_run_come_first(scenes):
    status = [row.find("td")[1].text.split()[-1] for row in rows(scenes["lively"])]
    assert status[:8] == ["running"] * 6 + ["waiting"] * 2


def test_requests_that_ended_stay_for_a_while_below_the_others(scenes):
    row, _ = scenes["lively"]["requests"].find("tr", "ended")
    assert row is rows(scenes["lively"])[-2]
    assert [cell.text for cell in row.find("td")] == [
        f"✓{ENDED_ID}", "ended: max_tokens reached", "700", "64", "128 from cached prefix", "310 ms", "2.75 s",
        "4.20 s ago",
    ]  # fmt: skip


def test_a_request_that_broke_off_is_not_ticked_off(scenes):
    row = scenes["lively"]["requests"].find("tr", "ended")[-1]
    assert [cell.text for cell in row.find("td")][:2] == ["✕r8.0", "ended: aborted"]


def test_errors_are_shown_with_their_reason(scenes):
    cells = [cell.text for cell in scenes["lively"]["errors"].find("tr")[0].find("td")]
    assert cells == ["12.0 s ago", "400", "POST /v1/completions", "max_tokens: must not be negative"]
    assert "hidden" not in scenes["lively"]["failures"].attributes
    assert "hidden" in scenes["idle"]["failures"].attributes


def test_a_half_read_prompt_shows_how_far_it_is_and_has_no_first_token(scenes):
    text = row_of(scenes["lively"], "cmpl-2c88e1b7f4").text
    assert "46 %" in text and "–" in text


def test_the_span_of_a_spread_request_fills_every_lane_in_the_order_of_positions(scenes):
    strip = row_of(scenes["lively"], "cmpl-2c88e1b7f4").find(kind="span")[0]
    assert strip.attributes["aria-label"].startswith("576 pages in 16 runs\nshard 0: 144, shard 1: 144")
    tops = re.findall(r"M\d+ (\d+)", strip.find("path")[0].attributes["d"])
    assert tops == ["0", "7", "14", "21", "21", "14", "7", "0"] * 2


def test_the_span_of_a_short_request_is_one_lane_from_end_to_end(scenes):
    strip = row_of(scenes["lively"], "chatcmpl-short").find(kind="span")[0]
    assert strip.find("path")[0].attributes["d"] == "M0 7h240v6h-240z"


def test_a_request_keeps_its_number_when_another_leaves(scenes):
    for page in scenes["lively"], scenes["restarting"]:
        assert row_of(page, "cmpl-9b3e55d210").find(kind="swatch")[0].text == "3"


def test_a_request_id_that_looks_like_html_is_shown_and_does_nothing(scenes):
    page = scenes["lively"]
    assert HOSTILE_ID in page["requests"].text
    assert page.find("img") == []
    assert "data-broken" not in page.find("body")[0].attributes


def test_every_step_is_a_bar_with_a_half_for_each_class_it_worked_on(scenes):
    steps = scenes["lively"]["steps"].inside
    assert len(steps) == 60
    assert [half.attributes["data-schedule"] for half in steps[0].inside] == ["gather_q", "ring_kv"]
    assert [half.attributes["data-schedule"] for half in steps[5].inside] == ["gather_q"]


def test_prefill_and_decode_of_a_step_are_told_apart_and_its_axes_are_numbered(scenes):
    page = scenes["lively"]
    assert [half.attributes["class"].split()[-1] for half in page["steps"].inside[0].inside] == ["decode", "prompt"]
    assert [mark.text for mark in page["numbers"].inside] == ["step 900", "step 930", "step 959"]
    top, half, zero = (mark.text for mark in page["ticks"].inside)
    assert (top, half, zero) == ("200 ms", "100 ms", "0")


def test_every_step_tells_its_numbers_where_it_is_pointed_at(scenes):
    assert scenes["lively"]["steps"].inside[1].attributes["data-tip"].startswith("Step 901: 166 ms\n5 decode rows")


@needs_browser
def test_pointing_at_a_step_shows_its_numbers_and_polls_leave_them_there(scenes):
    tip = scenes["lively"]["tip"]
    assert "hidden" not in tip.attributes
    assert tip.text == "Step 901: 166 ms\n5 decode rows by gather_q\n512 prompt tokens by ring_kv"


def test_the_legend_explains_every_schedule_of_the_engine_and_those_that_were_added(scenes):
    lines = [*scenes["lively"]["schedules"].find("li"), *scenes["lively"]["others"].find("li")]
    told = {line.find("b")[0].text: line.find("span")[0].text[2:] for line in lines}
    assert told == {name: one.sentence for name, one in SCHEDULES.items()} | {ADDED["name"]: ADDED["sentence"]}


def test_schedules_that_are_not_in_use_are_folded(scenes):
    page = scenes["lively"]
    assert [line.find("b")[0].text for line in page["others"].find("li")] == ["gather_kv", "mapped_kv"]
    assert page["unusedcount"].text == "2 schedules not in use"
    assert len(scenes["idle"]["others"].find("li")) == len(SCHEDULES) + 1


def test_schedules_have_the_colours_of_their_records_and_differ_in_pattern_by_what_they_move(scenes):
    swatches = [line.find("i")[0] for line in scenes["idle"]["others"].find("li")]
    colours = [swatch.attributes["style"].removeprefix("--colour: ").rstrip(";") for swatch in swatches]
    assert colours == [*(schedule.colour for schedule in SCHEDULES.values()), ADDED["colour"]]
    assert [swatch.attributes["class"] for swatch in swatches] == [
        "sch", "sch moving", "sch moving lines", "sch moving diagonal", "sch moving dots",
        "sch moving", "sch moving lines", "sch moving", "sch moving diagonal",
    ]  # fmt: skip


def test_drafts_show_the_tokens_of_a_step_and_their_acceptance_by_position_where_there_are_any(scenes):
    facts = {pair.find("dt")[0].text: pair.find("dd")[0].text for pair in scenes["lively"]["totals"].find("div")}
    assert (facts["tokens a step with drafts"], facts["accepted, by position"]) == ("2.35", "81 %, 52 %")
    assert "drafts" not in scenes["idle"]["totals"].text


def test_the_history_is_drawn_as_lines(scenes):
    lines = scenes["lively"]["history"].find("polyline")
    assert [len(line.attributes["points"].split()) for line in lines] == [120] * 4


def test_without_requests_the_page_tells_how_to_send_one(scenes):
    page = scenes["idle"]
    assert "hidden" not in page["empty"].attributes and "/v1/completions" in page["curl"].text
    assert rows(page) == []


def test_requests_of_which_the_core_has_not_told_are_counted_and_not_denied(scenes):
    page = scenes["busy"]
    assert page["count"].text == "6: the ranks are busy and have not told more yet"
    assert "hidden" in page["empty"].attributes


def test_without_steps_the_axis_says_so_below_the_bars(scenes):
    numbers = scenes["idle"]["numbers"]
    assert numbers.text == "no steps yet" and "100%" not in numbers.attributes["style"]


def test_without_requests_the_bars_are_empty(scenes):
    assert [bar.inside for bar in scenes["idle"]["shards"].find(kind="bar")] == [[]] * SHARDS


def test_restarting_ranks_are_announced(scenes):
    assert scenes["restarting"]["banner"].text == "ranks are restarting"


def test_a_lost_connection_is_announced_and_the_last_figures_stay(scenes):
    page = scenes["lost"]
    assert page["banner"].text == "connection lost, retrying"
    assert len(rows(page)) == 10


def test_a_server_with_a_key_asks_for_it(scenes):
    assert scenes["locked"]["banner"].text == "this server has a key: enter it to see its state"
    assert "hidden" not in scenes["locked"]["lock"].attributes
    assert "hidden" in scenes["lively"]["lock"].attributes


def test_a_key_that_the_server_does_not_know_is_told_from_none(scenes):
    assert scenes["refused"]["banner"].text == "the server does not know this key: enter another"
    assert "hidden" not in scenes["refused"]["lock"].attributes


def test_a_connection_that_comes_back_clears_the_banner(scenes):
    assert scenes["idle"]["banner"].text == ""


@needs_browser
def test_a_page_out_of_sight_asks_no_more(scenes, server):
    assert server.asked.count("/unseen/internal/state") == 1
    assert server.asked.count("/lively/internal/state") > 1


@needs_browser
def test_nothing_sticks_out_of_a_page_of_400_pixels(scenes):
    body = scenes["lively"].find("body")[0].attributes
    assert body["data-overflow"] == "0"


def test_the_page_makes_no_html_of_text():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", PAGE.read_text())


def test_a_prompt_can_be_tried_and_docs_and_metrics_are_linked():
    page = Dom(PAGE.read_text()).open[0]
    assert [link.attributes["href"] for link in page.find("nav")[0].find("a")] == ["docs", "metrics"]
    assert page["try"].find("textarea") and page["try"].find("button")


@needs_browser
def test_the_page_asks_for_nothing_but_itself_and_the_state(scenes, server):
    assert {path.split("/", 2)[2] for path in server.asked} == {"", "internal/state"}
