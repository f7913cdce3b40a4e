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
      sae.over_training ? element("div", {}, element("h4", { title: data.meanings["over training"] }, "Over training"), overTraining(j)) : null,
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

// Importance as a line, its threshold as a dashed one, the probability of a mask as an area.
function overTraining(latent) {
  const { steps, threshold, lowest, highest } = sae.over_training;
  const importance = [...row(sae.over_training.importance, latent)].map((level) => level ? lowest + (highest - lowest) * (level - 1) / 254 : null);
  const masked = [...row(sae.over_training.masked, latent)].map((level) => level / 255);
  const limits = [...threshold].map((value) => value > 0 ? Math.log10(value) : null);
  const [width, height, head, foot] = [320, 130, 16, 16];
  const seen = [...importance, ...limits].filter((value) => value !== null);
  const low = Math.floor(Math.min(...seen, 0)), high = Math.ceil(Math.max(...seen, 0) + 1e-9);
  const x = (i) => width * (steps[i] - steps[0]) / ((steps[steps.length - 1] - steps[0]) || 1);
  const y = (value) => head + (height - head - foot) * (high - value) / ((high - low) || 1);
  const path = (values) => values.reduce((text, value, i) => value === null ? text : `${text}${text && values[i - 1] !== null ? "L" : "M"}${x(i).toFixed(1)},${y(value).toFixed(1)}`, "");
  const bottom = height - foot;
  const area = `M0,${bottom}${masked.map((p, i) => `L${x(i).toFixed(1)},${(bottom - p * (bottom - head)).toFixed(1)}`).join("")}L${width},${bottom}Z`;
  const label = (at, line, text, anchor) => svg("text", { x: at, y: line, "text-anchor": anchor }, text);
  const last = importance[importance.length - 1];
  const mean = masked.reduce((sum, p) => sum + p, 0) / masked.length;
  const text = `At the end, latent ${latent} has an importance of about ${last === null ? 0 : number(10 ** last)}. Its mean probability of being masked is ${percent(mean)}`;
  return element("div", {},
    svg("svg", { class: "chart curve", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": text },
      svg("line", { x1: 0, x2: width, y1: bottom, y2: bottom }),
      svg("path", { class: "masked", d: area }), svg("path", { class: "threshold", d: path(limits) }), svg("path", { class: "importance", d: path(importance) }),
      label(0, 10, `importance from ${number(10 ** low)} to ${number(10 ** high)}`, "start"),
      label(0, height - 3, `step ${steps[0].toLocaleString("en")}`, "start"), label(width, height - 3, steps[steps.length - 1].toLocaleString("en"), "end")),
    element("p", { class: "small soft" }, `Line: importance. Dashed: its threshold. Area: probability of being masked, up to 100%. ${text}.`));
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
