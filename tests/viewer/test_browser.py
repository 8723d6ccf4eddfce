"""The page in a real browser: what a reader does with it, and what hostile text does not."""

from __future__ import annotations

import os
import re
import shutil
from urllib.parse import quote

import pytest

from tests.support import needs
from tests.viewer.runs import HOSTILE, UNPAIRED, make_run
from trl_multiturn.viewer import view


pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files: the run, and one of single trajectories with the reference token by token."""
    folder = tmp_path_factory.mktemp("pages")
    run = make_run(folder / "run")
    view(run, title=f"run {HOSTILE}").save(folder / "run.html")
    view(make_run(folder / "unpaired", 1, UNPAIRED, "unpaired")).save(folder / "unpaired.html")
    cell = view(run)._repr_html_()
    (folder / "notebook.html").write_text(f"<!doctype html><html lang=en><title>n</title><body>{cell}</body></html>")
    return folder


@pytest.fixture(scope="module")
def chromium(pages):
    if CHROMIUM is None:
        assert "EXTRAS_REQUIRED" not in os.environ, "No Chromium was found, and this environment is to test with one."
        pytest.skip("needs Chromium")
    sync_api = needs("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium):
    """A tab whose errors, and whose requests of anything but the file itself, fail the test."""
    tab = chromium.new_page(viewport={"width": 1400, "height": 800})
    tab.set_default_timeout(10_000)
    complaints = []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    tab.on("request", lambda request: None if request.url.startswith("file://") else complaints.append(request.url))
    yield tab
    hacked = tab.evaluate("window.hacked")
    tab.close()
    assert complaints == [] and hacked is None


@pytest.fixture
def open_page(tab, pages):
    def open_page(address="", name="run"):
        tab.goto("about:blank")
        tab.goto(f"{(pages / name).as_uri()}.html{address}")
        listed = address.startswith(("#trajectories", "#pairs", "#prompts"))
        tab.wait_for_selector("table.rows tbody tr:not(.spacer)" if listed else ".overview")
        if "open=" in address or "left=" in address:
            tab.wait_for_selector("article")
        return tab

    return open_page


def places(tab):
    """The rows in sight: place, iteration, verdict."""
    rows = tab.locator("table.rows tbody tr:not(.spacer)").all()
    return [[row.locator(f"td.c-{name}").inner_text() for name in ("place", "iteration", "verdict")] for row in rows]


def wait_for_count(tab, text):
    tab.wait_for_function("wanted => document.getElementById('count').textContent === wanted", arg=text)


def test_a_run_opens_on_its_totals_and_curves(open_page):
    tab = open_page()
    table = tab.get_by_role("table", name="Iterations").inner_text()
    assert [line.split()[:3] for line in table.splitlines()[2:]][1:] == [["1", "12", "33.3"], ["2", "12", "33.3"]]
    chart = tab.get_by_role("img", name="pass@1, held out: from 25.0 % to 75.0 %")
    assert chart.locator("circle").count() == 3 and chart.locator("line.error").count() == 3
    policies = tab.get_by_role("table", name="By policy, means").inner_text().splitlines()
    assert [line.split("\t")[:3] for line in policies if line.startswith("eval")] == [
        ["eval start greedy", "3", "0.0"], ["eval 1 greedy", "3", "66.7"], ["eval 2 greedy", "3", "66.7"],
    ]  # fmt: skip
    tab.get_by_role("link", name="dropped: duplicate").click()
    wait_for_count(tab, "8 of 33")


def test_the_table_filters_by_fields_and_lists(open_page):
    tab = open_page("#trajectories")
    wait_for_count(tab, "33")
    tab.get_by_label("Search and filter").fill("verdict:incorrect iteration:1 set:rollout calls>0")
    wait_for_count(tab, "5 of 33")
    assert {(iteration, verdict) for _, iteration, verdict in places(tab)} == {("1", "incorrect")}
    tab.get_by_label("fate").select_option("dropped: duplicate")
    wait_for_count(tab, "2 of 33")
    assert tab.get_by_label("Search and filter").input_value().endswith('fate:"dropped: duplicate"')
    assert "fate" in tab.evaluate("decodeURIComponent(location.hash)")


def test_words_are_searched_for_in_all_that_was_said(open_page):
    tab = open_page("#trajectories")
    tab.get_by_label("Search and filter").fill('"compute(1, true)"')
    wait_for_count(tab, "6 of 33")  # two samples in each iteration and two evaluations
    tab.get_by_label("Search and filter").fill("nowhere to be found")
    wait_for_count(tab, "0 of 33")


def test_the_table_sorts_by_a_column_up_down_and_not(open_page):
    tab = open_page("#trajectories")
    header = tab.get_by_role("columnheader", name="tokens")
    for order, check in (("ascending", sorted), ("descending", lambda found: sorted(found, reverse=True))):
        header.get_by_role("button").click()
        tab.wait_for_selector(f'table:has(th.c-tokens[aria-sort="{order}"]) td.c-tokens')
        found = [int(text) for text in tab.locator("td.c-tokens").all_inner_texts()]
        assert found == check(found) and len(set(found)) > 1
    header.get_by_role("button").click()
    tab.wait_for_selector("table:has(th.c-tokens:not([aria-sort])) td.c-tokens")
    assert places(tab)[0][0] == "0·0"


def test_a_trajectory_opens_with_its_messages_told_apart(open_page):
    tab = open_page("#trajectories")
    tab.get_by_role("row").filter(has_text="0·2").first.click()
    article = tab.get_by_role("article", name="Trajectory 0·2")
    assert article.locator("figure.code pre").inner_text() == "compute(0, False)"
    assert article.locator("figure.code figcaption").inner_text() == "python"
    assert article.locator("figure.output.failed figcaption").inner_text() == "output, error"
    assert article.locator(".who").all_inner_texts() == ["user", "assistant 1", "user", "assistant 2"]
    assert "So the answer is \\boxed{1}." in article.locator("p.text").last.inner_text()
    turns = article.get_by_role("table", name="Turns")
    assert "250 ms" in turns.inner_text() and turns.get_by_role("row").count() == 3
    facts = article.locator(".facts").inner_text().split("\n")
    assert facts[facts.index("answer") + 1] == "1" and "judge" in facts


def test_the_address_leads_back_to_what_is_open(open_page):
    tab = open_page("#trajectories")
    tab.get_by_role("row").filter(has_text="1·2").first.click()
    tab.get_by_role("button", name="Tokens").click()
    tab.get_by_label("coloured by").select_option("logps")
    tab.wait_for_selector(".tokens .s3")
    address = tab.evaluate("location.hash")
    again = open_page(address)
    assert again.get_by_role("article", name="Trajectory 1·2").is_visible()
    assert again.get_by_label("coloured by").input_value() == "logps"
    assert again.locator("tr[aria-current=true] td.c-place").inner_text() == "1·2"


def test_tokens_show_what_trained_and_their_numbers_on_hover(open_page):
    tab = open_page(f"#trajectories?open={quote('0/current/0/2', safe='')}&view=tokens")
    assert tab.locator(".tokens .trained").first.inner_text() == "L"
    assert "".join(tab.locator(".tokens .trained").all_inner_texts()).startswith("Let the machine do it.↵\n```python")
    tab.get_by_label("coloured by").select_option("logps")
    token = tab.locator(".tokens .t").filter(has_text=re.compile("^ the$")).last
    token.hover()
    hint = tab.get_by_role("tooltip").inner_text()
    number = re.search(r"id (\d+)", hint)[1]
    assert '" the"' in hint and "turn" in hint and f"-{int(number) % 10 / 10:.4f}" in hint
    tab.mouse.move(0, 0)
    assert tab.get_by_role("tooltip").count() == 0


def test_arrow_keys_move_from_token_to_token(open_page):
    tab = open_page(f"#trajectories?open={quote('0/current/0/2', safe='')}&view=tokens&layer=logps")
    tab.get_by_role("group", name="Tokens;").focus()
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    assert tab.locator(".tokens .t.here").get_attribute("data-k").startswith("-")  # in the prompt
    assert "prompt position 2" in tab.get_by_role("tooltip").inner_text()
    assert "prompt position 2" in tab.locator("#status").inner_text()


def test_layers_that_are_there_can_be_chosen_and_others_say_what_they_take(open_page):
    tab = open_page(f"#trajectories?open={quote('0/current/0/0', safe='')}&view=tokens", "unpaired")
    options = {
        option.get_attribute("value"): option for option in tab.get_by_label("coloured by").locator("option").all()
    }
    disabled = {name for name, option in options.items() if option.is_disabled()}
    assert disabled == {"policy_logps", "values", "ratio", "moved"}
    assert "--value_model computes it" in options["values"].inner_text()
    tab.get_by_label("coloured by").select_option("mismatch")
    tab.locator(".tokens .p7").first.hover()
    hint = tab.get_by_role("tooltip").inner_text()
    assert "log π sampler / trainer\t+0.2500" in hint and "log π_ref" in hint
    assert "Σ log π sampler / π_ref" in tab.get_by_role("table", name="Turns").inner_text()


def test_a_pair_stands_side_by_side_from_its_first_difference_on(open_page):
    tab = open_page("#pairs")
    tab.get_by_role("row").nth(1).click()
    chosen, rejected = tab.get_by_role("region", name="chosen"), tab.get_by_role("region", name="rejected")
    assert chosen.locator(".verdict").inner_text() == "correct" and "-1.50" in chosen.locator(".facts").inner_text()
    assert (
        rejected.locator(".verdict").inner_text() == "incorrect" and "-2.50" in rejected.locator(".facts").inner_text()
    )
    for side in (chosen, rejected):
        assert side.locator("mark").count() > 0
        assert side.locator("summary").all_inner_texts() == ["shared, 1 message"]
    chosen.locator("summary").click()
    chosen.locator("details").get_by_text("This is question").wait_for()  # made when it is opened
    tab.get_by_role("button", name="Tokens").click()
    tab.wait_for_selector(".tokens")
    marked = [side.locator(".tokens .different") for side in (chosen, rejected)]
    assert [m.count() for m in marked] == [1, 1] and marked[0].inner_text() != marked[1].inner_text()
    for side in (chosen, rejected):
        assert side.locator("summary").all_inner_texts() == ["prompt, 124 tokens"]


BEFORE_DIFFERENCE = """side => {
    const tokens = [...side.querySelectorAll(".tokens .t")];
    const first = tokens.findIndex((token) => token.classList.contains("different"));
    return tokens.slice(0, first).map((token) => token.dataset.id).join(" ");
}"""


def test_the_first_token_in_which_two_trajectories_differ_is_marked(open_page):
    left, right = quote("0/current/0/0", safe=""), quote("0/current/0/2", safe="")
    tab = open_page(f"#pairs?left={left}&right={right}&view=tokens")
    sides = [tab.get_by_role("region", name=name) for name in ("left", "right")]
    assert [side.locator(".different").inner_text() for side in sides] == ["T", "F"]  # of True and False
    before = [side.evaluate(BEFORE_DIFFERENCE) for side in sides]
    assert before[0] == before[1] != ""


def test_what_two_trajectories_share_is_folded(open_page):
    """Two samples of one prompt whose first turns are the same: the evaluation repeats sample 0 of the rollouts."""
    left, right = quote("1/current/0/0", safe=""), quote("evaluation/2/greedy/0/0", safe="")
    tab = open_page(f"#pairs?left={left}&right={right}")
    sides = tab.get_by_role("region", name=re.compile("left|right"))
    assert sides.locator("summary").all_inner_texts() == ["shared, 4 messages"] * 2
    assert sides.locator("mark").count() == 0


def test_a_prompt_is_followed_through_iterations_and_evaluations(open_page):
    tab = open_page("#prompts")
    columns = [text.strip() for text in tab.locator("thead th").all_inner_texts()]
    assert columns == ["prompt", "text", "all", "eval start", "eval 1", "eval 2", "1", "2"]
    cells = tab.get_by_role("row").nth(1).locator("td").all_inner_texts()
    assert cells[2:] == ["11", "0/1", "1/1", "1/1", "2/4", "2/4"]
    tab.get_by_role("row").nth(1).click()
    table = tab.get_by_role("table", name="Its trajectories")
    table.wait_for()
    assert table.get_by_role("row").count() == 6 and table.locator(".square.correct").count() == 6
    tab.get_by_role("button", name="Compare").click()
    tab.wait_for_selector("article.pair")
    assert tab.locator("article.pair .verdict").all_inner_texts() == ["correct", "incorrect"]


def test_hostile_text_is_shown_and_does_nothing(open_page):
    for view_name in ("", "&view=tokens&layer=logps"):
        tab = open_page(f"#trajectories?open={quote('0/current/0/3', safe='')}{view_name}")
        article = tab.get_by_role("article")
        assert article.locator("img, script, b, svg").count() == 0
        text = article.inner_text().replace("↵", "").replace("‥", "")
        assert "<script>window.hacked=1</script></script><b>bold</b> &amp; " in text
        assert "\\x1b[31mred\\x1b[0m" in text and "\\u202edesrever\\u202c" in text
        assert "zero\\u200bwidth" in text and "{{title}}" in text
        assert not re.search("[\x1b\u202a-\u202e\u200b]", tab.locator("body").inner_text())
    assert "café" in text  # a character of two tokens
    assert "<img src=x" in tab.get_by_role("heading", level=1).inner_text()


def test_data_may_be_named_as_what_every_object_has(tab, tmp_path):
    row = {
        "prompt": "constructor",
        "completion": "__proto__",
        "label": True,
        "info": {"tool_statuses": ["constructor"]},
    }
    row |= {"prompt_ids": [1], "completion_ids": [2], "action_mask": [1]}
    tab.goto(view([row], title="toString").save(tmp_path / "odd.html").as_uri())
    tab.get_by_label("Search and filter").fill("constructor:1 __proto__ status:constructor")
    wait_for_count(tab, "0 of 1")
    tab.get_by_label("Search and filter").fill("__proto__ status:constructor")
    wait_for_count(tab, "1")
    tab.get_by_role("row").nth(1).click()
    tab.get_by_role("button", name="Tokens").click()
    assert tab.locator(".tokens .trained").inner_text() == "⟨2⟩"


def test_no_script_runs_but_the_pages_own(chromium, pages):
    """What a hole in the escaping could do: nothing, by the page's own policy."""
    tab = chromium.new_page()
    refused = []
    tab.on("console", lambda message: refused.append(message.text))
    tab.goto((pages / "run.html").as_uri())
    tab.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
            const image = document.createElement("img");
            image.setAttribute("onerror", "window.hacked = 1");
            image.src = "nowhere.png";
            document.body.append(image);
        }"""
    )
    tab.wait_for_timeout(100)
    assert tab.evaluate("window.hacked") is None and any("Content Security Policy" in text for text in refused)
    tab.close()


def test_the_keyboard_goes_everywhere(open_page):
    tab = open_page("#trajectories")
    for key in "jj":
        tab.keyboard.press(key)
    assert tab.locator("tr[aria-current=true] td.c-place").inner_text() == "0·1"
    tab.keyboard.press("Enter")
    tab.get_by_role("article", name="Trajectory 0·1").wait_for()
    tab.keyboard.press("j")
    tab.get_by_role("article", name="Trajectory 0·2").wait_for()
    tab.keyboard.press("t")
    tab.wait_for_selector(".tokens .trained")
    tab.keyboard.press("l")
    tab.wait_for_selector(".tokens .s3")
    tab.keyboard.press("Escape")
    tab.wait_for_selector(".detail[hidden]", state="attached")
    tab.keyboard.press("/")
    tab.keyboard.type("reward>0")
    wait_for_count(tab, "12 of 33")
    tab.keyboard.press("Escape")
    tab.keyboard.press("?")
    assert tab.get_by_role("dialog").is_visible()
    tab.keyboard.press("Escape")
    tab.keyboard.press("3")
    tab.wait_for_selector(".page.pairs")


def test_only_the_rows_in_sight_are_elements(chromium, tmp_path):
    rows = [{"prompt": f"Question {i}", "completion": f"Answer {i}", "label": bool(i % 2)} for i in range(3000)]
    page = view(rows).save(tmp_path / "rows.html")
    tab = chromium.new_page()
    tab.goto(page.as_uri())
    table = tab.get_by_role("table", name="Trajectories")
    table.wait_for()
    assert table.get_attribute("aria-rowcount") == "3001" and tab.locator("tbody tr").count() < 120
    tab.locator(".scroll").first.evaluate("element => { element.scrollTop = element.scrollHeight; }")
    tab.wait_for_selector('tr[aria-rowindex="3001"]')
    assert "Question 2999" in tab.locator("tbody tr").nth(-2).inner_text() and tab.locator("tbody tr").count() < 120
    tab.close()


def test_it_works_as_a_cell_of_a_notebook(tab, pages):
    tab.goto((pages / "notebook.html").as_uri())
    frame = tab.frame_locator("iframe")
    frame.get_by_role("link", name="Trajectories").click()
    frame.get_by_role("row").filter(has_text="0·2").first.click()
    frame.get_by_role("article", name="Trajectory 0·2").wait_for()
    frame.get_by_role("button", name="Tokens").click()
    frame.locator(".tokens .trained").first.wait_for()
    frame.get_by_role("link", name="same prompt").click()
    frame.get_by_role("article", name="Prompt").wait_for()


PLACES = {
    "overview": "#overview",
    "table": "#trajectories",
    "messages": f"#trajectories?open={quote('0/current/0/3', safe='')}",
    "tokens": f"#trajectories?open={quote('0/current/0/2', safe='')}&view=tokens&layer=logps",
    "pair": f"#pairs?left={quote('0/current/0/0', safe='')}&right={quote('0/current/0/2', safe='')}&view=tokens",
    "prompt": f"#prompts?open={quote('0/current/0/0', safe='')}",
}


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "rules"), [("light", None), ("dark", {"runOnly": ["color-contrast"]})])
def test_everyone_can_read_it(open_page, scheme, rules):
    """axe-core's rules, contrast among them; with `SCREENSHOTS=folder` also something to look at."""
    axe = needs("axe_playwright_python.sync_playwright").Axe()
    for name, address in PLACES.items():
        tab = open_page(address)
        tab.emulate_media(color_scheme=scheme)
        found = axe.run(tab, options=rules).response["violations"]
        assert [(name, each["id"], node["html"][:120]) for each in found for node in each["nodes"]] == []
        if folder := os.environ.get("SCREENSHOTS"):
            tab.screenshot(path=f"{folder}/{name}-{scheme}.png")
