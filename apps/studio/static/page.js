// Keys click what a mouse would click; what they do stands in one place, the page's handlers.
(() => {
  const TABS = ["collect", "chat", "train", "arena", "data"];
  const KEYS = {
    collect: { a: "vote-a", b: "vote-b", t: "vote-tie", x: "vote-bad", s: "vote-skip", u: "vote-undo", g: "collect-generate" },
    arena: { a: "arena-vote-a", b: "arena-vote-b", t: "arena-vote-tie", x: "arena-vote-bad", s: "arena-skip", u: "arena-undo", g: "arena-start" },
  };
  const at = (id) => document.getElementById(id);
  const visible = (element) => element && element.offsetParent !== null;
  let pointed = "a"; // the answer under the pointer, or the one last focused

  const shownTab = () => TABS.find((name) => visible(at(`tab-${name}`)));
  const writing = (element) =>
    element && (element.isContentEditable ||
      (/^(INPUT|TEXTAREA|SELECT)$/.test(element.tagName) && !element.disabled && !element.readOnly &&
        !/^(radio|checkbox|button)$/.test(element.type)));
  const press = (id) => {
    const found = at(id);
    const button = found && (found.tagName === "BUTTON" ? found : found.querySelector("button"));
    if (visible(button) && !button.disabled) button.click();
    return visible(button);
  };
  const focusOn = (id) => {
    const field = document.querySelector(`#${id} textarea, #${id} input`);
    if (visible(field)) field.focus();
    return visible(field);
  };
  const pointAt = (event) => {
    const column = event.target.closest && event.target.closest("[id^='collect-column-']");
    if (column) pointed = column.id.slice("collect-column-".length);
  };
  // A field that begins with an answer's text is entered when the text is there: what is typed must not be overwritten.
  const whenWritable = (id, filled, tries = 40) => {
    const field = document.querySelector(`#${id} textarea`);
    if (field && !field.disabled && visible(field) && (!filled || field.value)) { field.focus(); return; }
    if (tries) setTimeout(() => whenWritable(id, filled, tries - 1), 50);
  };

  const digit = (key) => {
    if (visible(at("collect-rank-row"))) {
      const field = document.querySelector("#collect-ranks textarea, #collect-ranks input");
      if (!field || field.value.includes(key)) return false;
      window.lowrankSetText(field, (field.value + " " + key).trim());
      return true;
    }
    const choice = document.querySelectorAll("#collect-strength input")[Number(key) - 1];
    if (visible(choice && choice.parentElement)) { choice.click(); return true; }
    return false;
  };

  const collectKey = (key) => {
    if (key === "e") {
      const done = press(`collect-edit-${pointed}`);
      const held = visible(at("collect-written-row"));
      if (done) whenWritable(held ? "collect-written" : `collect-answer-${pointed}`, held);
      return done;
    }
    if (key === "r") return focusOn("collect-reason");
    if (key === "p") return focusOn("collect-prompt");
    if (/^[1-6]$/.test(key)) return digit(key);
    if (key === "enter" && visible(at("collect-rank-row"))) return press("vote-rank");
    return false;
  };

  const onKey = (event) => {
    if (event.isComposing || event.repeat) return;
    const dialog = at("keys-dialog");
    if (event.key === "Escape" && writing(document.activeElement)) { document.activeElement.blur(); return; }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && document.activeElement.closest("#collect-written")) {
      event.preventDefault();
      document.activeElement.dispatchEvent(new Event("change", { bubbles: true }));
      setTimeout(() => press("collect-write"), 60);
      return;
    }
    if (event.altKey && /^[1-5]$/.test(event.key)) { event.preventDefault(); press(`tab-${TABS[event.key - 1]}-button`); return; }
    if (event.ctrlKey || event.metaKey || event.altKey || writing(document.activeElement)) return;
    if (dialog && dialog.open) { if (event.key === "?" || event.key === "Escape") dialog.close(); return; }
    const key = event.key.toLowerCase();
    if (event.key === "?") { dialog.showModal(); event.preventDefault(); return; }
    const tab = shownTab();
    const id = (KEYS[tab] || {})[key];
    if (id ? press(id) : tab === "collect" && collectKey(key)) event.preventDefault();
  };

  const setTheme = (dark) => {
    document.body.classList.toggle("dark", dark);
    try { localStorage.setItem("lowrank-theme", dark ? "dark" : "light"); } catch (error) { /* private window */ }
  };

  // Gradio's fields listen to input events; setting the value alone would go unseen.
  window.lowrankSetText = (field, text) => {
    const kind = field.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
    Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(field, text);
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };

  document.addEventListener("keydown", onKey, true);
  document.addEventListener("pointerover", pointAt, true);
  document.addEventListener("focusin", pointAt, true);
  document.addEventListener("click", (event) => {
    if (event.target.id === "keys-button") at("keys-dialog").showModal();
    if (event.target.id === "theme-button") setTheme(!document.body.classList.contains("dark"));
    if (event.target.id === "keys-dialog") event.target.close();
  });
  document.addEventListener("DOMContentLoaded", () => {
    let kept = null;
    try { kept = localStorage.getItem("lowrank-theme"); } catch (error) { /* private window */ }
    if (kept) setTimeout(() => setTheme(kept === "dark"), 0);
  });
})();
