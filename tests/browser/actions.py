"""What a person does on the page, by element ids; each waits until the page has answered."""

from typing import Any


def text(page: Any, element: str) -> str:
    """What stands in a field."""
    return str(page.locator(f"#{element} textarea, #{element} input").first.input_value())


def wait_for_pair(page: Any, other_than: str = "") -> str:
    """Until both answers are whole; the prompt and the answers as one text."""
    page.wait_for_function(
        """(before) => {
            const of = (id) => document.querySelector(`#${id} :is(textarea, input)`)?.value ?? "";
            const now = ["collect-prompt", "collect-answer-a", "collect-answer-b"].map(of);
            const whole = ["a", "b"].every((side) => !of(`collect-state-${side}`).includes("..."));
            return whole && now.every(Boolean) && now.join("|") !== before;
        }""",
        arg=other_than,
    )
    return shown_pair(page)


def shown_pair(page: Any) -> str:
    return "|".join(text(page, name) for name in ("collect-prompt", "collect-answer-a", "collect-answer-b"))


def show(page: Any, tab: str) -> None:
    """Open a tab with the mouse."""
    page.click(f"#tab-{tab}-button")
    page.wait_for_selector(f"#tab-{tab}", state="visible")


def choose(page: Any, element: str, option: str) -> None:
    """Choose from a dropdown."""
    field = page.locator(f"#{element} input").first
    field.click()
    page.locator(f"#{element} [role=option], ul[role=listbox] [role=option]").filter(has_text=option).first.click()


def fill(page: Any, element: str, value: str) -> None:
    """Write into a field, as if typed, and leave it."""
    field = page.locator(f"#{element} textarea, #{element} input").first
    field.fill(value)
    field.blur()


def wait_for_text(page: Any, element: str, part: str, timeout_seconds: float = 60) -> str:
    """Until a field or an element says so; what it says then."""
    page.wait_for_function(
        """([id, part]) => {
            const found = document.getElementById(id);
            const field = found && found.querySelector("textarea, input");
            return found && ((field ? field.value : "") + found.innerText).includes(part);
        }""",
        arg=[element, part],
        timeout=timeout_seconds * 1000,
    )
    found = page.locator(f"#{element}")
    field = found.locator("textarea, input")
    return str(field.first.input_value() if field.count() else found.inner_text())


def tab_to(page: Any, element: str, most: int = 150) -> None:
    """Press Tab until the focus is in an element."""
    for _ in range(most):
        if page.evaluate("(id) => document.activeElement.closest(`#${id}`) !== null", element):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{element} is not reached with {most} times Tab")
