"""How fast the studio's page answers: a vote to the next pair, a page of a thousand rows, eight annotators at once.

    python benchmarks/studio_page.py                 # prints
    python benchmarks/studio_page.py --save cpu      # and writes benchmarks/results/studio_cpu.json

The studio runs in a process of its own on the embedded base; a headless chromium does what a person would. Times are
from the click to the changed page, in the page. Run it on a machine with nothing else to do.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lowrank_align.store import Completion, Judgement, Record, Store
from lowrank_align.studio.examples import example_prompts
from lowrank_align.tiny import tiny_path

ROWS, ANNOTATORS, VOTES_EACH, DECISIONS, PAGES = 1000, 8, 100, 40, 10
READING_MS = 1200  # between two votes: the next pair is drawn meanwhile
TARGET_MS = 150
RESULTS = Path(__file__).parent / "results"

# Click, and wait until what the fields say has changed; milliseconds.
CHANGE = """async ([button, fields]) => {
  const now = () => fields.map((id) => {
    const found = document.querySelector(`#${id}`);
    return found.querySelector("textarea, input[type=text]")?.value ?? found.innerText;
  }).join("|");
  const before = now(), began = performance.now();
  document.querySelector(`#${button}`).click();
  while (now() === before && performance.now() - began < 10000) await new Promise((go) => setTimeout(go, 1));
  return performance.now() - began;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/studio_NAME.json")
    arguments = parser.parse_args()
    tiny_path()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder / "studio.db")
        found = {"eight annotators": annotators_at_once(folder / "votes.db"), **on_the_page(folder)}
    for what, figures in found.items():
        print(f"{what}: " + ", ".join(f"{name} {value}" for name, value in figures.items()))
    if arguments.save:
        about = {
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, no GPU",
            "date": date.today().isoformat(),
            "versions": {name: version(name) for name in ("gradio", "torch", "transformers")},
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"studio_{arguments.save}.json").write_text(json.dumps(about | found, indent=2) + "\n")


def fill(path: Path) -> None:
    """A store with a thousand judged pairs by somebody else, and a queue."""
    with Store(path) as store:
        store.enqueue(example_prompts("tiny"), "examples")
        with store.batch():
            for i in range(ROWS):
                answers = (Completion(f"an answer {i} " * 20, source="base"), Completion(f"another {i}", source="dpo"))
                record = Record("pair", f"prompt {i}", answers, shown=(0, 1))
                store.add(record)
                store.judge(record.id, "before", Judgement("preferred", ranks=(1.0, 2.0)))


def annotators_at_once(path: Path) -> dict[str, Any]:
    """Eight threads vote as fast as they can; every vote is on the disk before the next one."""
    with Store(path) as store:
        waits: list[float] = []

        def vote(name: str) -> None:
            for i in range(VOTES_EACH):
                record = Record("pair", f"{name} {i}", (Completion("a"), Completion("b")))
                began = time.perf_counter()
                with store.batch():
                    store.add(record)
                    store.judge(record.id, name, Judgement("preferred", ranks=(1.0, 2.0)))
                waits.append(1000 * (time.perf_counter() - began))

        began = time.perf_counter()
        threads = [threading.Thread(target=vote, args=[f"annotator {k}"]) for k in range(ANNOTATORS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
        kept = store.count()
    return {
        "votes": ANNOTATORS * VOTES_EACH,
        "kept": kept,
        "votes_per_second": round(ANNOTATORS * VOTES_EACH / seconds),
        **spread(waits),
    }


def on_the_page(folder: Path) -> dict[str, dict[str, Any]]:
    from playwright.sync_api import sync_playwright

    browser_path = next(path for name in ("chromium", "google-chrome") if (path := shutil.which(name)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lowrank_align", "studio", "--preset", "tiny", "--no-browser"]
    log = (folder / "output.txt").open("w+")
    studio = subprocess.Popen([*command, "--port", str(port), "--max-new-tokens", "48"], cwd=folder, stdout=log)
    try:
        while "open http" not in (folder / "output.txt").read_text():
            if studio.poll() is not None:
                sys.exit("the studio did not start")
            time.sleep(0.2)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_selector("#collect-prompt textarea")
            page.wait_for_timeout(3000)
            votes = []
            for k in range(DECISIONS):
                page.wait_for_timeout(READING_MS)
                fields = ["collect-prompt", "collect-answer-a", "collect-answer-b"]
                votes.append(page.evaluate(CHANGE, ["vote-a" if k % 2 else "vote-b", fields]))
            page.click("#tab-data-button")
            page.wait_for_selector("#data-after", state="visible")
            page.wait_for_timeout(2000)
            pages = []
            for _ in range(PAGES):
                page.wait_for_timeout(500)
                pages.append(page.evaluate(CHANGE, ["data-after", ["data-table"]]))
            browser.close()
    finally:
        studio.terminate()
        studio.wait(30)
    within = sum(ms <= TARGET_MS for ms in votes) / len(votes)
    return {
        "vote to next pair": {**spread(votes), f"within_{TARGET_MS}_ms": round(within, 2)},
        f"a page of {ROWS} rows": spread(pages),
    }


def spread(milliseconds: list[float]) -> dict[str, Any]:
    ordered = sorted(milliseconds)
    return {
        "median_ms": round(statistics.median(ordered)),
        "p90_ms": round(ordered[int(0.9 * (len(ordered) - 1))]),
        "max_ms": round(ordered[-1]),
    }


if __name__ == "__main__":
    main()
