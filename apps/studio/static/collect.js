// More than two answers are ordered by dragging their columns; the order is written into the field that is kept.
(() => {
  let dragged = null;
  const columns = () => [...document.querySelectorAll("#collect-answers .answer")].filter((c) => c.offsetParent !== null);
  const ranking = () => { const row = document.getElementById("collect-rank-row"); return row && row.offsetParent !== null; };
  const placed = () => columns().sort((x, y) => (Number(x.style.order) || 0) - (Number(y.style.order) || 0));

  document.addEventListener("pointerover", (event) => {
    const column = event.target.closest && event.target.closest("#collect-answers .answer");
    if (column) column.draggable = Boolean(ranking());
  });
  document.addEventListener("dragstart", (event) => {
    dragged = ranking() && event.target.closest ? event.target.closest("#collect-answers .answer") : null;
    if (dragged) dragged.classList.add("dragged");
  });
  document.addEventListener("dragover", (event) => { if (dragged) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    const onto = event.target.closest && event.target.closest("#collect-answers .answer");
    if (!dragged || !onto || onto === dragged) return;
    event.preventDefault();
    const order = placed();
    const from = order.indexOf(dragged), to = order.indexOf(onto);
    order.splice(to, 0, order.splice(from, 1)[0]);
    order.forEach((column, place) => { column.style.order = place + 1; });
    const field = document.querySelector("#collect-ranks textarea, #collect-ranks input");
    window.lowrankSetText(field, order.map((column) => "abcdef".indexOf(column.id.at(-1)) + 1).join(" "));
  });
  document.addEventListener("dragend", () => { if (dragged) dragged.classList.remove("dragged"); dragged = null; });
  // A new pair stands in its own order again: the field is empty then.
  setInterval(() => {
    const field = document.querySelector("#collect-ranks textarea, #collect-ranks input");
    if (field && !field.value && !dragged) columns().forEach((column) => { column.style.order = ""; });
  }, 300);
})();
