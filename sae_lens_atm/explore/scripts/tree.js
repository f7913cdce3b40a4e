// The hierarchy: a tree of latents that a person walks, and the pair that is chosen in it.
const tree = document.getElementById("tree");
const pairBox = document.getElementById("pair");
const KINDS_OF_CONTEXTS = [
  ["Where the parent should have fired and did not", "Absorbed: the child adds the parent's direction in its place."],
  ["Where the child fires without the parent", "Not absorbed: the child adds too little along the parent's direction."],
  ["Where both fire", ""],
];

// Lists of pairs for each latent, and how often each latent is absorbed.
function link(model) {
  const width = model.latents.frequency.length;
  model.parentsOf = Array.from({ length: width }, () => []);
  model.childrenOf = Array.from({ length: width }, () => []);
  model.lost = new Float64Array(width);
  if (!model.pairs) return;
  const { child, parent, absorbed } = model.pairs;
  model.lostIn = Array.from(child, (j, pair) => Math.round(absorbed[pair] * model.latents.frequency[j] * data.rows));
  for (let pair = 0; pair < child.length; pair++) {
    model.parentsOf[child[pair]].push(pair);
    model.childrenOf[parent[pair]].push(pair);
    model.lost[parent[pair]] += model.lostIn[pair];
  }
  for (const pairs of model.childrenOf) pairs.sort((a, b) => model.latents.importance[child[b]] - model.latents.importance[child[a]]);
}

function directChildren(latent) {
  return sae.childrenOf[latent].filter((pair) => sae.pairs.direct[pair]);
}

function descendants(latent) {
  const seen = new Set();
  const todo = [latent];
  while (todo.length) for (const pair of directChildren(todo.pop())) {
    const child = sae.pairs.child[pair];
    if (child !== latent && !seen.has(child)) { seen.add(child); todo.push(child); }
  }
  return seen.size;
}

function drawTree() {
  const none = !sae.pairs || sae.pairs.child.length === 0;
  document.getElementById("parents-from").textContent = sae.parents_from;
  document.getElementById("no-pairs").hidden = !none;
  document.getElementById("has-pairs").hidden = none;
  pairBox.replaceChildren();
  chosen.pair = null;
  if (none) {
    document.getElementById("no-pairs").textContent = "There are no parents and children to show.";
    return;
  }
  let roots = [...sae.childrenOf.keys()].filter((j) => sae.childrenOf[j].length && !sae.parentsOf[j].length);
  if (!roots.length) roots = [...sae.childrenOf.keys()].filter((j) => sae.childrenOf[j].length);
  const size = new Map(roots.map((j) => [j, document.getElementById("tree-order").value === "absorbed" ? sae.lost[j] : descendants(j)]));
  roots.sort((a, b) => size.get(b) - size.get(a) || a - b);
  document.getElementById("tree-count").textContent = `${roots.length.toLocaleString("en")} latents have children and no parent; ${sae.pairs.child.length.toLocaleString("en")} pairs`;
  tree.replaceChildren(...roots.map((j) => node(j, null, [j])));
  if (tree.firstChild) tree.firstChild.tabIndex = 0;
  const strongest = [...sae.lostIn.keys()].filter((pair) => sae.lostIn[pair]).sort((a, b) => sae.lostIn[b] - sae.lostIn[a]).slice(0, 12);
  document.getElementById("strongest").replaceChildren(...strongest.map((pair) => {
    const [j, i] = [sae.pairs.child[pair], sae.pairs.parent[pair]];
    return element("li", {}, element("button", { type: "button", class: "link", onclick: () => showPair(pair, true) }, `latent ${j} absorbs latent ${i}`), ` on ${sae.lostIn[pair].toLocaleString("en")} ${data.words.units} (${percent(sae.pairs.absorbed[pair])} of its own): `, tokensOf(j, 3), " in place of ", tokensOf(i, 3));
  }));
  if (!strongest.length) document.getElementById("strongest").replaceChildren(element("li", {}, `No parent is absorbed on the ${data.words.units} that were read.`));
  const first = strongest[0] ?? directChildren(roots[0])[0];
  if (first !== undefined) showPair(first);
}

// A node of the tree. `pair` connects it with its parent above; `path` guards against circles.
function node(latent, pair, path) {
  const children = directChildren(latent).filter((p) => !path.includes(sae.pairs.child[p]));
  const share = pair === null ? null : sae.pairs.absorbed[pair];
  const line = element("div", {},
    element("span", { class: "arrow", "aria-hidden": "true" }, children.length ? "▸" : ""),
    element("span", {}, String(latent)),
    element("span", { class: "tokens" }, tokensOf(latent, 4)),
    pair === null ? element("span", { class: "small soft" }, `${children.length}`) : null,
    share === null ? null : element("span", { class: "small soft", title: `The parent fires on this share of the child's ${data.words.units}.` }, percent(sae.pairs.together[pair])),
    share === null ? null : element("span", { class: "bar", title: `Absorbed on ${percent(share)} of the child's ${data.words.units}` }, element("i", { style: `width: ${100 * share}%` })),
  );
  const item = element("li", { role: "treeitem", tabindex: "-1", "data-latent": latent, "data-pair": pair, "aria-selected": "false", "aria-label": `latent ${latent}, ${children.length} children` }, line);
  if (children.length) item.setAttribute("aria-expanded", "false");
  item.grow = () => element("ul", { role: "group" }, children.map((p) => node(sae.pairs.child[p], p, [...path, sae.pairs.child[p]])));
  line.addEventListener("click", () => { focusNode(item); toggle(item); choose(item); });
  return item;
}

function toggle(item, open = item.getAttribute("aria-expanded") !== "true") {
  if (!item.hasAttribute("aria-expanded")) return;
  item.setAttribute("aria-expanded", String(open));
  item.querySelector(":scope > ul")?.remove();
  if (open) item.append(item.grow());
}

function focusNode(item) {
  for (const other of tree.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
  item.tabIndex = 0;
  item.focus();
}

function choose(item) {
  if (item.dataset.pair) showPair(Number(item.dataset.pair));
  else select(Number(item.dataset.latent));
  for (const other of tree.querySelectorAll("[aria-selected='true']")) other.setAttribute("aria-selected", "false");
  item.setAttribute("aria-selected", "true");
}

function setUpTree() {
  document.getElementById("tree-order").addEventListener("change", drawTree);
  tree.addEventListener("keydown", (event) => {
    const item = event.target.closest("li");
    if (!item) return;
    const items = [...tree.querySelectorAll("li")];
    const at = items.indexOf(item);
    const open = item.getAttribute("aria-expanded") === "true";
    const above = item.parentElement.closest("li");
    const act = {
      ArrowDown: () => items[at + 1] && focusNode(items[at + 1]),
      ArrowUp: () => items[at - 1] && focusNode(items[at - 1]),
      Home: () => focusNode(items[0]),
      End: () => focusNode(items[items.length - 1]),
      ArrowRight: () => (open ? focusNode(items[at + 1]) : toggle(item, true)),
      ArrowLeft: () => (open ? toggle(item, false) : above && focusNode(above)),
      Enter: () => choose(item),
      " ": () => choose(item),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  });
}

function showPair(pair, scroll = false) {
  chosen.pair = pair;
  const { child, parent, cosine, together, lift, absorbed } = sae.pairs;
  const [j, i] = [child[pair], parent[pair]];
  const facts = [
    ["fires together", percent(together[pair])], ["fires alone", percent(1 - together[pair])],
    ["lift", `${number(lift[pair])} ×`], ["cosine", cosine[pair].toFixed(2)],
    ["absorbed share", `${percent(absorbed[pair])}, ${sae.lostIn[pair].toLocaleString("en")} ${data.words.units}`],
  ];
  pairBox.replaceChildren(
    element("h3", { tabindex: "-1" }, latentLink(j), " is a child of ", latentLink(i)),
    element("p", {}, swatch("child"), "child ", tokensOf(j)), element("p", {}, swatch("parent"), "parent ", tokensOf(i)),
    element("dl", { class: "facts" }, facts.flatMap(([name, value]) => [element("dt", { title: data.meanings[name] ?? null }, name), element("dd", {}, value)])),
    ...contextsOfPair(pair),
  );
  if (!scroll) return;
  pairBox.querySelector("h3").focus({ preventScroll: true });
  pairBox.scrollIntoView({ block: "nearest" });
}

function contextsOfPair(pair) {
  if (!sae.pair_examples) return [];
  const { starts, kinds, child, parent } = sae.pair_examples;
  const found = [[], [], []];
  for (let i = starts[pair]; i < starts[pair + 1]; i++)
    found[kinds[i]].push(context(child.places[i], levelsIn(child, i), levelsIn(parent, i)));
  return found.flatMap((items, kind) => {
    if (!items.length) return [];
    const [title, meaning] = KINDS_OF_CONTEXTS[kind];
    return [element("h4", {}, title), meaning ? element("p", { class: "small soft" }, meaning) : null, element("ul", { class: "contexts" }, items)].filter(Boolean);
  });
}
