// Cards for the cells of lens and sweep tables, by mouse and by keyboard. Every cell says the same in its
// title, so the page loses nothing where scripts are off.
for (const table of document.querySelectorAll("table.lens")) {
  const cells = [...table.tBodies[0].rows].map((row) => [...row.querySelectorAll("td")]);
  const card = document.createElement("div");
  card.className = "card";
  card.setAttribute("aria-hidden", "true"); // aria-description says the same
  card.hidden = true;
  document.body.append(card);

  const show = (cell) => {
    const [heading, ...lines] = cell.dataset.note.split("\n");
    const p = document.createElement("p");
    p.textContent = heading;
    card.replaceChildren(p, ...lines.map((line) => {
      const cut = line.indexOf("  ");
      const div = document.createElement("div");
      const word = document.createElement("bdi");
      const share = document.createElement("span");
      share.textContent = line.slice(0, cut);
      word.textContent = line.slice(cut + 2);
      const percent = share.textContent.endsWith("%") ? share.textContent.replace(/[^\d.]/g, "") : 0;
      div.style.setProperty("--w", percent + "%");
      div.append(word, share);
      return div;
    }));
    card.hidden = false;
    const box = cell.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - card.offsetWidth - 8);
    const below = box.bottom + card.offsetHeight + 8 < innerHeight;
    card.style.left = Math.max(8, left) + scrollX + "px";
    card.style.top = (below ? box.bottom + 4 : box.top - card.offsetHeight - 4) + scrollY + "px";
  };
  const hide = () => { card.hidden = true; };

  for (const cell of cells.flat()) {
    cell.dataset.note = cell.title;
    cell.removeAttribute("title");
    cell.setAttribute("aria-description", cell.dataset.note.replaceAll("\n", "; "));
    cell.tabIndex = -1;
    cell.addEventListener("mouseenter", () => show(cell));
    cell.addEventListener("mouseleave", hide);
    cell.addEventListener("focus", () => show(cell));
    cell.addEventListener("blur", hide);
  }
  // One stop for the Tab key; the arrows move inside.
  cells.at(-1).at(-1).tabIndex = 0;
  table.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Escape") hide();
    if (!step || event.target.tagName !== "TD") return;
    const row = cells.findIndex((line) => line.includes(event.target));
    const next = cells[row + step[0]]?.[cells[row].indexOf(event.target) + step[1]];
    event.preventDefault();
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}
