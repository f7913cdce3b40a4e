// One latent: figures, histogram, contexts, tokens, relatives.
const card = document.getElementById("card");

function latentLink(latent) {
  return element("button", { type: "button", class: "link", onclick: () => goTo(latent) }, `latent ${latent}`);
}

function goTo(latent) {
  select(latent);
  lookAtCard();
}

// Drawing the card again removes the element with the focus, so the heading gets it.
function lookAtCard() {
  document.getElementById("latent").scrollIntoView();
  card.querySelector("h3")?.focus({ preventScroll: true });
}

function select(latent) {
  chosen.latent = latent;
  reveal(latent);
  drawRows();
  drawCard();
  history.replaceState(null, "", `#latent=${latent}`);
}

function drawCard() {
  const j = chosen.latent;
  const { latents, promoted } = sae;
  const state = stateOf(j);
  const facts = [
    ["importance", number(latents.importance[j])],
    ["frequency", percent(latents.frequency[j])],
    ["mean activation", number(latents.mean[j])],
    ["largest activation", number(latents.maximum[j])],
    ["contribution", percent(latents.contribution[j])],
  ];
  const parts = [
    element("h3", { tabindex: "-1" }, `Latent ${j} `, state ? element("span", { class: "tag" }, state) : null),
    element("p", {}, tokensOf(j)),
    element("div", { class: "columns" },
      element("div", {}, element("h4", {}, "Figures"), element("dl", { class: "facts" }, facts.flatMap(([name, value]) => [element("dt", { title: data.meanings[name] ?? null }, name), element("dd", {}, value)]))),
      state === "dead" ? null : element("div", {}, element("h4", {}, "Activations"), histogram(j)),
    ),
    element("div", { class: "columns" },
      relatives("Parents", sae.parentsOf[j], sae.pairs?.parent),
      relatives("Children", sae.childrenOf[j], sae.pairs?.child),
      matchOf(j),
      element("div", {}, element("h4", { title: data.meanings["nearest rows"] }, "Nearest decoder rows"), list(row(latents.near, j).map((k, i) => [latentLink(k), tokensOf(k, 3), latents.near_cosine[j * latents.near.width + i].toFixed(2)]))),
      promoted ? element("div", {}, element("h4", { title: data.meanings["promoted tokens"] }, data.words.promoted), list(row(promoted.tokens, j).map((t, i) => [token(t), "", signed(promoted.logits[j * promoted.tokens.width + i])]))) : null,
      promoted ? element("div", {}, element("h4", { title: data.meanings["promoted tokens"] }, data.words.suppressed), list(row(promoted.lowest_tokens, j).map((t, i) => [token(t), "", signed(promoted.lowest_logits[j * promoted.tokens.width + i])]))) : null,
    ),
    ...(state === "dead" ? [element("p", {}, `This latent fired on none of the ${data.words.units} that were read.`)] : contextsOf(j)),
  ];
  card.replaceChildren(...parts.filter(Boolean));
}

function signed(value) {
  return `${value < 0 ? "−" : "+"}${number(Math.abs(value))}`;
}

function list(lines) {
  return element("table", {}, element("tbody", {}, lines.map(([name, text, value]) => element("tr", {}, element("td", { class: "text" }, name, " ", text), element("td", {}, value)))));
}

function relatives(title, pairs, others) {
  if (!others) return null;
  const most = 12;
  const lines = pairs.slice(0, most).map((pair) => [
    element("button", { type: "button", class: "link", onclick: () => showPair(pair, true) }, `latent ${others[pair]}`), tokensOf(others[pair], 3), percent(sae.pairs.together[pair]),
  ]);
  const rest = pairs.length > most ? element("p", { class: "small soft" }, `and ${pairs.length - most} more, see the hierarchy`) : null;
  return element("div", {}, element("h4", {}, `${title} (${pairs.length})`), pairs.length ? element("p", { class: "small soft" }, `Share of the child's ${data.words.units} on which the parent fires.`) : element("p", { class: "small soft" }, "none"), list(lines), rest);
}

function histogram(latent) {
  const counts = row(sae.latents.histogram, latent);
  const [width, height, foot] = [320, 130, 16];
  const top = Math.log10(Math.max(...counts) + 1);
  const bars = counts.map((count, i) => {
    const tall = top ? (Math.log10(count + 1) / top) * (height - foot - 14) : 0;
    const step = width / counts.length;
    return svg("rect", { x: i * step + 0.5, width: step - 1, y: height - foot - tall, height: tall }, svg("title", {}, count.toLocaleString("en")));
  });
  const label = (x, y, text, anchor) => svg("text", { x, y, "text-anchor": anchor }, text);
  return svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram of the activations of latent ${latent}` },
    svg("line", { x1: 0, x2: width, y1: height - foot, y2: height - foot }), ...bars,
    label(0, height - 3, "0", "start"), label(width, height - 3, number(sae.latents.maximum[latent]), "end"),
    label(0, 10, `${Math.max(...counts).toLocaleString("en")} ${data.words.units} in the largest bar; logarithmic`, "start"));
}

function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function contextsOf(latent) {
  const { starts, groups, windows } = sae.examples;
  const found = new Map();
  for (let i = starts[latent]; i < starts[latent + 1]; i++) {
    if (!found.has(groups[i])) found.set(groups[i], []);
    const levels = levelsIn(windows, i);
    found.get(groups[i]).push(context(windows.places[i], levels, sae.matches ? levelsIn(sae.matches.windows, i) : undefined, (levels.get(0) ?? 0) * sae.latents.maximum[latent]));
  }
  const name = (group) => group === 0 ? "Strongest" : `Activations from ${20 * (group - 1)}% to ${20 * group}%`;
  const order = [...found.keys()].sort((a, b) => (a === 0 ? -1 : b === 0 ? 1 : b - a));
  return [
    element("p", { class: "small soft" }, data.words.contexts),
    ...order.flatMap((group) => [element("h4", {}, name(group)), element("ul", { class: "contexts" }, found.get(group))]),
  ];
}
