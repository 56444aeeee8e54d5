// The page's script against a document of a few lines, for machines without a browser.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";
import vm from "node:vm";

const SCRIPT = readFileSync(new URL("../../optlens/report/page.js", import.meta.url), "utf-8");

class FakeElement {
  constructor(tag) {
    Object.assign(this, { tagName: tag.toUpperCase(), children: [], dataset: {}, title: "" });
    Object.assign(this, { textContent: "", hidden: false, tabIndex: 0, attributes: {}, heard: {} });
    this.style = { setProperty(name, value) { this[name] = value; } };
    this.offsetWidth = 100;
    this.offsetHeight = 80;
  }
  append(...parts) { this.children.push(...parts); }
  replaceChildren(...parts) { this.children = parts; }
  setAttribute(name, value) { this.attributes[name] = value; }
  removeAttribute(name) { if (name === "title") this.title = ""; }
  addEventListener(name, run) { this.heard[name] = run; }
  getBoundingClientRect() { return this.box; }
  focus() { this.heard.focus(); }
}

/** Run the script on a lens table of 2 x 3 cells; the window is 500 x 400. */
function open(more = "") {
  const cells = [0, 1].map((row) => [0, 1, 2].map((column) => {
    const cell = new FakeElement("td");
    cell.title = `cell ${row} ${column}\n62.5 %  a  b\n5 %  <b>${row ? "" : more}`;
    cell.box = { left: 200 * column, top: 200 * row, bottom: 200 * row + 20 };
    return cell;
  }));
  const table = new FakeElement("table");
  table.tBodies = [{ rows: cells.map((row) => ({ querySelectorAll: () => row })) }];
  const body = new FakeElement("body");
  const document = {
    body,
    documentElement: { clientWidth: 500 },
    createElement: (tag) => new FakeElement(tag),
    querySelectorAll: (what) => (what === "table.lens" ? [table] : []),
  };
  vm.runInNewContext(SCRIPT, { document, innerHeight: 400, scrollX: 0, scrollY: 1000 });
  const press = (key, target) => {
    const event = { key, target, stopped: false, preventDefault() { this.stopped = true; } };
    table.heard.keydown(event);
    return event.stopped;
  };
  return { cells, card: body.children[0], press };
}

test("the card says what the title said, as text", () => {
  const { cells, card } = open();
  assert.equal(card.hidden, true);
  cells[0][1].heard.mouseenter();
  assert.equal(card.hidden, false);
  const [heading, ...lines] = card.children;
  assert.equal(heading.textContent, "cell 0 1");
  const said = lines.map((line) => line.children.map((part) => part.textContent));
  assert.deepEqual(said, [["a  b", "62.5 %"], ["<b>", "5 %"]]);
  assert.deepEqual(lines.map((line) => line.style["--w"]), ["62.5%", "5%"]);
  cells[0][1].heard.mouseleave();
  assert.equal(card.hidden, true);
});

test("numbers that are no shares get no bar", () => {
  const { cells, card } = open("\n-8.25  logit_diff");
  cells[0][0].heard.mouseenter();
  const line = card.children.at(-1);
  assert.deepEqual(line.children.map((part) => part.textContent), ["logit_diff", "-8.25"]);
  assert.equal(line.style["--w"], "0%");
});

test("a cell keeps its words for a screen reader and loses the browser's own card", () => {
  const { cells } = open();
  assert.equal(cells[1][0].title, "");
  assert.equal(cells[1][0].attributes["aria-description"], "cell 1 0; 62.5 %  a  b; 5 %  <b>");
});

test("the card stays inside the window", () => {
  const { cells, card } = open();
  cells[0][2].heard.mouseenter(); // at 400 of 500, and the card is 100 wide
  assert.deepEqual([card.style.left, card.style.top], ["392px", "1024px"]);
  cells[1][0].box = { left: 0, top: 330, bottom: 350 }; // no room below
  cells[1][0].heard.mouseenter();
  assert.deepEqual([card.style.left, card.style.top], ["8px", "1246px"]);
});

test("the table is one stop of the Tab key, and arrows move inside it", () => {
  const { cells, card, press } = open();
  const stops = () => cells.map((row) => row.map((cell) => cell.tabIndex));
  assert.deepEqual(stops(), [[-1, -1, -1], [-1, -1, 0]]);
  assert.equal(press("ArrowUp", cells[1][2]), true);
  assert.deepEqual(stops(), [[-1, -1, 0], [-1, -1, -1]]);
  assert.equal(card.children[0].textContent, "cell 0 2");
  assert.equal(press("ArrowRight", cells[0][2]), true); // the edge: it stays, and nothing scrolls
  assert.deepEqual(stops(), [[-1, -1, 0], [-1, -1, -1]]);
  assert.equal(press("a", cells[0][2]), false);
  press("Escape", cells[0][2]);
  assert.equal(card.hidden, true);
});
