"""A full round as a user does it: collect, train, chat, battle, export; by mouse, and by keys alone."""

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.store import Store
from lowrank_align.studio.examples import example_prompts
from tests.browser.actions import choose, fill, show, shown_pair, tab_to, text, wait_for_pair, wait_for_text

VOTES = 12


@pytest.fixture(scope="module")
def studio(start_studio: Any) -> Any:
    return start_studio("--max-new-tokens", "40")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: `LOWRANK_SCREENSHOTS`, as `make screenshots` sets it, else a scratch folder."""
    folder = os.environ.get("LOWRANK_SCREENSHOTS")
    found = Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
    found.mkdir(parents=True, exist_ok=True)
    return found


def take_pictures(page: Any, folder: Path, name: str) -> None:
    """Light, dark, and the width of a phone."""
    for theme in ("light", "dark"):
        dark = page.evaluate("document.body.classList.contains('dark')")
        if dark != (theme == "dark"):
            page.click("#theme-button")
        page.evaluate("window.scrollTo(0, 0)")
        page.mouse.move(5, 5)
        page.screenshot(path=folder / f"{name}-{theme}.png", animations="disabled")
    page.click("#theme-button")
    page.set_viewport_size({"width": 390, "height": 844})
    page.screenshot(path=folder / f"{name}-phone.png", animations="disabled")
    page.set_viewport_size({"width": 1280, "height": 800})


def test_by_mouse(studio: Any, open_page: Any, pictures: Path) -> None:
    page = open_page(studio.address)
    page.click("#collect-queue-panel > button, #collect-queue-panel .label-wrap")
    page.click("#collect-examples")
    before = wait_for_pair(page)

    # a vote that the store refuses: why is told, and the pair stays
    with closing(sqlite3.connect(studio.folder / "studio.db", isolation_level=None)) as other:
        other.execute("CREATE TRIGGER refuse BEFORE INSERT ON records BEGIN SELECT RAISE(ABORT, 'no'); END")
        page.click("#vote-a")
        wait_for_text(page, "collect-message", "Nothing that was kept is lost")
        other.execute("DROP TRIGGER refuse")
    assert shown_pair(page) == before

    # a vote with strength and reason, taken back as it was, and given again
    page.locator("#collect-strength label").nth(1).click()
    fill(page, "collect-reason", "warmer")
    page.click("#vote-a")
    second = wait_for_pair(page, before)
    page.click("#vote-undo")
    assert wait_for_pair(page, second) == before
    assert text(page, "collect-reason") == "warmer"
    assert page.locator("#collect-strength input").nth(1).is_checked()
    page.click("#vote-a")
    assert wait_for_pair(page, before) == second

    # a mended answer
    page.click("#collect-edit-b")
    page.wait_for_selector("#collect-answer-b textarea:not([disabled])")
    page.locator("#collect-answer-b textarea").fill("simply wonderful. I would gladly see it again.")
    edited = shown_pair(page)
    page.click("#vote-b")
    shown = wait_for_pair(page, edited)

    # both bad: the pair stays, a better answer is written
    page.click("#vote-bad")
    wait_for_text(page, "collect-message", "Both bad")
    assert shown_pair(page) == shown
    page.locator("#collect-written textarea").fill("a delight from the first minute to the last.")
    page.click("#collect-write")
    shown = wait_for_pair(page, shown)

    # a reload in the middle shows the same pair
    page.reload()
    page.wait_for_selector("#collect-prompt textarea")
    assert wait_for_pair(page) == shown

    # a second tab decides, and the first one shows the next pair by itself
    other = open_page(studio.address)
    assert wait_for_pair(other) == shown
    other.click("#vote-tie")
    after = wait_for_pair(other, shown)
    assert wait_for_pair(page, shown) == after
    other.close()

    shown = after
    for number in range(VOTES - 3):  # one of them is an old pair once more, which does not count
        page.click("#vote-a" if number % 2 else "#vote-b")
        shown = wait_for_pair(page, shown)
    wait_for_text(page, "collect-count", "12 pairs")
    take_pictures(page, pictures, "collect")

    # train DPO on them, and see the curve
    show(page, "train")
    fill(page, "train-max_steps", "4")
    plan = wait_for_text(page, "train-plan", "4 steps")
    assert "14 pairs; 4 steps" in plan
    page.click("#train-start")
    wait_for_text(page, "train-status", "finished", 120)
    page.wait_for_selector("#train-plot canvas, #train-plot svg")
    take_pictures(page, pictures, "train")

    # chat with the new adapter
    page.click("#train-chat")
    page.wait_for_selector("#chat-input textarea", state="visible")
    wait_for_text(page, "chat-adapter", "dpo-1")
    page.locator("#chat-input textarea").fill("How was the film?")
    page.keyboard.press("Enter")
    assert "dpo-1" in wait_for_text(page, "chat-standing", "a second")
    take_pictures(page, pictures, "chat")

    # battle it against the base
    show(page, "train")
    page.click("#train-compare")
    page.wait_for_selector("#arena-players :text('dpo-1')")  # both are chosen, and the first battle is on its way
    page.click("#arena-start")
    for _ in range(4):
        prompt = wait_for_battle(page)
        page.click("#arena-vote-a")
        page.wait_for_function(
            "(before) => document.querySelector('#arena-answer-a textarea').value !== before", arg=prompt
        )
    wait_for_text(page, "arena-summary", "%")
    assert "dpo-1" in page.locator("#arena-table").inner_text()
    take_pictures(page, pictures, "arena")

    # export: rows that the trainers take
    show(page, "data")
    page.wait_for_selector("#data-table", state="visible")
    rows = export(page, studio.folder / "exported.jsonl")
    assert sum("simply wonderful" in str(row["chosen"]) for row in rows) >= 1
    assert sum("a delight from" in str(row["chosen"]) for row in rows) == 2  # over both answers
    assert sum(row.get("preference") == 0.5 for row in rows) == 1
    take_pictures(page, pictures, "data")

    from lowrank_align.data.formats import Shape
    from lowrank_align.data.load import load_rows

    assert len(load_rows(studio.folder / "exported.jsonl", expect={Shape.pair}).rows) == len(rows)


def wait_for_battle(page: Any) -> str:
    """Until both players have said theirs; the left answer."""
    page.wait_for_function(
        """() => {
            const of = (id) => document.querySelector(`#${id} :is(textarea, input)`)?.value ?? "";
            return ["a", "b"].every((s) => of(`arena-answer-${s}`) && !of(`arena-state-${s}`).includes("..."));
        }"""
    )
    return text(page, "arena-answer-a")


def export(page: Any, file: Path) -> list[Any]:
    with page.expect_download() as download:
        page.click("#data-export")
    download.value.save_as(file)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_by_keys_alone(studio: Any, open_page: Any) -> None:
    """Another annotator, so that the queue begins anew. Nothing is clicked but what the keyboard reaches."""
    with Store(studio.folder / "studio.db") as store:  # another process beside the studio's
        store.enqueue(example_prompts("tiny"), "examples")
    page = open_page(studio.address)
    page.focus("#annotator textarea, #annotator input")
    page.keyboard.press("Control+A")
    page.keyboard.type("keys")
    page.keyboard.press("Escape")
    wait_for_text(page, "collect-queue", "60 in queue")
    shown = wait_for_pair(page)
    for key in ("a", "b", "t", "s"):
        page.keyboard.press(key)
        shown = wait_for_pair(page, shown)
    wait_for_text(page, "collect-count", "3 pairs")
    page.keyboard.press("u")
    wait_for_text(page, "collect-queue", "57 in queue")
    shown = wait_for_pair(page, shown)

    page.keyboard.press("3")  # by far, then a mended answer
    page.hover("#collect-answer-a")
    page.keyboard.press("e")
    page.wait_for_function("document.activeElement.closest('#collect-answer-a') !== null")
    page.keyboard.press("Control+A")
    page.keyboard.type("lovely, and I would see it again.")
    page.keyboard.press("Escape")
    edited = shown_pair(page)
    page.keyboard.press("a")
    shown = wait_for_pair(page, edited)

    page.keyboard.press("x")  # both bad: E begins the better answer with the one under the pointer
    wait_for_text(page, "collect-message", "Both bad")
    page.keyboard.press("e")
    page.wait_for_function("document.activeElement.closest('#collect-written') !== null")
    page.keyboard.press("Control+A")
    page.keyboard.type("the best of all.")
    page.keyboard.press("Control+Enter")
    shown = wait_for_pair(page, shown)
    page.keyboard.press("g")  # the same prompt once more
    prompt = text(page, "collect-prompt")
    wait_for_pair(page, shown)
    assert text(page, "collect-prompt") == prompt

    page.keyboard.press("?")
    page.wait_for_selector("#keys-dialog[open]")
    page.keyboard.press("Escape")

    # train, chat, battle and export, reaching every field and button with Tab
    page.keyboard.press("Alt+3")
    page.wait_for_selector("#train-start", state="visible")
    wait_for_text(page, "train-plan", "pairs;")
    tab_to(page, "train-max_steps")
    page.keyboard.press("Control+A")
    page.keyboard.type("4")
    tab_to(page, "train-start")
    wait_for_text(page, "train-plan", "4 steps")
    page.keyboard.press("Enter")
    page.wait_for_selector("#train-compare", state="hidden")
    wait_for_text(page, "train-status", "finished", 120)
    tab_to(page, "train-chat")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chat-input textarea", state="visible")
    tab_to(page, "chat-input")
    page.keyboard.type("How was the film?")
    page.keyboard.press("Enter")
    assert "dpo" in wait_for_text(page, "chat-standing", "a second")
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+3")
    page.wait_for_selector("#train-compare", state="visible")
    tab_to(page, "train-compare")
    page.keyboard.press("Enter")
    page.wait_for_selector("#arena-vote-a", state="visible")
    for key in ("a", "b"):
        answer = wait_for_battle(page)
        page.keyboard.press(key)
        page.wait_for_function(
            "(before) => document.querySelector('#arena-answer-a textarea').value !== before", arg=answer
        )
    wait_for_text(page, "arena-summary", "of 2 ")
    page.keyboard.press("Alt+5")
    page.wait_for_selector("#data-table", state="visible")
    tab_to(page, "data-export")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert "the best of all." in Path(download.value.path()).read_text()


def test_a_prompt_of_ones_own_and_more_than_two_answers(studio: Any, open_page: Any) -> None:
    page = open_page(studio.address)
    wait_for_pair(page)
    shown = shown_pair(page)
    page.locator("#collect-prompt textarea").fill("How was the hotel?")
    page.keyboard.press("Enter")
    wait_for_pair(page, shown)
    assert text(page, "collect-prompt") == "How was the hotel?"
    page.click("#collect-sources-panel > button, #collect-sources-panel .label-wrap")
    page.locator("#collect-k input[type=number]").fill("3")
    page.locator("#collect-k input[type=number]").press("Tab")
    wait_for_text(page, "collect-message", "next pair")
    page.locator("#collect-prompt textarea").fill("How was the book?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#collect-answer-c textarea", state="visible")
    page.wait_for_function("!document.querySelector('#collect-state-c :is(textarea, input)').value.includes('...')")
    page.evaluate("document.activeElement.blur()")
    for key in ("2", "3", "1", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("#collect-rank-row", state="hidden")
    page.click("#collect-recent-panel > button, #collect-recent-panel .label-wrap")
    wait_for_text(page, "collect-recent", "ranked - How was the book?")
    choose(page, "collect-order", "as in the queue")
