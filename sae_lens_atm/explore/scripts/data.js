// The data of the page: a compressed text with a JSON header and typed arrays behind it.
const NONE = 0xFFFFFFFF;
const KINDS = { float32: Float32Array, uint32: Uint32Array, int32: Int32Array, uint16: Uint16Array, uint8: Uint8Array, int8: Int8Array };

async function readData() {
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = await new Response(stream).arrayBuffer();
  const start = 8 + Number(new DataView(bytes).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 8, start - 8)));
  const restore = (value) => {
    if (Array.isArray(value)) return value.map(restore);
    if (value === null || typeof value !== "object") return value;
    const keys = Object.keys(value);
    if (keys.length === 1 && keys[0] === "array") {
      const { dtype, at, shape } = value.array;
      const array = new KINDS[dtype](bytes, start + at, shape.reduce((a, b) => a * b, 1));
      array.width = shape[1] ?? 1;
      return array;
    }
    return Object.fromEntries(keys.map((key) => [key, restore(value[key])]));
  };
  return restore(header);
}

// --- elements: text is always set as text, never as HTML --------------------------------------

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") made.addEventListener("click", value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function visible(text) {
  return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
}

function token(index) {
  return element("span", { class: "token" }, visible(data.strings[index]));
}

function row(array, index) {
  return [...array.subarray(index * array.width, (index + 1) * array.width)];
}

function tokensOf(latent, most = 5) {
  return row(sae.latents.tokens, latent).filter((t) => t !== NONE).slice(0, most).map(token);
}

// --- numbers ------------------------------------------------------------------------------------

function number(value) {
  if (!Number.isFinite(value)) return "–";
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(1);
  return Number(value.toPrecision(3)).toLocaleString("en");
}

function percent(value) {
  if (!Number.isFinite(value)) return "–";
  const shown = 100 * value;
  return `${shown !== 0 && Math.abs(shown) < 0.01 ? shown.toExponential(0) : Number(shown.toPrecision(2)).toLocaleString("en")}%`;
}

// --- contexts -----------------------------------------------------------------------------------

function levelsIn(windows, index) {
  const levels = new Map();
  for (let i = windows.starts[index]; i < windows.starts[index + 1]; i++)
    levels.set(windows.offsets[i], windows.levels[i] / 255);
  return levels;
}

// A context around a place. `child` and `parent` are the activations there, by offset.
function context(place, child, parent = new Map(), value = null) {
  const item = element("li", {}, value === null ? null : element("span", { class: "value" }, number(value)));
  if (data.contexts.rows) return sample(item, place, child, parent, value === null);
  const isPair = value === null;
  const { tokens, size, around } = data.contexts;
  const first = Math.floor(place / size) * size;
  const [low, high] = [Math.max(first, place - around), Math.min(first + size, place + around + 1)];
  for (let at = low; at < high; at++) {
    const [c, p] = [child.get(at - place), parent.get(at - place)];
    const span = element("span", {}, visible(data.strings[tokens[at]]));
    if (c !== undefined) { span.dataset.child = ""; span.style.setProperty("--c", c); }
    if (p !== undefined) { span.dataset.parent = ""; span.style.setProperty("--p", p); }
    if (at === place) span.className = "at";
    if (c !== undefined || p !== undefined) span.title = [c !== undefined ? `${percent(c)} of the maximum` : "", p !== undefined ? `${isPair ? "parent" : "match"}: ${percent(p)} of its maximum` : ""].filter(Boolean).join("; ");
    item.append(span);
  }
  return item;
}

// A sample of synthetic data: its true features, and for a pair what fires on it.
function sample(item, place, child, parent, isPair) {
  const { rows, starts, tokens, levels } = data.contexts;
  let [low, high] = [0, rows.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (rows[middle] < place) low = middle + 1;
    else high = middle;
  }
  if (isPair) for (const [name, at] of [["child", child.get(0)], ["parent", parent.get(0)]])
    item.append(swatch(name), element("span", { class: "value" }, `${name} ${at === undefined ? "silent" : percent(at)}`));
  for (let i = starts[low]; i < starts[low + 1]; i++)
    item.append(element("span", { class: "token", title: `${percent(levels[i] / 255)} of the largest magnitude` }, data.strings[tokens[i]]), " ");
  return item;
}

function swatch(name) {
  return element("span", { class: "swatch", style: `background: var(--${name})` });
}
