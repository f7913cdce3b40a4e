// The table of latents. Only the rows in view are in the document.
const ROW = 30;  // pixels
const box = document.getElementById("table");
const head = box.querySelector("thead tr");
const body = box.querySelector("tbody");
const search = document.getElementById("search");
const filter = document.getElementById("filter");
const view = { order: [], key: "importance", sign: -1, texts: null };

let COLUMNS = [
  { key: "index", name: "latent", width: "5rem", value: (j) => j, text: (j) => String(j) },
  { key: "tokens", name: "top", width: "17rem", left: true, value: (j) => data.strings[sae.latents.tokens[j * sae.latents.tokens.width]] ?? "", text: (j) => tokensOf(j) },
  { key: "importance", name: "importance", value: (j) => sae.latents.importance[j], text: (j) => number(sae.latents.importance[j]) },
  { key: "frequency", name: "frequency", value: (j) => sae.latents.frequency[j], text: (j) => percent(sae.latents.frequency[j]) },
  { key: "mean", name: "mean activation", value: (j) => sae.latents.mean[j], text: (j) => number(sae.latents.mean[j]) },
  { key: "contribution", name: "contribution", value: (j) => sae.latents.contribution[j], text: (j) => percent(sae.latents.contribution[j]) },
  { key: "parents", name: "parents", width: "5rem", value: (j) => sae.parentsOf[j].length, text: (j) => String(sae.parentsOf[j].length) },
  { key: "children", name: "children", width: "5rem", value: (j) => sae.childrenOf[j].length, text: (j) => String(sae.childrenOf[j].length) },
  { key: "absorbed", name: "absorbed", value: (j) => sae.lost[j], text: (j) => (sae.lost[j] ? sae.lost[j].toLocaleString("en") : "0") },
  { key: "match", name: "match", width: "5rem", only: () => data.saes.length > 1, value: (j) => sae.matches.cosine[j], text: (j) => sae.matches.cosine[j].toFixed(2) },
  { key: "state", name: "state", width: "5rem", left: true, value: (j) => stateOf(j), text: (j) => (stateOf(j) ? element("span", { class: "tag" }, stateOf(j)) : "") },
];
const FILTERS = {
  "all latents": () => true,
  "latents that fire": (j) => sae.latents.frequency[j] > 0,
  "dead latents": (j) => stateOf(j) === "dead",
  "dense latents": (j) => stateOf(j) === "dense",
  "latents with parents": (j) => sae.parentsOf[j].length > 0,
  "latents with children": (j) => sae.childrenOf[j].length > 0,
  "absorbed parents": (j) => sae.lost[j] > 0,
};

function stateOf(latent) {
  const frequency = sae.latents.frequency[latent];
  return frequency === 0 ? "dead" : frequency > data.dense ? "dense" : "";
}

function setUpTable() {
  COLUMNS = COLUMNS.filter((column) => column.only?.() ?? true);
  if (data.saes.length > 1) FILTERS["latents without a match"] = (j) => sae.latents.frequency[j] > 0 && sae.matches.cosine[j] < data.same;
  filter.append(...Object.keys(FILTERS).map((name) => element("option", {}, name)));
  for (const column of COLUMNS) {
    const name = column.key === "tokens" ? data.words.top : column.name;
    const button = element("button", { type: "button", title: data.meanings[name] ?? null, onclick: () => sortBy(column.key) }, name);
    const cell = element("th", { scope: "col", "data-key": column.key, class: column.left ? "text" : null, style: column.width ? `width: ${column.width}` : null }, button);
    head.append(cell);
  }
  search.addEventListener("input", arrange);
  filter.addEventListener("change", arrange);
  box.addEventListener("scroll", () => requestAnimationFrame(drawRows), { passive: true });
  new ResizeObserver(drawRows).observe(box);
  box.addEventListener("keydown", walk);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || /^(input|select|textarea)$/i.test(event.target.tagName)) return;
    event.preventDefault();
    search.focus();
  });
  search.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown" && event.key !== "Enter") return;
    event.preventDefault();
    box.focus();
    if (view.order.length) select(view.order[0]);
  });
}

function sortBy(key) {
  const text = COLUMNS.find((column) => column.key === key).key === "tokens" || key === "index" || key === "state";
  view.sign = view.key === key ? -view.sign : text ? 1 : -1;
  view.key = key;
  arrange();
}

// The latents that match search and filter, in order.
function arrange() {
  const column = COLUMNS.find(({ key }) => key === view.key);
  const wanted = search.value.trim().toLowerCase();
  const keep = FILTERS[filter.value];
  const matches = wanted ? (j) => String(j) === wanted || textOf(j).includes(wanted) : () => true;
  const found = [];
  for (let j = 0; j < sae.latents.frequency.length; j++) if (keep(j) && matches(j)) found.push(j);
  const values = new Map(found.map((j) => [j, column.value(j)]));
  const compare = typeof column.value(0) === "string" ? (a, b) => a.localeCompare(b) : (a, b) => a - b;
  found.sort((a, b) => view.sign * compare(values.get(a), values.get(b)) || a - b);
  view.order = found;
  for (const cell of head.cells) {
    if (cell.dataset.key === view.key) cell.setAttribute("aria-sort", view.sign > 0 ? "ascending" : "descending");
    else cell.removeAttribute("aria-sort");
  }
  const every = sae.latents.frequency.length;
  document.getElementById("count").textContent = `${found.length.toLocaleString("en")} of ${every.toLocaleString("en")} latents`;
  box.querySelector("table").setAttribute("aria-rowcount", found.length + 1);
  box.scrollTop = 0;
  drawRows();
}

function textOf(latent) {
  view.texts ??= Array.from(sae.latents.frequency, (_, j) => {
    const shown = [...row(sae.latents.tokens, j), ...(sae.promoted ? row(sae.promoted.tokens, j) : [])];
    return shown.filter((t) => t !== NONE).map((t) => data.strings[t]).join("\u0000").toLowerCase();
  });
  return view.texts[latent];
}

function drawRows() {
  if (!sae) return;
  const first = Math.max(Math.floor(box.scrollTop / ROW) - 5, 0);
  const last = Math.min(first + Math.ceil(box.clientHeight / ROW) + 10, view.order.length);
  const gap = (rows) => element("tr", { class: "gap", "aria-hidden": "true" }, element("td", { colspan: COLUMNS.length, style: `height: ${rows * ROW}px` }));
  const shown = view.order.slice(first, last).map((j, i) => element("tr", { id: `row-${j}`, "aria-rowindex": first + i + 2, "aria-selected": String(j === chosen.latent), onclick: () => select(j) },
    COLUMNS.map((column) => element("td", { class: column.left ? "text" : null }, column.text(j)))));
  body.replaceChildren(gap(first), ...shown, gap(view.order.length - last));
}

function walk(event) {
  const page = Math.floor(box.clientHeight / ROW) - 2;
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (event.key === "Enter" && event.target === box) {
    event.preventDefault();
    lookAtCard();
    return;
  }
  if (!(event.key in steps) || event.target !== box || !view.order.length) return;
  event.preventDefault();
  const now = view.order.indexOf(chosen.latent);
  const next = Math.min(Math.max((now < 0 ? -1 : now) + steps[event.key], 0), view.order.length - 1);
  select(view.order[next]);
}

function reveal(latent) {
  const at = view.order.indexOf(latent);
  if (at < 0) return;
  const header = head.getBoundingClientRect().height;
  if (at * ROW < box.scrollTop) box.scrollTop = at * ROW;
  if ((at + 1) * ROW + header > box.scrollTop + box.clientHeight) box.scrollTop = (at + 1) * ROW + header - box.clientHeight;
}
