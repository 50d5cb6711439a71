"use strict";
// Sorts tables, writes them as CSV, and shows or hides runs. Nothing is loaded from anywhere.
const state = (() => { try { return window.sessionStorage; } catch { return null; } })();
const remember = (name, value) => { try { state && state.setItem(name, JSON.stringify(value)); } catch { /* a page opened from a file */ } };
const recall = (name) => { try { return JSON.parse((state && state.getItem(name)) || "null"); } catch { return null; } };

const cellValue = (cell) => ("v" in cell.dataset ? (cell.dataset.v === "" ? NaN : Number(cell.dataset.v)) : cell.textContent);

function compare(a, b) {
  const lost = (x) => typeof x === "number" && Number.isNaN(x);
  if (lost(a) || lost(b)) return lost(a) - lost(b); // what has no number comes last, however it is sorted
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortBy(head, descending) {
  const table = head.closest("table"), body = table.tBodies[0], index = head.cellIndex;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const value = (row) => cellValue(row.cells[index]);
  const rows = [...body.rows].sort((a, b) => {
    const x = value(a), y = value(b), order = compare(x, y);
    return descending && !Number.isNaN(x) && !Number.isNaN(y) ? -order : order;
  });
  body.append(...rows);
}

function csvOf(table) {
  const quote = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const heads = [...table.tHead.rows[0].cells];
  const spans = heads.map((_, index) => [...table.tBodies[0].rows].some((row) => "low" in row.cells[index].dataset));
  const lines = [heads.flatMap((head, index) => {
    const name = head.textContent.trim();
    return spans[index] ? [name, `${name} low`, `${name} high`] : [name];
  })];
  for (const row of table.tBodies[0].rows) {
    lines.push([...row.cells].flatMap((cell, index) => {
      const value = "v" in cell.dataset ? cell.dataset.v : cell.textContent.trim();
      return spans[index] ? [value, cell.dataset.low || "", cell.dataset.high || ""] : [value];
    }));
  }
  return lines.map((line) => line.map(quote).join(",")).join("\n") + "\n";
}

function download(table) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csvOf(table)], { type: "text/csv" }));
  link.download = `${table.id}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function show(button, shown) {
  button.setAttribute("aria-pressed", String(shown));
  document.body.classList.toggle(`off${button.dataset.series}`, !shown);
}

const toggles = [...document.querySelectorAll(".legend [data-series]")];
const hidden = () => toggles.filter((button) => button.getAttribute("aria-pressed") === "false").map((button) => button.textContent.trim());
for (const button of toggles) {
  if ((recall("hidden") || []).includes(button.textContent.trim())) show(button, false);
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.series) show(button, button.getAttribute("aria-pressed") !== "true");
  else if ("bands" in button.dataset) {
    const shown = !document.body.classList.toggle("nobands");
    button.setAttribute("aria-pressed", String(shown));
  } else if (button.dataset.all) toggles.forEach((other) => show(other, button.dataset.all === "show"));
  else if (button.classList.contains("csv")) download(document.getElementById(button.dataset.table));
  else if (button.closest("thead")) sortBy(button.closest("th"), button.closest("th").getAttribute("aria-sort") !== "descending");
  if (button.closest(".legend")) remember("hidden", hidden());
});

// `rlkit2 report --watch`: ask whether the runs have moved, and load the page again where they have.
const watched = document.body.dataset.watch;
if (watched) {
  const place = recall("place");
  if (place) window.scrollTo(0, place);
  setInterval(async () => {
    try {
      const now = await (await fetch("stamp")).text();
      if (now !== watched) {
        remember("place", window.scrollY);
        location.reload();
      }
    } catch { /* the server has gone; the page stays */ }
  }, 3000);
}
